"""Tuning runs of one small problem on a fake GPU."""

from __future__ import annotations

from typing import Any

from tuning_fakes import FakeGpu, FakeVerify

from metalgen.chips import get_chip
from metalgen.database.store import Store
from metalgen.families import default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.progress import Report
from metalgen.tuning.runner import tune
from metalgen.tuning.timing.measure import Policy

CHIP = get_chip("M3Max")
SMALL = Problem(AttentionConfig(head_dim=8), 2, 16, 16, family="forward")
DEFAULT = default_schedule(SMALL.config)
POLICY = Policy(
    warmup_seconds=0.01, repetitions=3, sample_seconds=1e-3, sets=1, cold_bytes=0, rounds=2
)


def on_gpu(
    store: Store, gpu: FakeGpu, verify: FakeVerify, trials: int = 20, **arguments: Any
) -> Report:
    """A run on a fake GPU."""
    return tune(
        [SMALL],
        CHIP,
        store,
        device=gpu,
        trials=trials,
        policy=POLICY,
        clock=gpu.clock,
        verify=verify,
        **arguments,
    )
