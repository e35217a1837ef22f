"""Chip facts, the closed form of a kernel's work, and the model of its time."""

from __future__ import annotations

from metalgen.chips.chip import (
    Chip,
    IncompleteChip,
    Origin,
    UnknownChip,
    all_chips,
    get_chip,
    neighbours,
)
from metalgen.chips.detection import detect

__all__ = [
    "Chip",
    "IncompleteChip",
    "Origin",
    "UnknownChip",
    "all_chips",
    "detect",
    "get_chip",
    "neighbours",
]
