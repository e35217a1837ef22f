"""The order in which a search asks, and that an interrupted one goes on as if it never was."""

from __future__ import annotations

import random

import pytest
from tuning_fakes import cost

from metalgen.chips import get_chip
from metalgen.chips.model import predict
from metalgen.errors import ArgumentError
from metalgen.families import Schedule, default_schedule, enumerate_valid, space
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.search.search import Search, rank

CONFIG = AttentionConfig(head_dim=64)
SPACE = space(CONFIG)
VALID = enumerate_valid(CONFIG)
BEST_STARTS = (VALID[100], VALID[200])


def run(search: Search, count: int) -> list[Schedule]:
    """Ask `count` times, telling each time; every eleventh fails."""
    asked = []
    for _ in range(count):
        schedule = search.ask()
        if schedule is None:
            break
        asked.append(schedule)
        failed = len(search.times) % 11 == 10
        search.tell(schedule, None if failed else cost(schedule))
    return asked


def test_a_search_begins_with_the_default_and_what_it_was_given() -> None:
    asked = run(Search(SPACE, VALID, first=BEST_STARTS), 3)
    assert asked == [default_schedule(CONFIG), *BEST_STARTS]


def test_a_search_asks_for_valid_schedules_only_and_for_none_twice() -> None:
    asked = run(Search(SPACE, VALID, seed=1), 60)
    assert len(set(asked)) == 60
    assert set(asked) <= set(VALID)


def test_a_small_space_is_tried_whole_in_an_order_that_the_seed_gives() -> None:
    few = VALID[:40]
    first = run(Search(SPACE, few, seed=1, small=40), 100)
    again = run(Search(SPACE, few, seed=1, small=40), 100)
    other = run(Search(SPACE, few, seed=2, small=40), 100)
    assert set(first) == set(other) == set(few)
    assert first == again
    assert first != other


@pytest.mark.parametrize("small", [0, len(VALID)])
@pytest.mark.parametrize("stop", [1, 7, 24])
def test_a_resumed_search_asks_what_an_undisturbed_one_would(small: int, stop: int) -> None:
    undisturbed = Search(SPACE, VALID, seed=5, first=BEST_STARTS, small=small)
    asked = run(undisturbed, 36)
    resumed = Search(SPACE, VALID, seed=5, first=BEST_STARTS, small=small)
    for schedule in asked[:stop]:
        seconds = undisturbed.times[schedule]
        resumed.tell(schedule, None if seconds == float("inf") else seconds)
    assert run(resumed, 36 - stop) == asked[stop:]


def test_the_guided_search_finds_better_schedules_than_chance() -> None:
    guided, chance = [], []
    for seed in range(2):
        asked = run(Search(SPACE, VALID, seed=seed), 50)
        guided.append(min(map(cost, asked)))
        chance.append(min(map(cost, random.Random(seed).sample(VALID, 50))))
    assert sum(guided) < sum(chance)


def test_what_lies_outside_the_space_counts_as_tried_and_does_no_harm() -> None:
    search = Search(SPACE, VALID, seed=3)
    search.tell(Schedule(bq=24, bk=32, bd=64, simdgroups=3), 1e-3)
    assert run(search, 1) == [default_schedule(CONFIG)]
    assert len(run(search, 20)) == 20


@pytest.mark.parametrize("seed", [-1, 1.5, True, 1 << 31])
def test_a_seed_that_is_none_is_refused(seed: object) -> None:
    with pytest.raises(ArgumentError, match="seed: expected a whole number"):
        Search(SPACE, VALID, seed=seed)  # type: ignore[arg-type]


def test_ranking_sorts_by_the_predicted_time_and_then_by_key() -> None:
    problem = Problem(CONFIG, 32, 1024, 1024)
    chip = get_chip("M1Max")
    some = VALID[::97]
    expected = sorted((predict(problem, s, chip).seconds, s.key) for s in some)
    assert [(seconds, s.key) for seconds, s in rank(problem, some, chip)] == expected
