"""How near a search comes to the optimum of spaces that a GPU measured whole, and what is a space's
neighbour in that comparison."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path

import pytest

from benchmarks.search import AT, measure, neighbours, replay, starts, translated
from metalgen.families import Parameter
from metalgen.tuning.search.replay import Recording, read_recordings

FOLDER = Path(__file__).parents[2] / "benchmarks" / "spaces"
SPACES = read_recordings(FOLDER)
SEEDS = range(2)


def mean(results: list[list[float]], count: int) -> float:
    """The mean fraction of the optimum after `count` measurements."""
    return statistics.fmean(reached[AT.index(count)] for reached in results)


def test_a_cold_search_of_recorded_gpu_spaces_reaches_what_is_promised_and_more_than_chance() -> (
    None
):
    cold = [replay(space, "finite-gp", seed) for space in SPACES for seed in SEEDS]
    chance = [replay(space, "random", seed) for space in SPACES for seed in SEEDS]
    assert mean(cold, 50) >= 0.92
    assert mean(cold, 200) >= 0.98
    for count in (50, 100, 200):
        assert mean(cold, count) > mean(chance, count)


def test_a_search_that_starts_from_neighbouring_problems_reaches_what_is_promised() -> None:
    reached = []
    for space in SPACES:
        near = [(SPACES[n], SPACES[n].times) for n in neighbours(space, SPACES)]
        for seed in SEEDS if near else ():
            seen = measure(space, "finite-gp", seed, 25, starts(space, near))
            assert len(seen) == 25
            reached.append(space.best / min(t for t in seen.values() if t is not None))
    assert len(reached) == 6  # three forward problems; the one of decode has no neighbour
    assert statistics.fmean(reached) >= 0.95


def recording(group: str, device: str, family: str = "", width: int = 64) -> Recording:
    """Two entries of two parameters, one of which is fixed."""
    parameters = (Parameter("bk", (8, 16)), Parameter("bd", (width,)))
    return Recording(
        group, device, parameters, {(8, width): 1.0, (16, width): 2.0}, (8, width), family
    )


def test_neighbours_are_other_devices_and_failing_these_other_problems_of_the_family() -> None:
    spaces = [
        recording("conv", "A"), recording("conv", "B"), recording("gemm", "A"),
        recording("D64", "H", "forward"), recording("D128", "H", "forward", 128),
        recording("D64 decode", "H", "decode"), recording("D256", "G", "forward"),
    ]  # fmt: skip
    near = [neighbours(space, spaces) for space in spaces]
    assert near == [[1], [0], [], [4], [3], [], []]


def test_a_parameter_that_is_fixed_in_both_spaces_takes_the_value_it_has_there() -> None:
    narrow, wide = recording("D64", "H", "forward"), recording("D128", "H", "forward", 128)
    assert translated((16, 64), narrow, wide) == (16, 128)
    assert starts(wide, [(narrow, {(16, 64): 1.0, (8, 64): None})]) == ((16, 128),)


@pytest.mark.parametrize("sampler", ["random", "finite-gp"])
def test_a_point_that_failed_costs_a_measurement(sampler: str) -> None:
    space = recording("D64", "H")
    failing = dataclasses.replace(space, times={(8, 64): None, (16, 64): 2.0})
    assert replay(failing, sampler, 0) == [1.0] * len(AT)
    more = {(8 + n, 64): None for n in range(16)} | {(64, 64): 2.0}
    parameters = (Parameter("bk", (*range(8, 24), 64)), Parameter("bd", (64,)))
    late = dataclasses.replace(space, parameters=parameters, times=more)
    reached = [replay(late, sampler, seed) for seed in range(8)]
    assert {row[1] for row in reached} == {1.0}
    assert {row[0] for row in reached} == {0.0, 1.0}  # after 15 of 17 some have met the one
