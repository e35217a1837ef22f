"""The chip model: its arithmetic by hand, its units, its bounds, and what it prefers."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest

from metalgen.chips import Chip, IncompleteChip, all_chips, get_chip
from metalgen.chips.coefficients import Coefficients
from metalgen.chips.model import estimate, predict, predict_sizes, resident_groups
from metalgen.chips.work import Work, combine_work
from metalgen.families import Schedule, default_schedule, enumerate_valid
from metalgen.families.counts import combine_counts, forward_counts, pass_sums
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

M1_MAX, M3_MAX = get_chip("M1Max"), get_chip("M3Max")
APPLE = [chip for chip in all_chips() if chip.kind == "apple"]

# Nothing but products: every penalty is off.
IDEAL = Coefficients(
    leak=0.0, saturation=0.0, fetch=0.0, launch=0.0, matrix=16.0, barrier=0.0, in_step=0.0
)

PRODUCTS = Work(
    groups=32 * 64,
    simdgroups=4,
    registers=100,
    threadgroup_memory=1024,
    products=1e9,
    exponentials=0.0,
    shuffles=0.0,
    moves=0.0,
    arithmetic=0.0,
    wide=False,
    spill_uses=0.0,
    array=0,
    reloads=0.0,
    paged=0.0,
    loop=100.0,
    on_core_bytes=0.0,
    direct_bytes=0.0,
    other_bytes=0.0,
    distinct_bytes=0.0,
    reused_bytes=1024.0,
    heads=32,
    slices=0.0,
    reads=0.0,
    two_buffers=False,
    masked=0.0,
    longest=1.0,
)


def test_products_alone_run_at_the_peak_of_the_chip() -> None:
    assert M1_MAX.fp16_tflops is not None
    seconds = estimate(PRODUCTS, M1_MAX, IDEAL).seconds
    assert 1e9 * 512 * 2 / seconds / 1e12 == pytest.approx(M1_MAX.fp16_tflops)


@pytest.mark.parametrize(
    ("change", "part", "seconds"),
    [
        # 1e9 instructions on 32 cores of 4 schedulers at 1.296 GHz.
        ({"arithmetic": 1e9}, "arithmetic", 17e9 / (32 * 4 * 1.296e9)),
        ({"shuffles": 1e9}, "arithmetic", 18e9 / (32 * 4 * 1.296e9)),
        ({"exponentials": 1e9}, "exp2", 4e9 / (32 * 4 * 1.296e9)),
        ({"moves": 1e9}, "slots", 2e9 / (32 * 4 * 1.296e9)),
        ({"on_core_bytes": 1e12}, "on_core", 1e12 / (32 * 64 * 1.296e9)),
        ({"other_bytes": 1e12}, "l2", 1e12 / (32 * 32 * 1.296e9)),
        ({"other_bytes": 1e12, "distinct_bytes": 1e12}, "slc", 1e12 / (32 * 17.5 * 1.296e9)),
        ({"other_bytes": 1e12, "distinct_bytes": 1e12}, "dram", 1e12 / (0.8 * 400e9)),
    ],
)
def test_each_resource_is_busy_for_as_long_as_by_hand(
    change: dict[str, float], part: str, seconds: float
) -> None:
    work = PRODUCTS._replace(**change)  # type: ignore[arg-type]
    assert estimate(work, M1_MAX, IDEAL).parts[part] == pytest.approx(seconds)


def test_the_busiest_resource_sets_the_time_and_the_others_leak_into_it() -> None:
    work = PRODUCTS._replace(on_core_bytes=1e10)
    alone = estimate(work, M1_MAX, IDEAL)
    leaky = estimate(work, M1_MAX, IDEAL._replace(leak=0.1))
    others = alone.parts["on_core"] + alone.parts["slots"]
    assert alone.seconds == pytest.approx(alone.parts["arithmetic"])
    assert leaky.seconds == pytest.approx(alone.seconds + 0.1 * others)


def test_few_simdgroups_leave_schedulers_idle_but_not_the_memory() -> None:
    sets = IDEAL._replace(saturation=0.5)
    one = PRODUCTS._replace(groups=32, simdgroups=1, heads=1)  # one simdgroup for four schedulers
    alone = estimate(one, M1_MAX, sets).seconds
    # 100 registers of a simdgroup are 6400 of 208 Ki bytes.
    few = 0.5 / (6400 / (208 * 1024))
    assert alone == pytest.approx(1e9 * 16 * few / (32 * 4 * 1.296e9), rel=1e-3)
    bytes_of_ten = 10 * 0.8 * 400e9 * 1e9 * 16 / (32 * 4 * 1.296e9)  # ten times as long as products
    moving = one._replace(other_bytes=bytes_of_ten, distinct_bytes=bytes_of_ten)
    got = estimate(moving, M1_MAX, sets)
    beyond = got.parts["dram"] - got.parts["arithmetic"]
    assert got.seconds == pytest.approx(beyond + got.parts["arithmetic"] * few, rel=1e-3)


def test_float32_operands_take_their_own_time() -> None:
    wide = estimate(PRODUCTS._replace(wide=True), M1_MAX, IDEAL._replace(matrix_wide=16.0))
    assert wide.seconds == pytest.approx(2 * estimate(PRODUCTS, M1_MAX, IDEAL).seconds)


def test_a_core_with_one_group_more_than_the_others_is_waited_for() -> None:
    one = estimate(PRODUCTS._replace(groups=32, products=1e6), M1_MAX, IDEAL).seconds
    two = estimate(PRODUCTS._replace(groups=33, products=1e6 * 33 / 32), M1_MAX, IDEAL).seconds
    assert two == pytest.approx(2 * one)


def test_registers_that_do_not_fit_are_paid_for_at_each_use() -> None:
    fits = PRODUCTS._replace(registers=256, spill_uses=1e6)
    over = fits._replace(registers=266)
    extra = estimate(over, M1_MAX, IDEAL).seconds - estimate(fits, M1_MAX, IDEAL).seconds
    # 10 registers of 12 simdgroups (208 KiB hold 3 groups) fit beside what the core is near to,
    # 8 KiB of its own and 16 of the L2.
    bytes_a_core = 10 * 64 * 1e6 / 32
    assert extra == pytest.approx(bytes_a_core / 64 / 1.296e9)
    many = estimate(fits._replace(registers=256 + 64), M1_MAX, IDEAL).parts["spill"]
    near = 24 / 48  # of 64 registers of 12 simdgroups
    cycles = 64 * 64 * 1e6 / 32 * (near / 64 + (1 - near) / 17.5)
    assert many == pytest.approx(cycles / 1.296e9)


def test_values_in_memory_push_each_other_out_where_registers_are_dynamic() -> None:
    # 24 groups of 4 simdgroups, which are 3072 threads, share 64 KiB of a core.
    work = PRODUCTS._replace(registers=40, array=20, reloads=1e6)
    cycles = 1e6 * 64 / 40
    held = 24 * 4 * 20 * 64
    near = (65536 / held) ** 2
    expected = cycles * (near / 64 + (1 - near) / 4.0) / 1.38e9
    assert estimate(work, M3_MAX, IDEAL).parts["spill"] == pytest.approx(expected)
    assert estimate(work._replace(array=1), M3_MAX, IDEAL).parts["spill"] == pytest.approx(
        cycles / 64 / 1.38e9
    )


def test_simdgroups_that_meet_at_no_barrier_find_less_in_the_cache() -> None:
    work = PRODUCTS._replace(direct_bytes=1e12)
    sets = IDEAL._replace(in_step=0.5, adrift=0.25)
    meeting = work._replace(slices=1e-9)
    alike = 1 - 1 / (4 * 1.6)  # 64 groups of a head on 40 cores, of 4 simdgroups
    for one, hits in ((work, 0.25), (meeting, 0.5)):
        seconds = 1e12 * (1 - hits * alike) / (40 * 32 * 1.38e9)
        assert estimate(one, M3_MAX, sets).parts["l2"] == pytest.approx(seconds)


def test_a_staged_slice_is_waited_for_in_full_when_a_core_holds_one_group() -> None:
    work = PRODUCTS._replace(simdgroups=8, registers=220, slices=64_000.0)  # 220 * 64 * 8: one fits
    # 2000 slices a core, 300 cycles each.
    assert estimate(work, M1_MAX, IDEAL).parts["wait"] == pytest.approx(2000 * 300 / 1.296e9)
    several = work._replace(simdgroups=4)
    assert estimate(several, M1_MAX, IDEAL).parts["wait"] < 2000 * 300 / 1.296e9 / 10


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 100, 7), (32, 1, 4096), (64, 2048, 2048)])
def test_every_valid_schedule_has_a_finite_time_on_every_apple_chip(
    dtype: str, sizes: tuple[int, int, int]
) -> None:
    batch_heads, q_len, kv_len = sizes
    config = AttentionConfig(72, dtype, value_head_dim=40, causal=True, return_lse=True)
    for index, schedule in enumerate(enumerate_valid(config)):
        chip = APPLE[index % len(APPLE)]
        got = predict_sizes(
            config, schedule, chip, batch_heads=batch_heads, q_len=q_len, kv_len=kv_len
        )
        assert math.isfinite(got.seconds)
        assert got.seconds > got.parts["launch"] > 0
        assert all(math.isfinite(part) and part >= 0 for part in got.parts.values())


def test_a_core_holds_what_registers_and_threadgroup_memory_allow() -> None:
    config = AttentionConfig(64)
    schedule = default_schedule(config)  # 213 half-registers, 4 simdgroups, 4608 bytes
    assert resident_groups(config, schedule, M1_MAX) == 208 * 1024 // (213 * 64 * 4) == 3
    # A quarter of the registers is live where they are handed out as needed: memory bounds it.
    assert resident_groups(config, schedule, M3_MAX) == 64 * 1024 // 4608 == 14


def test_a_problem_is_predicted_at_its_buckets() -> None:
    config = AttentionConfig(64)
    schedule = default_schedule(config)
    got = predict(Problem(config, 30, 1000, 1000), schedule, M3_MAX)
    assert got == predict_sizes(config, schedule, M3_MAX, batch_heads=32, q_len=1024, kv_len=1024)


def test_decode_reads_its_keys_once_from_memory_and_joins_its_splits() -> None:
    config = AttentionConfig(128, heads_per_kv=4)
    schedule = default_schedule(config, family="decode")
    problem = Problem(config, 32, 1, 32768, family="decode")
    got = predict(problem, schedule, M3_MAX)
    keys_and_values = 2 * 8 * 32768 * 128 * 2  # 8 KV heads
    assert got.parts["dram"] == pytest.approx(keys_and_values / (0.8 * 400e9), rel=0.01)
    # A launch of its own, which reads the float32 outputs, exponents and sums of all splits.
    counts = combine_counts(config, schedule, batch_heads=32, q_len=1)
    assert counts.parts_read == 32 * schedule.splits * 128 * 4
    work = combine_work(config, schedule, counts)
    assert work.distinct_bytes == 32 * (schedule.splits * (128 + 2) * 4 + 128 * 2)
    assert work.groups * work.simdgroups * 32 == 32 * 128
    assert got.parts["combine"] == estimate(work, M3_MAX).seconds > got.parts["launch"]
    assert got.seconds > got.parts["dram"] + got.parts["combine"]
    windowed = dataclasses.replace(config, window_left=1023)
    short = predict(dataclasses.replace(problem, config=windowed), schedule, M3_MAX)
    assert short.parts["dram"] < got.parts["dram"] / 16


def test_more_cores_are_faster() -> None:
    problem = Problem(AttentionConfig(128), 32, 4096, 4096)
    schedule = default_schedule(problem.config)
    names = ("M3", "M3Pro-14", "M3Pro", "M3Max-30", "M3Max", "M3Ultra-60", "M3Ultra")
    times = [predict(problem, schedule, get_chip(name)).seconds for name in names]
    assert times == sorted(times, reverse=True)


def test_chips_that_the_model_does_not_cover_are_refused_by_name() -> None:
    problem = Problem(AttentionConfig(128), 32, 4096, 4096)
    schedule = default_schedule(problem.config)
    with pytest.raises(IncompleteChip, match="H200"):
        predict(problem, schedule, get_chip("H200"))
    bare = dataclasses.replace(M1_MAX, name="M1Bare", l2_bytes=None, clock_ghz=None)
    with pytest.raises(IncompleteChip) as raised:
        predict(problem, schedule, bare)
    assert raised.value.missing == ("clock_ghz", "l2_bytes")


def _mlx_device_read(head_dim: int, batch_heads: int, length: int) -> int:
    """Bytes that MLX's own kernel reads from device memory: 32 rows share each key and value."""
    keys = pass_sums(length, length, 32, 32 if head_dim < 128 else 16, None, 0)[1]
    return batch_heads * (2 * keys + length) * head_dim * 2


@pytest.mark.parametrize("chip", [M1_MAX, M3_MAX], ids=str)
@pytest.mark.parametrize(("head_dim", "most"), [(64, 72), (128, 136)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_the_model_picks_moves_less_than_mlx_does(
    chip: Chip, head_dim: int, most: int, dtype: str
) -> None:
    config = AttentionConfig(head_dim, dtype, causal=True)
    schedules = enumerate_valid(config)
    for batch_heads, length in itertools.product((16, 32), (1024, 2048, 4096)):
        problem = Problem(config, batch_heads, length, length)

        def seconds(schedule: Schedule, problem: Problem = problem) -> float:
            return predict(problem, schedule, chip).seconds

        best = min(schedules, key=seconds)
        counts = forward_counts(config, best, batch_heads=batch_heads, q_len=length, kv_len=length)
        assert counts.threadgroup_read <= most * counts.multiply_accumulates, best
        assert counts.device_read <= _mlx_device_read(head_dim, batch_heads, length), best
        assert best.fragment == "input"
