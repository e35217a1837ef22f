"""Samplers of a space of known points: which they ask for, in which order, and what they learn."""

from __future__ import annotations

import itertools
import math
import random
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.trial import TrialState, create_trial
from tuning_fakes import cost

from metalgen.errors import ArgumentError
from metalgen.families import space
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.search import named, samplers
from metalgen.tuning.search.candidates import candidates
from metalgen.tuning.search.finite import FiniteSpace, distribution
from metalgen.tuning.search.named import SAMPLERS, make_sampler
from metalgen.tuning.search.samplers import FiniteGPSampler, RestrictedSampler, UniformSampler

INSTALLED = [
    pytest.param(
        name,
        marks=[
            pytest.mark.skipif(
                named.importlib.util.find_spec(package) is None, reason=f"needs {package}"
            )
            for package in named.NEEDS.get(name, ())
        ],
    )
    for name in SAMPLERS
]
CONFIG = AttentionConfig(head_dim=64)
BOWL = FiniteSpace(
    {"x": range(20), "y": range(20)}, [{"x": x, "y": y} for x in range(20) for y in range(20)]
)


def bowl(point: dict[str, Any]) -> float:
    """A smooth bowl with its least, 1, at (13, 6)."""
    return 1.0 + 0.01 * (point["x"] - 13) ** 2 + 0.02 * (point["y"] - 6) ** 2


def run(
    where: FiniteSpace,
    sampler: BaseSampler,
    count: int,
    value: Callable[[dict[str, Any]], float | None] = bowl,
    study: optuna.Study | None = None,
) -> list[int]:
    """Ask `count` times, telling each value; None is a failure. Returns the numbers of points."""
    study = study or optuna.create_study(sampler=sampler)
    asked = []
    for _ in range(count):
        trial = study.ask()
        point = where.suggest(trial)
        assert trial.params == where.points[point]
        asked.append(point)
        found = value(where.points[point])
        study.tell(trial, found, TrialState.FAIL if found is None else None)
    return asked


@pytest.mark.parametrize("name", INSTALLED)
def test_every_sampler_tries_each_valid_point_once(name: str) -> None:
    diagonal = FiniteSpace(
        {"x": (1, 2, 4, 8), "y": ("a", "b", "c"), "z": (1, 2)},
        [
            {"x": x, "y": y} | ({"z": z} if y == "b" else {})
            for x, y, z in itertools.product((1, 2, 4, 8), "abc", (1, 2))
            if x < 8 and (y == "b" or z == 1)
        ],
    )
    asked = run(diagonal, make_sampler(name, diagonal, 3), 12, lambda p: float(p["x"]))
    assert sorted(asked) == list(range(len(diagonal)))


@pytest.mark.parametrize("name", ["finite-gp", "tpe"])
def test_a_seed_gives_the_same_points_and_another_seed_others(name: str) -> None:
    first, again, other = (run(BOWL, make_sampler(name, BOWL, seed), 25) for seed in (1, 1, 2))
    assert first == again != other


def test_the_gaussian_process_finds_the_bottom_of_a_bowl_in_forty_measurements() -> None:
    for seed in range(3):
        asked = run(BOWL, FiniteGPSampler(BOWL, seed=seed), 40)
        assert BOWL.index({"x": 13, "y": 6}) in asked


def test_it_finds_the_top_where_more_is_better_and_where_values_are_negative() -> None:
    for direction, value in (("maximize", lambda p: -bowl(p)), ("minimize", lambda p: bowl(p) - 3)):
        sampler = FiniteGPSampler(BOWL, seed=0)
        study = optuna.create_study(direction=direction, sampler=sampler)
        run(BOWL, sampler, 40, value, study)
        assert study.best_params == {"x": 13, "y": 6}


def test_it_finds_better_schedules_than_chance() -> None:
    known = candidates(CONFIG)
    times = [cost(schedule) for schedule in known.schedules]

    def by_cost(point: dict[str, Any]) -> float:
        number = known.finite.index(point)
        assert number is not None
        return times[number]

    guided, chance = [], []
    for seed in range(2):
        sampler = FiniteGPSampler(known.finite, seed=seed)
        asked = run(known.finite, sampler, 50, by_cost)
        guided.append(min(times[n] for n in asked))
        chance.append(min(random.Random(seed).sample(times, 50)))
    assert sum(guided) < sum(chance)


