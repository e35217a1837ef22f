"""Rows that a store must keep whole, tell apart, or refuse."""

from __future__ import annotations

import copy
from typing import Any

from metalgen.database.layout import MAX_TEXT
from metalgen.database.measurement import Measurement
from metalgen.testing.rows import OTHER_HASH, SECOND, row
from metalgen.testing.store_base import DECODE, LONGER, SPLIT, WARM_POLICY

FULL = row(
    SPLIT,
    0.1 + 0.2,
    problem=DECODE,
    spread=5e-324,
    samples=(2e-3, 0.1 + 0.2, 1e-3, 1.7976931348623157e308, 2e-3),
    default_seconds=2 / 3,
    mlx_seconds=1e-9,
    phase="final",
    verified=True,
    error=1e-7,
    detail='within the noise: 3 \N{MICRO SIGN}s, "quoted", 100 %, \'); DROP TABLE runs; --',
    source_hash="0f" * 8,
    run="none yet",
)
"""A row whose every field has a value of its own."""

IDENTITY: dict[str, dict[str, Any]] = {
    "problem": {"problem": LONGER},
    "schedule": {"schedule": SECOND},
    "template_hash": {"template_hash": OTHER_HASH},
    "chip": {"chip": "M3Max-30"},
    "cores": {"cores": 30},
    "device": {"device": "simulator"},
    "provenance": {"provenance": "modelled"},
    "policy": {"policy": WARM_POLICY},
    "phase": {"phase": "final"},
}
"""Changes of `row()` that make another measurement of it."""

BAD: dict[str, dict[str, Any]] = {
    "not a time": {"seconds": float("nan")},
    "endless": {"spread": float("inf")},
    "negative": {"mlx_seconds": -1.0},
    "a bad sample": {"samples": (1e-3, float("nan"))},
    "two lines": {"detail": "line 1\nline 2"},
    "a text for a terminal": {"policy": "\x1b[2J"},
    "a text too long": {"detail": "x" * (MAX_TEXT + 1)},
    "no hash": {"template_hash": "{{ 7*7 }}"},
    "no source hash": {"source_hash": "abc"},
    "no chip": {"chip": "../../etc/passwd"},
    "no device": {"device": "GPU 1"},
    "no number of cores": {"cores": -1},
    "no date": {"created": "yesterday"},
}


def forced(m: Measurement, **changes: Any) -> Measurement:
    """A row with fields that `Measurement` refuses."""
    m = copy.copy(m)
    for name, value in changes.items():
        object.__setattr__(m, name, value)
    return m
