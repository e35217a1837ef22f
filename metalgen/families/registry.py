"""All kernel families, and the types of their schedules."""

from __future__ import annotations

from metalgen.errors import ArgumentError
from metalgen.families.base import Family
from metalgen.families.decode import DECODE
from metalgen.families.forward import FORWARD
from metalgen.kinds import KINDS, Kind, kinds_in
from metalgen.schedules import define_schedule

FAMILIES: dict[str, Family] = {}
"""All families by name."""


def register(family: Family, *kinds: Kind) -> None:
    """Add a family, or matrix kinds that it has kernels for; its schedules get their types."""
    FAMILIES[family.name] = family
    for kind in kinds:
        define_schedule(
            family.name,
            kind.name,
            family.knobs(kind),
            kind.words,
            required_kind=kind is not kinds_in(kind.language)[0],
        )


def get_family(name: str) -> Family:
    """The family of a name.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return FAMILIES[name]
    except KeyError:
        raise ArgumentError("family", f"one of {', '.join(FAMILIES)}", name) from None


for _family in (FORWARD, DECODE):
    register(_family, *KINDS.values())
