"""Combinations of features, schedules and sizes, made up by Hypothesis.

A sample runs always; ``pytest -m slow tests/test_feature_fuzz.py -n 2`` runs 2,000 plain and 200
checked, the same ones each time.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from metalgen import simulator
from metalgen.devices import Device, all_devices
from metalgen.testing.fuzz import Case, cases, fault, hostile

SHARDS = 20


def made_up(device: Device, number: int, count: int, check: Callable[[Case], None]) -> None:
    """Run a check on `count` cases, the same ones for a number.

    The first that fails is shown and not made smaller: each attempt would compile a kernel.
    """

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases(device.limits))
    def run(case: Case) -> None:
        check(case)

    run()


def plain(device: Device) -> Callable[[Case], None]:
    def check(case: Case) -> None:
        found = fault(device, case)
        assert not found, f"{found}\n{case}"

    return check


def checked(device: Device) -> Callable[[Case], None]:
    """Right, without a race, out-of-bounds access or anything else that the simulator finds.

    With hostile numbers in tables and lengths, too, where no value is defined.
    """

    def check(case: Case) -> None:
        with simulator.record(checked=True, seed=1 + case.seed) as runs:
            found = fault(device, case)
        assert not found, f"{found}\n{case}"
        assert not (wrong := findings(runs)), f"{wrong}\n{case}"
        q, k, v, _ = case.call()
        runner = device.build(case.config, case.schedule, case.family)
        with simulator.record(checked=True) as runs:
            mx.eval(runner(q, k, v, 0.3, hostile(case, case.seed))[0])
        # Packed sequences that overlap are written by several threadgroups: anything, but in bounds.
        assert not (wrong := findings(runs, between_groups=False)), f"hostile: {wrong}\n{case}"

    return check


def findings(runs: simulator.Recorder, between_groups: bool = True) -> str:
    found = [finding for run in runs for finding in run.findings or ()]
    if not between_groups:
        found = [finding for finding in found if finding.kind != "race between threadgroups"]
    return "\n".join(map(str, found))


@pytest.fixture
def tested(device: str) -> Device:
    return {each.name: each for each in all_devices()}[device]


@pytest.mark.parametrize("shard", range(2))
def test_any_combination_is_right(tested: Device, shard: int) -> None:
    made_up(tested, 1000 + shard, 30, plain(tested))


def test_any_combination_passes_the_checker(tested: Device) -> None:
    if tested.name != "simulator":
        pytest.skip(f"{tested.name} has no checker")
    made_up(tested, 2000, 10, checked(tested))


@pytest.mark.parametrize("shard", range(10))
def test_plain_mlx_is_right_for_any_combination(shard: int) -> None:
    reference = {each.name: each for each in all_devices()}["reference"]
    made_up(reference, 3000 + shard, 30, plain(reference))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_two_thousand_combinations_are_right(tested: Device, shard: int) -> None:
    made_up(tested, shard, 2000 // SHARDS, plain(tested))


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(SHARDS))
def test_two_hundred_combinations_pass_the_checker(tested: Device, shard: int) -> None:
    if tested.name != "simulator":
        pytest.skip(f"{tested.name} has no checker")
    made_up(tested, 500 + shard, 200 // SHARDS, checked(tested))
