"""Combinations of features, schedules and sizes, made up at random.

A sample runs always; ``pytest -m slow tests/test_feature_fuzz.py -n 2`` runs 2,000 plain and 200
checked, the same ones each time.
"""

from __future__ import annotations

from collections.abc import Iterable

import mlx.core as mx
import pytest

from metalgen import simulator
from metalgen.devices import Device, all_devices
from metalgen.errors import InvalidSchedule
from metalgen.families import APPLE
from metalgen.problem.config import AttentionConfig, field_names
from metalgen.simulator.errors import SimulatorError
from metalgen.testing.fuzz import Case, default_case, fault, hostile, made_up, smallest

SHARDS = 20


def plain(device: Device, case: Case) -> str:
    """What is wrong with a case's numbers."""
    try:
        return fault(device, case)
    except (
        InvalidSchedule
    ) as error:  # nearly all features at once: dispatch falls back, and says so
        return "" if error.rule == "buffers" else str(error)
    except SimulatorError as error:
        return str(error)


def checked(device: Device, case: Case) -> str:
    """What is wrong with a case's numbers, or what the simulator finds: a race, an access out of
    bounds or anything else; with hostile numbers in tables and lengths, where no value is defined,
    all but two writes of one place, for packed sequences may overlap then.
    """
    with simulator.record(checked=True, seed=1 + case.seed) as runs:
        found = plain(device, case)
    if found := found or findings(runs):
        return found
    q, k, v, _ = case.call()
    runner = device.build(case.config, case.schedule)
    with simulator.record(checked=True) as runs:
        mx.eval(runner(q, k, v, 0.3, hostile(case, case.seed))[0])
    found = findings(runs, between_groups=False)
    return f"hostile: {found}" if found else ""


def findings(runs: simulator.Recorder, between_groups: bool = True) -> str:
    found = [finding for run in runs for finding in run.findings or ()]
    if not between_groups:
        found = [finding for finding in found if finding.kind != "race between threadgroups"]
    return "\n".join(map(str, found))


def run_plain(device: Device, numbers: Iterable[int]) -> None:
    for number in numbers:
        case = made_up(number, device.limits)
        if found := plain(device, case):
            case = smallest(case, lambda each: bool(plain(device, each)))
            pytest.fail(f"case {number}: {found}\nthe smallest: {plain(device, case)}\n{case}")


def run_checked(device: Device, numbers: Iterable[int]) -> None:
    if device.name != "simulator":
        pytest.skip(f"{device.name} has no checker")
    for number in numbers:
        case = made_up(number, device.limits, small=True)
        if found := checked(device, case):
            pytest.fail(f"case {number}: {found}\n{case}")


@pytest.fixture
def tested(device: str) -> Device:
    return {each.name: each for each in all_devices()}[device]


@pytest.mark.parametrize("shard", range(2))
def test_any_combination_is_right(tested: Device, shard: int) -> None:
    run_plain(tested, range(10_000 + 30 * shard, 10_030 + 30 * shard))


def test_any_combination_passes_the_checker(tested: Device) -> None:
    run_checked(tested, range(20_000, 20_010))


def test_plain_mlx_is_right_for_any_combination() -> None:
    reference = {each.name: each for each in all_devices()}["reference"]
    run_plain(reference, range(30_000, 30_300))


def test_combinations_are_different_and_have_everything() -> None:
    cases = [made_up(number, APPLE) for number in range(2000)]
    assert len({(case.config, case.schedule, case.family) for case in cases}) > 1950
    used = [name for case in cases for name in case.config.to_dict()]
    rare = {name for name in field_names() if used.count(name) <= 50}
    assert rare <= {"tf32"}  # which says how exact, and not what
    assert {case.family for case in cases} == {"forward", "decode"}
    assert str(made_up(7, APPLE)) == str(made_up(7, APPLE))


def test_a_failure_is_made_smaller() -> None:
    """Here whatever has sinks and three keys or more fails."""
    config = AttentionConfig(
        64, "float32", sinks=True, alibi=True, causal=True, page_size=8, dropout=0.2
    )
    case = default_case(config, APPLE, "decode", kv_len=100)
    least = smallest(case, lambda each: each.config.sinks and each.kv_len >= 3)
    assert least.config == AttentionConfig(64, sinks=True)
    assert (least.batch, least.kv_heads, least.q_len, least.kv_len) == (1, 1, 0, 3)
    assert least.schedule.partials == 1


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_two_thousand_combinations_are_right(tested: Device, shard: int) -> None:
    run_plain(tested, range(shard, 2000, SHARDS))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_two_hundred_combinations_pass_the_checker(tested: Device, shard: int) -> None:
    run_checked(tested, range(2000 + shard, 2200, SHARDS))
