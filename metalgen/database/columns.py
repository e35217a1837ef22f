"""From problems and measurements to the columns of a database, and back."""

from __future__ import annotations

import json
import math
from typing import Any

from metalgen.database.measurement import Measurement
from metalgen.errors import ArgumentError, MetalgenError
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig


def row_of(problem: Problem) -> dict[str, Any]:
    """The row of a problem, but for its id."""
    return {
        "key": problem.key,
        "family": problem.family,
        "config": problem.config.key,
        "batch_heads": problem.batch_heads,
        "q_len": problem.q_len,
        "kv_len": problem.kv_len,
    }


def problem_of(key: str) -> Problem | None:
    """The problem of a key; None where it is none."""
    try:
        fields = json.loads(key)
        config = AttentionConfig.from_dict(fields.pop("config"))
        return Problem(config, **fields)
    except (MetalgenError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return None


def measurement_of(row: dict[str, Any]) -> Measurement | None:
    """The measurement of a row with ``problem_key`` and ``schedule_key``; None where it is none."""
    try:
        fields = {
            name: value
            for name, value in row.items()
            if name not in ("id", "problem", "schedule", "problem_key", "schedule_key")
        }
        fields |= json.loads(row["problem_key"])
        fields["schedule"] = json.loads(row["schedule_key"])
        fields["samples"] = json.loads(row["samples"])
        fields["verified"] = {0: False, 1: True}[row["verified"]]
        if fields["error"] == math.inf:  # as earlier versions kept of a kernel that gave NaN
            fields["error"] = None
        return Measurement.from_record(fields)
    except (ArgumentError, KeyError, TypeError, ValueError, RecursionError):
        return None
