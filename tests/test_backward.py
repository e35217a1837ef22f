"""Backward kernels on the simulator."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import mlx.core as mx
import pytest

from metalgen import simulator
from metalgen.calls.verify import relative_error
from metalgen.calls.verify_gradients import (
    GRADIENT_TOLERANCE,
    allowed_error,
    cotangents_of,
    exact_gradients,
)
from metalgen.devices import get_device
from metalgen.families import APPLE, Schedule, default_schedule, is_valid
from metalgen.families.backward import backward_config, backward_families, made_by, unsupported
from metalgen.problem.config import AttentionConfig
from metalgen.problem.samples import Call, sample_call
from metalgen.simulator.counters import Counters
from metalgen.testing.backward import BackwardConformance
from metalgen.testing.fuzz import made_up


class TestSimulator(BackwardConformance):
    name = "simulator"


def fuzzed(number: int) -> tuple[AttentionConfig, Call, tuple[Schedule, ...]] | None:
    """The combination of that number: any features and sizes, and schedules of any knobs."""
    made = made_up(number, APPLE, small=True)
    config = made.config
    bare = backward_config(config)
    if unsupported(bare):
        return None
    random = Random(number)
    found = []
    for family in backward_families(bare):
        base = default_schedule(bare, APPLE, family.name)
        knobs = {n: k for n, k in base.knobs.items() if n not in ("bq", "bd", "math_mode")}
        while True:
            values = {n: random.choice(k.candidates(bare, APPLE)) for n, k in knobs.items()}
            values |= {"row_blocks": random.choice((1, 2)), "simdgroups": random.choice((1, 2))}
            values |= {"bk": random.choice((8, 16, 32)), "bd": random.choice((8, 16, base.bd))}
            rows = 8 * values["row_blocks"] * values["simdgroups"]
            schedule = replace(base, **values, bq=rows)
            if is_valid(bare, schedule, APPLE):
                found.append(schedule)
                break
    return config, made.call(), tuple(found)


def check_fuzzed(number: int, *, checked: bool) -> bool:
    """Whether there is such a combination; its gradients are right, and nothing is found."""
    if (case := fuzzed(number)) is None:
        return False
    config, call, schedules = case
    scale = 0.25
    results, cotangents = cotangents_of(config, call, scale, number)
    run = get_device("simulator").build_gradients(config, schedules)
    with simulator.record(checked=checked) as runs:
        found = run(*call[:3], results, cotangents, scale, call[3])
        mx.eval(found)
    for each in runs:
        assert not each.findings, f"{number}: {each.findings.report()}"
    exact = exact_gradients(config, call, cotangents, scale)
    names = [name[1] for schedule in schedules for name in made_by(schedule)]
    for name, array in zip(names, found, strict=True):
        error = relative_error(array, exact[name])
        if error > GRADIENT_TOLERANCE[config.dtype]:
            allowed = allowed_error(config, call, results, cotangents, scale, exact, name)
            assert error <= allowed, f"{number}: {name} {error} {config} {schedules}"
    return True


@pytest.mark.parametrize("number", [*range(10), 71, 223])
def test_combinations_of_features_and_schedules(number: int) -> None:
    """Some bring pages, quantized keys or wide heads, which have no backward kernels. In 71 and 223
    a sequence begins behind its last key, beside a block mask."""
    check_fuzzed(number, checked=number < 6)


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 1600, 100))
def test_many_combinations_of_features_and_schedules(start: int) -> None:
    """Some 1,000 of 1,600; each eighth in the simulator's checker."""
    done = sum(check_fuzzed(n, checked=n % 8 == 0) for n in range(start, start + 100))
    assert done > 40


def counted(config: AttentionConfig, length: int) -> list[Counters]:
    """What the kernels of both families do for a call of so many queries and keys."""
    call = sample_call(config, q_len=length, kv_len=length, kv_heads=1, ragged=False)
    results, cotangents = cotangents_of(config, call, 0.25, 1)
    bare = backward_config(config)
    schedules = tuple(
        default_schedule(bare, APPLE, family) for family in ("backward_rows", "backward_keys")
    )
    run = get_device("simulator").build_gradients(config, schedules)
    with simulator.record(checked=True) as runs:
        mx.eval(run(*call[:3], results, cotangents, 0.25, call[3]))
    assert all(not each.findings for each in runs)
    return [each.counters for each in runs]


def test_bytes_grow_with_the_length_and_products_with_its_square() -> None:
    config = AttentionConfig(16, "float16", softcap=20.0)
    small, large = counted(config, 64), counted(config, 128)
    for one, two in zip(small, large, strict=True):
        for few, many in zip(one.buffers, two.buffers, strict=True):
            assert few.atomics == many.atomics == 0
            if few.name.startswith(("scale", "bias")):
                continue
            assert many.distinct_read <= 2 * few.distinct_read
            assert many.distinct_written == 2 * few.distinct_written
        assert two.multiply_accumulates == 4 * one.multiply_accumulates
    tiles = (64 // 8) ** 2 * (16 // 8)  # 8x8x8 products of Q K^T
    assert [each.multiply_accumulates // tiles for each in small] == [3, 4]


def test_masked_blocks_cost_no_products() -> None:
    whole = counted(AttentionConfig(16, "float16"), 256)
    window = counted(AttentionConfig(16, "float16", causal=True, window_left=31), 256)
    for all_of, some in zip(whole, window, strict=True):
        assert some.multiply_accumulates < 0.4 * all_of.multiply_accumulates
