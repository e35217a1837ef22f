"""What a sampler may know when it is asked: the same asks, however a run was cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from metalgen.database.measurement import Measurement
from metalgen.families import default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.search.finite import FiniteSpace
from metalgen.tuning.search.named import make_sampler
from metalgen.tuning.study.sampling import Sampling

POINTS = [{"a": a, "b": b, "c": c} for a in range(8) for b in range(8) for c in range(8)]
SPACE = FiniteSpace(dict.fromkeys("abc", range(8)), POINTS)
PROBLEM = Problem(AttentionConfig(64), 1, 16, 16)
START = 7 * 8  # (0, 7, 0)


def row(point: int, pruned: bool = False) -> Measurement:
    """The outcome of a point: two of its parameters 0 is a failure."""
    a, b, c = POINTS[point].values()
    seconds = 1.0 + abs(a - 5) + 0.5 * abs(b - 2) + 0.1 * abs(c - 6)
    fields: dict[str, Any] = {"status": "ok", "seconds": seconds}
    if (a, b) == (0, 0):
        fields = {"status": "runtime"}
    elif pruned:
        fields = {"status": "pruned", "seconds": seconds, "samples": (seconds, seconds)}
    schedule = default_schedule(PROBLEM.config)
    facts = ("0" * 16, "H200", 132, "cuda", "measured", "p")
    return Measurement(PROBLEM, schedule, *facts, **fields)


def sampling(late: int = 1, name: str = "finite-gp") -> Sampling:
    return Sampling(SPACE, make_sampler(name, SPACE, 3), {START}, late)


def search(asks: Sampling, goal: int, known: Sequence[int] = ()) -> list[int]:
    """Ask for all that may be asked, then tell one outcome, and so on; `known` have theirs."""
    asked, told = list(known), len(known)
    if not asked:
        asked.append(START)
    while told < goal:
        while len(asked) < goal:
            tried = [(point, row(point) if n < told else None) for n, point in enumerate(asked)]
            found = asks.ask(tried)
            if found is None:
                break
            asked.append(found)
        told += 1
    return asked


@pytest.mark.parametrize("name", ["finite-gp", "tpe", "optuna.samplers:RandomSampler"])
@pytest.mark.parametrize("late", [1, 4, 8])
def test_an_interrupted_search_goes_on_as_an_undisturbed_one(late: int, name: str) -> None:
    whole = search(sampling(late, name), 40)
    assert len(set(whole)) == 40
    for cut in (1, 7, 9, 23, 39):
        assert search(sampling(late, name), 40, whole[:cut]) == whole


def test_asks_do_not_depend_on_which_outcomes_came_early() -> None:
    eager, asks = search(sampling(6), 40), sampling(6)
    asked = [START]
    while len(asked) < 40:  # every outcome is there at once
        found = asks.ask([(point, row(point)) for point in asked])
        assert found is not None
        asked.append(found)
    assert asked == eager


def test_no_more_are_without_an_outcome_than_the_window_holds() -> None:
    asks = sampling(5)
    tried: list[tuple[int | None, Measurement | None]] = [(START, None)]
    for _ in range(4):
        found = asks.ask(tried)
        assert found is not None
        tried.append((found, None))
    assert asks.ask(tried) is None
    assert asks.ask([(START, row(START)), *tried[1:]]) is not None


def test_the_optimum_is_found_with_a_window_too() -> None:
    assert SPACE.index({"a": 5, "b": 2, "c": 6}) in search(sampling(8), 60)


def test_what_lies_outside_of_the_space_does_no_harm() -> None:
    asks = sampling()
    found = asks.ask([(None, row(0)), (START, row(START))])
    assert found not in (None, START)


def test_the_samplers_study_has_the_states_of_the_outcomes() -> None:
    asks = sampling()
    asks.ask([(START, row(START)), (0, row(0)), (9, row(9, pruned=True))])
    trials = asks.study.get_trials(deepcopy=False)
    assert [t.state for t in trials] == [
        *(TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED),
        TrialState.RUNNING,
    ]
    assert trials[2].intermediate_values == {0: row(9).seconds, 1: row(9).seconds}


def test_rows_of_another_search_are_learnt_from_and_not_asked_for_again() -> None:
    told = [START, *range(100, 130)]
    for name in ("finite-gp", "tpe"):
        asked = search(sampling(name=name), 60, told)
        assert asked[: len(told)] == told
        assert len(set(asked)) == 60


def test_where_workers_share_a_study_every_outcome_counts_at_once() -> None:
    asks = Sampling(SPACE, make_sampler("finite-gp", SPACE, 3), {START}, late=None)
    asked = [START, *range(100, 120)]
    found = asks.ask([(p, None if n == 0 else row(p)) for n, p in enumerate(asked)])
    assert found is not None and found not in asked
    states = {t.state for t in asks.study.get_trials(deepcopy=False)[1:-1]}
    assert states == {TrialState.COMPLETE}
    assert isinstance(asks.study, optuna.Study)