@pytest.mark.parametrize(("large", "rows"), [(120, 400), (400, 24), (120, 24)])
def test_in_a_large_space_and_with_many_outcomes_it_still_goes_on_as_it_would(
    monkeypatch: pytest.MonkeyPatch, large: int, rows: int
) -> None:
    monkeypatch.setattr(samplers, "LARGE", large)
    monkeypatch.setattr(samplers, "ROWS", rows)
    whole = run(BOWL, FiniteGPSampler(BOWL, seed=1), 70)
    assert len(set(whole)) == 70
    assert BOWL.index({"x": 13, "y": 6}) in whole
    for stop in (9, 23, 41, 69):
        study = optuna.create_study(sampler=FiniteGPSampler(BOWL, seed=1))
        study.add_trials(trial_of(point) for point in whole[:stop])
        assert run(BOWL, study.sampler, 70 - stop, study=study) == whole[stop:]


def trial_of(point: int, state: TrialState = TrialState.COMPLETE) -> optuna.trial.FrozenTrial:
    """A trial of a point of the bowl."""
    params = BOWL.points[point]
    return create_trial(
        state=state,
        params=params,
        distributions=dict(BOWL.distributions),
        value=bowl(params) if state == TrialState.COMPLETE else None,
    )


def test_trials_that_run_or_wait_are_not_asked_for_again_and_those_that_run_count_as_median() -> (
    None
):
    study = optuna.create_study(sampler=FiniteGPSampler(BOWL, seed=5))
    assert BOWL.index({"x": 13, "y": 6}) not in run(BOWL, study.sampler, 9, study=study)
    best = BOWL.index({"x": 13, "y": 6})
    assert best is not None
    study.enqueue_trial(BOWL.points[best])  # what it would ask for before long
    asked, trials = [], []
    waiting = study.ask()
    for _ in range(30):
        trials.append(study.ask())
        asked.append(BOWL.suggest(trials[-1]))
    assert len(set(asked)) == 30
    assert best not in asked
    assert BOWL.suggest(waiting) == best
    known = samplers.history(study, trials[-1]._get_latest_trial(), BOWL)
    assert (len(known.costs), len(known.pending)) == (9, 30)
    # Spread out, rather than around the best point so far.
    apart = [np.abs(BOWL.scaled[a] - BOWL.scaled[b]).sum() for a in asked for b in asked if a != b]
    assert np.mean(apart) > 0.3


def test_a_pruned_trial_counts_with_what_it_reported_and_a_failed_one_as_the_slowest() -> None:
    study = optuna.create_study(sampler=FiniteGPSampler(BOWL, seed=0))
    for point, values in ((3, [2.0, 8.0, 5.0]), (4, []), (5, [1.0])):
        study.add_trial(
            create_trial(
                state=TrialState.PRUNED if values else TrialState.FAIL,
                params=BOWL.points[point],
                distributions=dict(BOWL.distributions),
                intermediate_values=dict(enumerate(values)),
            )
        )
    known = samplers.history(study, study.ask()._get_latest_trial(), BOWL)
    assert known.costs == {3: 5.0, 4: math.inf, 5: 1.0}


def test_another_sampler_is_given_the_nearest_valid_point_that_was_not_tried() -> None:
    sparse = FiniteSpace(
        {"k": (1, 2, 4, 8), "m": ("a", "b")},
        [{"k": 1, "m": "a"}, {"k": 8, "m": "a"}, {"k": 4, "m": "b"}],
    )
    every = np.ones(3, dtype=bool)
    assert sparse.nearest({"k": 1, "m": "a"}, every).tolist() == [0]
    assert sparse.nearest({"k": 4, "m": "a"}, every).tolist() == [1]  # a category counts for more
    assert sparse.nearest({"k": 6, "m": "b"}, every).tolist() == [2]
    assert sparse.nearest({"k": 1, "m": "a"}, np.array([False, True, True])).tolist() == [1]


