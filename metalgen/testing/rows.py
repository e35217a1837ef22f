"""Small problems, schedules and measurements, made up, that tests of stores and look-ups share."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from metalgen.database.measurement import Measurement, host
from metalgen.families import APPLE, Schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

HASH = "0123456789abcdef"
OTHER_HASH = "f" * 16
CONFIG = AttentionConfig(head_dim=64, causal=True, heads_per_kv=4)
PROBLEM = Problem(CONFIG, batch_heads=32, q_len=1024, kv_len=1024)
FIRST = Schedule(bq=64, bk=32, bd=64, simdgroups=4, row_blocks=2)
SECOND = Schedule(bq=32, bk=16, bd=64, simdgroups=4)
THIRD = Schedule(bq=32, bk=8, bd=32, simdgroups=4, buffers=2)
CHIP: Any = SimpleNamespace(name="M3Max", cores=40, generation="M3", limits=APPLE)
NEIGHBOURS = ("M3Max-30", "M3Ultra", "M3")
"""Chips to borrow from, best first."""


def row(schedule: Schedule = FIRST, seconds: float | None = 1e-3, **changes: Any) -> Measurement:
    """A row on M3Max, measured by this MLX on this system unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "problem": PROBLEM,
        "template_hash": HASH,
        "chip": "M3Max",
        "cores": 40,
        "device": "metal",
        "provenance": "measured",
        "policy": '{"repetitions":7}',
        "created": "2026-11-21T08:00:00Z",
        **host(),
    }
    return Measurement(schedule=schedule, seconds=seconds, **(fields | changes))


def modelled(schedule: Schedule = FIRST, seconds: float = 1e-3, **changes: Any) -> Measurement:
    """A predicted row on M3Max."""
    fields: dict[str, Any] = {"provenance": "modelled", "device": "model", "policy": "model 1"}
    return row(schedule, seconds, **(fields | changes))
