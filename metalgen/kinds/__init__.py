"""Matrix kinds: how products are made, and what that fixes for schedules."""

from __future__ import annotations

from metalgen.errors import ArgumentError
from metalgen.kinds.base import Kind, value_width
from metalgen.kinds.mma import MMA
from metalgen.kinds.simdgroup import SIMDGROUP
from metalgen.kinds.wgmma import WGMMA

KINDS: dict[str, Kind] = {kind.name: kind for kind in (SIMDGROUP, MMA, WGMMA)}
"""All kinds by name; the first of a language is the one that stored keys do not state."""


def register(kind: Kind) -> None:
    """Add a kind, for `metalgen.families.register` to name; `unregister` takes it away again."""
    KINDS[kind.name] = kind


def unregister(name: str) -> None:
    """Take a kind away, whose schedules have to go first (`metalgen.families.unregister`)."""
    del KINDS[name]


def get_kind(name: str) -> Kind:
    """The kind of a name.

    Raises:
        ArgumentError: there is none.
    """
    try:
        return KINDS[name]
    except KeyError:
        raise ArgumentError("kind", f"one of {', '.join(KINDS)}", name) from None


def kinds_in(language: str) -> list[Kind]:
    """The kinds that are written in a language, the first one first."""
    return [kind for kind in KINDS.values() if kind.language == language]


__all__ = [
    "KINDS",
    "MMA",
    "SIMDGROUP",
    "WGMMA",
    "Kind",
    "get_kind",
    "kinds_in",
    "register",
    "unregister",
    "value_width",
]
