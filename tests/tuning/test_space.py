"""What the declared space holds, against a plain enumeration of every field."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from metalgen.families import (
    Limits,
    Schedule,
    default_schedule,
    enumerate_valid,
    is_valid,
    space,
)
from metalgen.kinds import kinds_in
from metalgen.problem.config import AttentionConfig

CONFIGS = [
    AttentionConfig(head_dim=64),
    AttentionConfig(head_dim=128, dtype="bfloat16", causal=True, heads_per_kv=4),
    AttentionConfig(head_dim=256, dtype="float32"),
    AttentionConfig(head_dim=192, value_head_dim=128),
    AttentionConfig(head_dim=9, dtype="float32"),
]


def brute_force(config: AttentionConfig, limits: Limits) -> set[Schedule]:
    """Every valid schedule of the documented choices, by trying all combinations."""
    kind = kinds_in(limits.language)[0]
    widest = max(kind.padded(config.head_dim), kind.padded(config.v_dim))
    metal = kind.name == "simdgroup"
    choices: dict[str, Any] = {
        "row_blocks": (1, 2, 4),
        "simdgroups": (1, 2, 4, 8, 16),
        "bk": (8, 16, 32, 64) if metal else (16, 32, 48, 64, 96, 128),
        "q_source": ("registers", "threadgroup"),
        "bd": {32, 64, 128, widest, default_schedule(config, limits).bd},
        "buffers": (1, 2) if metal else (1, 2, 3, 4),
    }
    if metal:
        choices |= {
            "k_source": ("threadgroup", "device"),
            "v_source": ("threadgroup", "device"),
            "load_width": (2, 4, 8),
            "fragment": ("input", "float32") if config.dtype == "bfloat16" else ("input",),
        }
    found = set()
    for values in itertools.product(*choices.values()):
        point = dict(zip(choices, values, strict=True))
        rows = kind.row_block * point["row_blocks"] * point["simdgroups"]
        schedule = Schedule(bq=rows, kind=kind.name, **point)
        if is_valid(config, schedule, limits):
            found.add(schedule)
    return found


@pytest.mark.parametrize(
    ("config", "limits"),
    [
        (CONFIGS[0], Limits()),
        (CONFIGS[1], Limits(threadgroup_bytes=8192, threads=256)),
        (CONFIGS[2], Limits(threadgroup_bytes=16384)),
        (CONFIGS[3], Limits()),
        (CONFIGS[4], Limits()),
    ],
)
def test_the_space_is_every_valid_combination_once_with_the_default_first(
    config: AttentionConfig, limits: Limits
) -> None:
    valid = enumerate_valid(config, limits)
    assert valid[0] == default_schedule(config, limits)
    assert len(valid) == len(set(valid))
    assert set(valid) == brute_force(config, limits)


@pytest.mark.parametrize("config", [CONFIGS[1], CONFIGS[3]], ids=str)
def test_the_space_of_another_target_keeps_that_targets_rules(config: AttentionConfig) -> None:
    limits = Limits(232448, 1024, "cuda")
    valid = enumerate_valid(config, limits, math_modes=("safe", "fast"))
    assert valid[0] == default_schedule(config, limits)
    assert len(valid) == len(set(valid))
    assert set(valid) == brute_force(config, limits)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_schedule_and_its_point_determine_each_other(config: AttentionConfig) -> None:
    declared = space(config)
    for schedule in enumerate_valid(config)[::37]:
        point = declared.point(schedule)
        assert point is not None
        assert declared.schedule(point) == schedule


def test_a_schedule_that_is_no_point_has_none() -> None:
    declared = space(CONFIGS[0])
    outside = Schedule(bq=8 * 3, bk=32, bd=64, simdgroups=3)
    assert declared.point(outside) is None


def test_math_modes_multiply_the_space() -> None:
    safe = enumerate_valid(CONFIGS[0])
    both = enumerate_valid(CONFIGS[0], math_modes=("safe", "fast"))
    assert len(both) == 2 * len(safe)
    assert {s.math_mode for s in both} == {"safe", "fast"}


def test_a_few_thousand_schedules_are_valid_for_the_common_configs() -> None:
    assert len(enumerate_valid(AttentionConfig(head_dim=64, causal=True))) == 4185
    assert len(enumerate_valid(AttentionConfig(head_dim=128, causal=True))) == 5175
