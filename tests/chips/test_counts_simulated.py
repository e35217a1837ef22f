"""The closed form of a launch's work, against what the simulator counts when it runs the kernel."""

from __future__ import annotations

import random

import mlx.core as mx
import pytest

from metalgen import simulator
from metalgen.chips.counts import Counts, decode_counts, forward_counts
from metalgen.config import AttentionConfig
from metalgen.devices import get_device
from metalgen.schedule import Schedule
from metalgen.tuning.space import enumerate_valid

HEAD_DIMS = ((64, None), (128, None), (80, None), (20, 9), (33, 64), (8, 8), (48, 72), (256, None))
COUNTS = {"forward": forward_counts, "decode": decode_counts}


def draw(seed: str, family: str) -> tuple[AttentionConfig, Schedule, tuple[int, int, int]]:
    """A config, a valid schedule of it, and (heads, q_len, kv_len), at random."""
    rng = random.Random(seed)
    head_dim, v_dim = rng.choice(HEAD_DIMS)
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
) -> Counts:
    """The counts of one checked run, under the names of `Counts`."""
    heads, q_len, kv_len = sizes
    dtype = getattr(mx, config.dtype)
    kv_heads = heads // config.heads_per_kv
    q = mx.ones((2, heads, q_len, config.head_dim), dtype)
    k = mx.ones((2, kv_heads, kv_len, config.head_dim), dtype)
    v = mx.ones((2, kv_heads, kv_len, config.v_dim), dtype)
    kernel = get_device("simulator").build(config, schedule, family)
    with simulator.record(checked=True) as runs:
        out, lse = kernel(q, k, v, 0.125)
        mx.eval(out if lse is None else (out, lse))
    run = runs[0]
    assert len(runs) == (1 if schedule.splits == 1 else 2)  # the second joins the splits
    assert not run.findings, run.findings.report()
    seen = run.counters
    assert seen is not None
    expected = COUNTS[family](config, schedule, batch_heads=2 * heads, q_len=q_len, kv_len=kv_len)
    with_lse = config.return_lse or schedule.splits > 1
    return expected._replace(  # what only the closed form knows stays: groups and passes
        multiply_accumulates=seen.multiply_accumulates,
        q_read=seen.buffer("q").bytes_read,
        k_read=seen.buffer("k").bytes_read,
        v_read=seen.buffer("v").bytes_read,
        out_written=seen.buffer("out").bytes_written,
        lse_written=seen.buffer("lse").bytes_written if with_lse else 0,
        threadgroup_read=seen.threadgroup.bytes_read,
        threadgroup_written=seen.threadgroup.bytes_written,
        threadgroup_memory=seen.threadgroup_memory,
        exponentials=seen.exponentials,
        shuffles=seen.shuffles,
        barriers=seen.barriers,
        simdgroup_barriers=seen.simdgroup_barriers,
    )


def check(seed: str, family: str = "forward") -> None:
    config, schedule, (heads, q_len, kv_len) = case = draw(seed, family)
    expected = COUNTS[family](config, schedule, batch_heads=2 * heads, q_len=q_len, kv_len=kv_len)
    got = simulated(*case, family)
    wrong = {
        name: (seen, counted)
        for name, seen, counted in zip(Counts._fields, got, expected, strict=True)
        if seen != counted
    }
    assert not wrong, f"{config}, {schedule}, heads, q_len, kv_len = {case[2]}"


@pytest.mark.parametrize("n", range(12))
def test_the_simulator_counts_the_same(n: int) -> None:
    check(f"few {n}")


@pytest.mark.parametrize("n", range(12))
def test_the_simulator_counts_the_same_in_decode(n: int) -> None:
    check(f"decode {n}", "decode")


@pytest.mark.slow
@pytest.mark.parametrize("n", range(300))
def test_the_simulator_counts_the_same_in_a_wide_sweep(n: int) -> None:
    check(f"many {n}")


@pytest.mark.slow
@pytest.mark.parametrize("n", range(300))
def test_the_simulator_counts_the_same_in_a_wide_sweep_of_decode(n: int) -> None:
    check(f"many decode {n}", "decode")
