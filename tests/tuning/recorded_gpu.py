"""A device whose times are those of a recorded space: a problem measured wholly on an H200."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from tuning_fakes import Clock, FakeGpu

from metalgen.chips import get_chip
from metalgen.database.measurement import Measurement
from metalgen.families import Limits, Schedule
from metalgen.families.sizes import Problem
from metalgen.tuning.timing.measure import Policy

SPACE = Path(__file__).parents[2] / "benchmarks" / "spaces" / "h200" / "forward-d64.jsonl"
"""Every schedule of a problem, measured on an H200: the device of these workers."""

RECORDED = [Measurement.from_line(line) for line in SPACE.read_text().splitlines()]
SECONDS = {m.schedule: m.seconds for m in RECORDED}
SMALL = Problem(RECORDED[0].problem.config, 2, 16, 16, family="forward")
"""The recorded config in a size whose arrays are made at once; the times are those recorded."""


def recorded(schedule: Schedule) -> float:
    """What a schedule took on the H200, infinity where it did not run."""
    seconds = SECONDS[schedule]
    return math.inf if seconds is None else seconds


def failure(schedule: Schedule) -> Exception | None:
    """What building a schedule that did not run on the H200 raises."""
    return None if recorded(schedule) < math.inf else RuntimeError("did not run on the H200")


class Replayed(FakeGpu):
    """The recorded GPU."""

    name = "cuda"
    language = "cuda"
    policy = Policy(warmup_seconds=0.01, repetitions=3, sample_seconds=1e-3, sets=1, rounds=2)

    def __init__(self) -> None:
        super().__init__(Clock(), failure, recorded)

    @property
    def limits(self) -> Limits:
        return replace(get_chip("H200").limits, instructions=())  # as when it was measured
