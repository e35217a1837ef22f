"""The closed form of a launch's work, against what the simulator counts when it runs the kernel."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import mlx.core as mx
import pytest

from metalgen import simulator
from metalgen.devices import get_device
from metalgen.families import Schedule, default_schedule, enumerate_valid
from metalgen.families.counts import (
    CombineCounts,
    Counts,
    combine_counts,
    decode_counts,
    forward_counts,
)
from metalgen.problem.config import AttentionConfig

HEAD_DIMS = ((64, None), (128, None), (80, None), (20, 9), (33, 64), (8, 8), (48, 72), (256, None))
NARROW = ((8, 8), (16, 40), (20, 9), (33, 24), (24, None), (40, 16))
"""Of the wide sweep in decode: most of its time is that of the compiler, which grows with width."""
COUNTS = {"forward": forward_counts, "decode": decode_counts}


def draw(
    seed: str, family: str, dims: Sequence[tuple[int, int | None]] = HEAD_DIMS
) -> tuple[AttentionConfig, Schedule, tuple[int, int, int]]:
    """A config, a valid schedule of it, and (heads, q_len, kv_len), at random."""
    rng = random.Random(seed)
    head_dim, v_dim = rng.choice(dims)
    config = AttentionConfig(
        head_dim,
        rng.choice(("float16", "bfloat16", "float32")),
        value_head_dim=v_dim,
        heads_per_kv=rng.choice((1, 1, 2, 3)),
        causal=rng.random() < 0.6,
        return_lse=rng.random() < 0.4,
        window_left=rng.choice((None, None, rng.randint(0, 100))),
        window_right=rng.choice((None, None, rng.randint(0, 100))),
        softcap=rng.choice((None, None, 15.0)),
    )
    schedule = rng.choice(enumerate_valid(config, family=family))
    kv_len = rng.choice((1, rng.randint(1, 40), rng.randint(40, 150)))
    q_len = rng.choice((1, kv_len, rng.randint(1, 100 if family == "forward" else 9)))
    return config, schedule, (config.heads_per_kv, q_len, kv_len)


def simulated(
    config: AttentionConfig, schedule: Schedule, sizes: tuple[int, int, int], family: str
) -> tuple[Counts, CombineCounts | None]:
    """The counts of one checked run, under the names of `Counts`, and of the step that joins."""
    heads, q_len, kv_len = sizes
    dtype = getattr(mx, config.dtype)
    kv_heads = heads // config.heads_per_kv
    q = mx.ones((2, heads, q_len, config.head_dim), dtype)
    k = mx.ones((2, kv_heads, kv_len, config.head_dim), dtype)
    v = mx.ones((2, kv_heads, kv_len, config.v_dim), dtype)
    kernel = get_device("simulator").build(config, schedule)
    with simulator.record(checked=True) as runs:
        out, lse = kernel(q, k, v, 0.125)
        mx.eval(out if lse is None else (out, lse))
    assert len(runs) == (1 if schedule.partials == 1 else 2)  # the second joins the splits
    for run in runs:
        assert not run.findings, run.findings.report()
    seen, *second = (run.counters for run in runs)
    assert seen is not None
    combine = None
    if second and (last := second[0]) is not None:
        combine = CombineCounts(
            threads=2 * heads * q_len * config.v_dim,
            parts_read=last.buffer("parts").bytes_read,
            sums_read=last.buffer("sums").bytes_read,
            out_written=last.buffer("out").bytes_written,
            lse_written=last.buffer("lse").bytes_written if config.return_lse else 0,
            exponentials=last.exponentials,
        )
    expected = COUNTS[family](config, schedule, batch_heads=2 * heads, q_len=q_len, kv_len=kv_len)
    sums = "sums" if schedule.partials > 1 else "lse" if config.return_lse else None
    found = expected._replace(  # what only the closed form knows stays: groups and passes
        multiply_accumulates=seen.multiply_accumulates,
        q_read=seen.buffer("q").bytes_read,
        k_read=seen.buffer("k").bytes_read,
        v_read=seen.buffer("v").bytes_read,
        out_written=seen.buffer("out").bytes_written,
        lse_written=seen.buffer(sums).bytes_written if sums else 0,
        threadgroup_read=seen.threadgroup.bytes_read,
        threadgroup_written=seen.threadgroup.bytes_written,
        threadgroup_memory=seen.threadgroup_memory,
        exponentials=seen.exponentials,
        shuffles=seen.shuffles,
        barriers=seen.barriers,
        simdgroup_barriers=seen.simdgroup_barriers,
    )
    return found, combine


def check(
    seed: str, family: str = "forward", dims: Sequence[tuple[int, int | None]] = HEAD_DIMS
) -> None:
    compare(draw(seed, family, dims), family)


def compare(case: tuple[AttentionConfig, Schedule, tuple[int, int, int]], family: str) -> None:
    config, schedule, (heads, q_len, kv_len) = case
    expected = COUNTS[family](config, schedule, batch_heads=2 * heads, q_len=q_len, kv_len=kv_len)
    got, combine = simulated(*case, family)
    wrong = {
        name: (seen, counted)
        for name, seen, counted in zip(Counts._fields, got, expected, strict=True)
        if seen != counted
    }
    assert not wrong, f"{config}, {schedule}, heads, q_len, kv_len = {case[2]}"
    if schedule.partials > 1:
        assert combine == combine_counts(config, schedule, batch_heads=2 * heads, q_len=q_len)


@pytest.mark.parametrize("n", range(12))
def test_the_simulator_counts_the_same(n: int) -> None:
    check(f"few {n}")


@pytest.mark.parametrize("n", range(12))
def test_the_simulator_counts_the_same_in_decode(n: int) -> None:
    check(f"decode {n}", "decode")


@pytest.mark.parametrize(("family", "splits"), [("forward", 1), ("decode", 2)])
def test_shares_of_wide_values_are_counted(family: str, splits: int) -> None:
    config = AttentionConfig(16, value_head_dim=320, causal=True)
    schedule = default_schedule(config, family=family)
    assert schedule.value_parts == 2
    if splits > 1:
        schedule = dataclasses.replace(schedule, splits=splits)
    compare((config, schedule, (1, 5, 30)), family)


@pytest.mark.slow
@pytest.mark.parametrize("n", range(300))
def test_the_simulator_counts_the_same_in_a_wide_sweep(n: int) -> None:
    check(f"many {n}")


@pytest.mark.slow
@pytest.mark.parametrize("n", range(300))
def test_the_simulator_counts_the_same_in_a_wide_sweep_of_decode(n: int) -> None:
    check(f"many decode {n}", "decode", NARROW)
