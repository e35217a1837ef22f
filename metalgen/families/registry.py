"""All kernel families, and the types of their schedules."""

from __future__ import annotations

from metalgen.errors import ArgumentError
from metalgen.families.append import APPEND
from metalgen.families.attention import AttentionFamily
from metalgen.families.backward import BACKWARD_ALL, BACKWARD_KEYS, BACKWARD_ROWS
from metalgen.families.base import Family, TunedFamily
from metalgen.families.decode import DECODE
from metalgen.families.forward import FORWARD
from metalgen.kinds import KINDS, Kind, kinds_in
from metalgen.languages import LANGUAGES, Language
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import define_schedule, forget_schedules

FAMILIES: dict[str, Family] = {}
"""All families by name."""


def register(family: Family, *rooms: Kind | Language) -> None:
    """Add a family, or what it has kernels for; its schedules get their types.

    Args:
        family: which may be known already.
        rooms: matrix kinds, or languages if it makes no matrix products.
    """
    FAMILIES[family.name] = family
    for room in rooms:
        kind = room if isinstance(room, Kind) else None
        language = room.language if isinstance(room, Kind) else room.name
        define_schedule(
            family.name,
            kind.name if kind else "",
            family.knobs(kind),
            kind.words if kind else family.words,
            language=language,
            required_kind=kind is not None and kind is not kinds_in(language)[0],
            operands=(family.own, family.traversed, family.together, family.adds),
            copying_simdgroups=kind.copying_simdgroups if kind else 0,
        )


def unregister(name: str, kind: str = "") -> None:
    """Take a family away, or its schedules with one kind."""
    forget_schedules(name, kind)
    if not kind:
        del FAMILIES[name]


def get_family(name: str) -> Family:
    """The family of a name.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return FAMILIES[name]
    except KeyError:
        raise ArgumentError("family", f"one of {', '.join(FAMILIES)}", name) from None


def attention_families() -> dict[str, AttentionFamily]:
    """Families whose calls compute attention, by name."""
    return {n: own for n, own in FAMILIES.items() if isinstance(own, AttentionFamily)}


def get_attention(name: str) -> AttentionFamily:
    """The family of attention of a name.

    Raises:
        ArgumentError: there is none.
    """
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if isinstance(family, AttentionFamily):
        return family
    raise ArgumentError("family", f"one of {', '.join(attention_families())}", name)


def tuned_families() -> dict[str, TunedFamily]:
    """Families that problems may be of, by name."""
    return {n: own for n, own in FAMILIES.items() if isinstance(own, TunedFamily)}


def get_tuned(name: str) -> TunedFamily:
    """The family of a name, of which problems may be.

    Raises:
        ArgumentError: there is none.
    """
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if isinstance(family, TunedFamily):
        return family
    raise ArgumentError("family", f"one of {', '.join(tuned_families())}", name)


def choose_family(config: AttentionConfig, q_len: int) -> AttentionFamily:
    """The family that computes calls of a config with so many queries."""
    found = reversed(attention_families().values())
    return next(family for family in found if family.takes(config, q_len))


ORDINARY = FORWARD.name
"""Name of the family that takes any call: short names of problems leave it out."""

for _forward in (FORWARD, DECODE):
    register(_forward, *KINDS.values())
for _backward in (BACKWARD_ROWS, BACKWARD_KEYS):
    register(_backward, *(kind for kind in KINDS.values() if kind.backward))
register(BACKWARD_ALL, *(kind for kind in KINDS.values() if kind.backward and kind.adds))
register(APPEND, *LANGUAGES.values())