def test_distributions_say_the_order_of_choices_where_they_can() -> None:
    assert distribution((1, 2, 3)) == IntDistribution(1, 3)
    assert distribution((8, 16, 24)) == IntDistribution(8, 24, step=8)
    assert distribution((1, 2, 4, 8)) == IntDistribution(1, 8, log=True)
    assert distribution((16, 32, 48, 64, 96)) == IntDistribution(16, 96, log=True)
    assert distribution((0, 1, 4)) == CategoricalDistribution((0, 1, 4))
    assert distribution(("device", "threadgroup")) == CategoricalDistribution(
        ("device", "threadgroup")
    )
    assert distribution((False, True)) == CategoricalDistribution((False, True))


def test_the_points_of_schedules_have_what_is_free_in_them_and_are_found_again() -> None:
    known = candidates(CONFIG)
    declared = space(CONFIG)
    assert known.default == known.schedules[0]
    for number in range(0, len(known.schedules), 211):
        schedule = known.schedules[number]
        point = declared.point(schedule)
        assert point is not None
        params = known.finite.points[number]
        assert params.items() <= point.items()
        assert known.finite.index(params) == number == known.index[schedule]
        staged = "threadgroup" in (schedule.k_source, schedule.v_source)
        assert ("buffers" in params) == staged


@pytest.mark.parametrize(
    "points", [[], [{"x": 1}, {"x": 1}], [{"x": 3}]], ids=["none", "twice", "no choice"]
)
def test_points_that_make_no_space_are_refused(points: list[dict[str, int]]) -> None:
    with pytest.raises(ValueError, match="points: "):
        FiniteSpace({"x": (1, 2)}, points)


def test_a_sampler_that_suggests_no_valid_point_is_told_so() -> None:
    corner = FiniteSpace({"x": (1, 2), "y": (1, 2)}, [{"x": 1, "y": 2}, {"x": 2, "y": 1}])
    study = optuna.create_study()
    study.enqueue_trial({"x": 1, "y": 1})
    with pytest.raises(ValueError, match="no valid point"):
        corner.suggest(study.ask())


def test_a_class_of_ones_own_is_imported_restricted_and_given_the_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = """
        from optuna.samplers import RandomSampler
        class Mine(RandomSampler):
            def __init__(self, seed=None):
                self.given = seed
                super().__init__(seed)
        class Bare(RandomSampler):
            def __init__(self):
                super().__init__(0)
        other = 3
    """
    (tmp_path / "my_samplers.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    mine = make_sampler("my_samplers:Mine", BOWL, 7)
    assert isinstance(mine, RestrictedSampler)
    assert mine.sampler.given == 7
    assert len(set(run(BOWL, mine, 30))) == 30
    assert len(set(run(BOWL, make_sampler("my_samplers:Bare", BOWL, 7), 30))) == 30
    for name, expected in (
        ("my_samplers:other", "a subclass of optuna.samplers.BaseSampler"),
        ("my_samplers:missing", "a class that can be imported"),
        ("no_such_module:X", "a class that can be imported"),
        ("tpee", "did you mean tpe"),
    ):
        with pytest.raises(ArgumentError, match=f"sampler: expected .*{expected}"):
            make_sampler(name, BOWL, 0)
    sys.modules.pop("my_samplers")


def test_the_samplers_of_the_documentation_do_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "tuning.md").read_text()
    alone, own = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    exec(alone, {})  # it asserts what it finds
    (tmp_path / "annealing.py").write_text(own)
    monkeypatch.syspath_prepend(tmp_path)
    asked = run(BOWL, make_sampler("annealing:Annealing", BOWL, 0), 40)
    assert len(set(asked)) == 40
    sys.modules.pop("annealing")


def test_a_sampler_that_needs_a_missing_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(named, "NEEDS", {"tpe": ("no_such_package",)})
    with pytest.raises(ArgumentError, match="the package no_such_package, which 'tpe' needs"):
        make_sampler("tpe", BOWL, 0)


def test_when_every_point_was_tried_points_come_again() -> None:
    few = FiniteSpace({"x": (1, 2)}, [{"x": 1}, {"x": 2}])
    asked = run(few, UniformSampler(few, seed=0), 6, lambda p: 1.0)
    assert set(asked[:2]) == set(asked) == {0, 1}
