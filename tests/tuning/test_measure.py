"""How times are taken: warm-up, repetitions, rotation, interleaving; on a clock made for tests."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tuning_fakes import Clock

from metalgen.devices import Runner, get_device
from metalgen.devices.marking import marking
from metalgen.errors import ArgumentError
from metalgen.families import default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.reference import attention_float64
from metalgen.tuning.timing.measure import (
    Bench,
    Policy,
    Timing,
    arrays,
    members,
    mlx_baseline,
    set_count,
)

PROBLEM = Problem(AttentionConfig(head_dim=8, heads_per_kv=2, causal=True), 4, 16, 32)
POLICY = Policy(
    warmup_seconds=0.5, repetitions=5, sample_seconds=0.01, sets=2, cold_bytes=0, rounds=2
)


def runner(clock: Clock, seconds: float, log: list[str], name: str = "") -> Runner:
    """A kernel that takes `seconds` and writes its name into a log."""

    def run(q: mx.array, k: mx.array, v: mx.array, scale: float) -> tuple[mx.array, None]:
        clock.now += seconds
        log.append(name)
        return mx.zeros(1), None

    return run


def test_the_policy_is_a_canonical_key() -> None:
    assert Policy().key == (
        '{"cache":"cold","chained":true,"cold_bytes":268435456,"most_repetitions":31,"most_rounds":30,'
        '"precision":0.01,"repetitions":7,"rounds":5,"sample_seconds":0.01,"sets":3,'
        '"timer":"wall","warmup_seconds":1.0}'
    )


def test_median_and_spread_are_those_of_the_samples() -> None:
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0))
    assert timing.median == 3.0
    assert timing.spread == 2.0  # quartiles 2 and 4
    assert Timing((7.0,)).spread == 0.0


def test_warming_up_goes_on_until_the_wall_clock_says_so() -> None:
    clock, log = Clock(), []
    Bench(PROBLEM, POLICY, clock).warm_up(runner(clock, 0.1, log))
    assert len(log) == 5


def test_a_short_kernel_is_launched_several_times_a_sample() -> None:
    clock, log = Clock(), []
    timing = Bench(PROBLEM, POLICY, clock).measure(runner(clock, 1e-3, log))
    assert len(timing.samples) == 5
    assert len(log) == 2 + 5 * 10
    assert timing.median == pytest.approx(1e-3, rel=1e-2)


def test_a_hopeless_kernel_is_measured_once() -> None:
    clock, log = Clock(), []
    timing = Bench(PROBLEM, POLICY, clock).measure(runner(clock, 1.0, log), give_up=0.5)
    assert len(log) == 2
    assert timing.samples == (pytest.approx(1.0, rel=1e-3),)


def test_finals_are_interleaved_there_and_back() -> None:
    clock, log = Clock(), []
    runners = {name: runner(clock, 1.0, log, name) for name in "abc"}
    timings = Bench(PROBLEM, POLICY, clock).compare(runners)
    assert "".join(log) == "aabbcc" + "abccba" * 2
    assert {name: len(t.samples) for name, t in timings.items()} == {"a": 4, "b": 4, "c": 4}


def test_launches_take_the_sets_of_arrays_in_turn() -> None:
    clock = Clock()
    bench = Bench(PROBLEM, POLICY, clock)
    seen = []

    def run(q: mx.array, k: mx.array, v: mx.array, scale: float) -> tuple[mx.array, None]:
        seen.append([x is k for _, x, _, _ in bench.sets].index(True))
        return q, None

    bench.run(run, 5)
    bench.run(run, 2)
    assert seen == [0, 1, 0, 1, 0, 1, 0]


@pytest.mark.parametrize("width", [16, 8])
def test_each_launch_of_a_sample_waits_for_the_one_before(width: int) -> None:
    """By its queries: the output before where that is as wide, else their own, made after it."""
    config = AttentionConfig(16, value_head_dim=width)
    bench = Bench(dataclasses.replace(PROBLEM, config=config), POLICY, Clock())
    taken: list[mx.array] = []

    def run(q: mx.array, k: mx.array, v: mx.array, scale: float) -> tuple[mx.array, None]:
        taken.append(q)
        return q[..., :width] * (float("nan") if len(taken) == 15 else -1), None

    bench.run(run, 19)
    own = [np.array(bench.sets[n % 2][0]) for n in range(19)]
    for n, q in enumerate(taken):
        expected = own[0] * np.float16((-1) ** n) if width == 16 else own[n]
        np.testing.assert_array_equal(np.array(q), expected if n < 15 else np.full_like(q, np.nan))
    assert len(taken) == 19


def test_launches_of_another_policy_wait_for_nothing() -> None:
    bench = Bench(PROBLEM, dataclasses.replace(POLICY, chained=False), Clock())
    taken: list[mx.array] = []

    def run(q: mx.array, k: mx.array, v: mx.array, scale: float) -> tuple[mx.array, None]:
        taken.append(q)
        return q + 1, None

    bench.run(run, 11)
    assert all(q is bench.sets[n % 2][0] for n, q in enumerate(taken)) and len(taken) == 11


def test_a_cold_cache_takes_as_many_sets_as_fill_it_and_a_warm_one_takes_one() -> None:
    problem = Problem(AttentionConfig(64, value_head_dim=32, heads_per_kv=2), 8, 1024, 2048)
    size = (8 * 1024 * 64 + 4 * 2048 * (64 + 32)) * 2
    for cold_bytes, sets in ((5 * size, 5), (5 * size + 1, 6), (0, 3)):
        bench = Bench(problem, Policy(cold_bytes=cold_bytes, sets=3))
        assert len(bench.sets) == sets
        assert all(sum(x.nbytes for x in members(call)) == size for call in bench.sets)
        assert len({call[0].sum().item() for call in bench.sets}) == sets  # all different
    assert set_count(size, Policy(cache="warm")) == 1
    assert set_count(1024, Policy()) == 64  # in any cache, and the documentation says so
    warm = Bench(PROBLEM, Policy(cache="warm"), Clock())
    taken = []

    def run(q: mx.array, k: mx.array, v: mx.array, scale: float) -> tuple[mx.array, None]:
        taken.append(k)
        return q, None

    warm.run(run, 4)
    assert len(taken) == 4 and all(k is warm.sets[0][1] for k in taken)


def test_another_cache_than_cold_or_warm_is_refused() -> None:
    with pytest.raises(ArgumentError, match="cache: expected cold or warm, but got 'hot'"):
        Policy(cache="hot")


def test_a_beat_is_given_before_every_sample() -> None:
    clock, log = Clock(), []
    bench = Bench(PROBLEM, POLICY, clock, beat=lambda: log.append("beat"))
    bench.compare({"a": runner(clock, 1.0, log, "a")})
    assert log == ["beat", "a"] * 6


def test_a_comparison_goes_on_until_it_is_settled_or_the_time_is_over() -> None:
    clock = Clock()
    policy = dataclasses.replace(POLICY, most_rounds=9)
    rounds = []

    def settled(timings: dict[str, Timing]) -> bool:
        rounds.append(len(timings["a"].samples) // 2)
        return len(rounds) == 4

    runners = {"a": runner(clock, 1.0, [])}
    Bench(PROBLEM, policy, clock).compare(runners, settled)
    assert rounds == [2, 3, 4, 5]
    never = Bench(PROBLEM, policy, clock).compare(runners, lambda timings: False)
    assert len(never["a"].samples) == 18
    cut = Bench(PROBLEM, policy, clock)
    timings = cut.compare(runners, lambda timings: False, deadline=clock.now + 9.5)
    assert len(timings["a"].samples) == 8  # two to begin with, then rounds of two seconds


def test_arrays_have_the_shapes_of_the_bucket_and_unit_variance() -> None:
    problem = Problem(AttentionConfig(64, value_head_dim=32, heads_per_kv=3), 9, 50, 60)
    q, k, v, _ = arrays(problem, 0)
    assert (q.shape, k.shape, v.shape) == ((1, 15, 64, 64), (1, 5, 64, 64), (1, 5, 64, 32))
    assert q.dtype == mx.float16
    assert mx.std(q.astype(mx.float32)).item() == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (AttentionConfig(64, alibi=True, sinks=True), {"alibi_slopes": (4,), "sinks": (4,)}),
        (AttentionConfig(64, bias=True), {"bias": (1, 4, 16, 32)}),
        (
            AttentionConfig(64, page_size=16),
            {"kv_lens": (1,), "block_table": (1, 2)},
        ),
        (AttentionConfig(64, kv_bits=4, kv_group=32), {"k_scales": (1, 4, 32, 2)}),
    ],
)
def test_what_a_config_asks_for_beside_q_k_and_v_is_there_and_handed_over(
    config: AttentionConfig, names: dict[str, tuple[int, ...]]
) -> None:
    bench = Bench(Problem(config, 4, 16, 32), POLICY, Clock())
    seen = []

    def run(*call: Any) -> tuple[mx.array, None]:
        seen.append(call)
        return mx.zeros(1), None

    bench.run(run, 2)
    for n, (q, _, _, scale, inputs) in enumerate(seen):
        assert (q.shape, scale) == ((1, 4, 16, 64), 0.125)
        assert inputs is bench.sets[n][3]
        for name, shape in names.items():
            assert inputs.named[name].shape == shape


def test_mlx_races_where_it_computes_the_same() -> None:
    own = mlx_baseline(PROBLEM)
    assert own is not None
    q, k, v = (x.astype(mx.float32) for x in arrays(PROBLEM, 1)[:3])
    out, _ = own(q, k, v, 0.5)
    expected, _ = attention_float64(q, k, v, scale=0.5, causal=True)
    np.testing.assert_allclose(np.asarray(out), expected, atol=1e-5)


@pytest.mark.parametrize(
    "problem",
    [
        Problem(AttentionConfig(64, return_lse=True), 1, 16, 16),
        Problem(AttentionConfig(64, causal=True, window_left=7), 1, 16, 16),
        Problem(AttentionConfig(64, softcap=30.0), 1, 16, 16),
        Problem(AttentionConfig(64, alibi=True), 1, 16, 16),
        Problem(AttentionConfig(64, bias=True), 1, 16, 16),
        Problem(AttentionConfig(64, causal=True, array_mask=True), 1, 16, 16),
        Problem(AttentionConfig(64, page_size=16, kv_bits=8), 1, 16, 16),
        Problem(AttentionConfig(64, causal=True), 1, 32, 16),  # rows that see no key
    ],
)
def test_mlx_does_not_race_where_it_computes_something_else(problem: Problem) -> None:
    assert mlx_baseline(problem) is None


def test_a_real_device_can_be_measured_with_a_real_clock() -> None:
    policy = Policy(warmup_seconds=0.01, repetitions=3, sample_seconds=1e-4, sets=2, cold_bytes=0)
    config = PROBLEM.config
    plain = get_device("reference").build(config, default_schedule(config))
    timing = Bench(PROBLEM, policy).measure(plain)
    assert 3 <= len(timing.samples) <= 31
    assert all(sample > 0 for sample in timing.samples)


def test_the_median_of_seven_samples_lies_between_the_ranks_of_its_interval() -> None:
    # n/2 -+ 0.98 sqrt(7) = 0.9 to 6.1: samples of ranks 0 and 6.
    timing = Timing((4.0, 1.0, 2.0, 3.0, 5.0, 6.0, 7.0))
    assert timing.uncertainty == (7.0 - 1.0) / 2 / 4.0
    # n = 25: 12.5 -+ 4.9 = 7.6 to 17.4: ranks 7 and 17.
    many = Timing(tuple(float(n + 100) for n in range(25)))
    assert many.uncertainty == (117.0 - 107.0) / 2 / 112.0
    assert Timing((1.0,)).uncertainty == float("inf")


def test_outliers_are_counted_and_kept() -> None:
    timing = Timing((1.0, 1.1, 1.2, 1.3, 9.0))
    assert (timing.outliers, len(timing.samples)) == (1, 5)
    assert Timing((1.0, 1.1, 1.2, 1.3)).outliers == 0
    assert Timing((1.0, 9.0)).outliers == 0


def test_an_uncertain_median_gets_more_samples_and_a_certain_one_does_not() -> None:
    clock = Clock()
    policy = Policy(warmup_seconds=0.0, sample_seconds=1e-9, sets=1, cold_bytes=0, repetitions=5)
    problem = Problem(AttentionConfig(head_dim=8), 2, 16, 16)
    bench = Bench(problem, policy, clock)
    noise = itertools.cycle((0.0, 0.5))

    def steady(*_: object) -> tuple[mx.array, None]:
        clock.now += 1.0
        return mx.zeros(1), None

    def shaky(*_: object) -> tuple[mx.array, None]:
        clock.now += 1.0 + next(noise)
        return mx.zeros(1), None

    assert len(bench.measure(steady).samples) == 5
    assert len(bench.measure(shaky).samples) == 31


def test_what_is_never_launched_has_no_time() -> None:
    """A device that says nothing of it, as MLX's CUDA back end does."""

    def silent(*_: object) -> tuple[mx.array, None]:
        kernel = marking(lambda init_value=0.0: [mx.full((4,), init_value)])
        return kernel()[0], None

    bench = Bench(PROBLEM, POLICY, Clock())
    for attempt in (bench.measure, lambda run: bench.compare({"a": run})):
        with pytest.raises(RuntimeError, match="its first output: all of it is NaN, as where"):
            attempt(silent)  # type: ignore[operator]
    assert bench.run(silent) > 0.0  # later launches are not looked at
