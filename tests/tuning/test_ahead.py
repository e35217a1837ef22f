"""Asking for schedules before all outcomes are there: the same asks, however a run was cut."""

from __future__ import annotations

from typing import Any

import pytest

from metalgen.families import Parameter
from metalgen.tuning.search.ahead import Ahead
from metalgen.tuning.search.replay import Recording
from metalgen.tuning.search.search import Search

PARAMETERS = tuple(Parameter(name, tuple(range(8))) for name in "abc")
POINTS = tuple((a, b, c) for a in range(8) for b in range(8) for c in range(8))
TIMES = {
    (a, b, c): None if (a, b) == (0, 0) else 1.0 + abs(a - 5) + 0.5 * abs(b - 2) + 0.1 * abs(c - 6)
    for a, b, c in POINTS
}
SPACE = Recording("test", "test", PARAMETERS, TIMES, (0, 7, 0))


def make() -> Search[tuple[Any, ...]]:
    return Search(SPACE, POINTS, 3)


def run(ahead: Ahead[tuple[Any, ...]], goal: int) -> list[tuple[Any, ...]]:
    """Ask for all that may be asked, then tell one outcome, and so on."""
    while len(ahead.times) < goal:
        while len(ahead.asked) < goal and ahead.ask() is not None:
            pass
        first = ahead.pending[0]
        ahead.tell(first, TIMES[first])
    return ahead.asked


@pytest.mark.parametrize("window", [1, 4, 8])
def test_an_interrupted_search_goes_on_as_an_undisturbed_one(window: int) -> None:
    whole = run(Ahead(make, (), window), 40)
    assert len(set(whole)) == 40
    for cut in (0, 1, 7, 8, 9, 23, 39):
        rows = [(point, TIMES[point]) for point in whole[:cut]]
        assert run(Ahead(make, rows, window), 40) == whole


def test_asks_do_not_depend_on_which_outcomes_came_early() -> None:
    eager = run(Ahead(make, (), 6), 40)
    late: Ahead[tuple[Any, ...]] = Ahead(make, (), 6)
    while len(late.times) < 40:  # one ask an outcome, only when it must be
        if not late.pending or len(late.pending) < 3:
            assert late.ask() is not None or late.pending
        first = late.pending[0]
        late.tell(first, TIMES[first])
    assert late.asked[:40] == eager


def test_with_a_window_of_one_it_asks_what_the_search_asks() -> None:
    search = make()
    order = []
    for _ in range(30):
        point = search.ask()
        assert point is not None
        search.tell(point, TIMES[point])
        order.append(point)
    assert run(Ahead(make), 30) == order


def test_no_more_are_without_an_outcome_than_the_window_holds() -> None:
    ahead: Ahead[tuple[Any, ...]] = Ahead(make, (), 5)
    for _ in range(5):
        assert ahead.ask() is not None
    assert ahead.ask() is None
    first = ahead.pending[0]
    ahead.tell(first, TIMES[first])
    assert ahead.ask() is not None
    assert ahead.ask() is None


def test_what_is_pending_is_spread_out_rather_than_around_one_point() -> None:
    ahead: Ahead[tuple[Any, ...]] = Ahead(make, (), 8)
    run(ahead, 24)
    while ahead.ask() is not None:
        pass
    pending = ahead.pending
    assert len(set(pending)) == 8
    apart = [
        sum(x != y for x, y in zip(p, q, strict=True)) for p in pending for q in pending if p != q
    ]
    assert sum(apart) / len(apart) > 1.5


def test_all_are_asked_for_once_and_then_none() -> None:
    ahead: Ahead[tuple[Any, ...]] = Ahead(lambda: Search(SPACE, POINTS[:20], 0), (), 8)
    assert sorted(run(ahead, 20)) == sorted(POINTS[:20])
    assert ahead.ask() is None


def test_the_optimum_is_found_with_a_window_too() -> None:
    best = min(t for t in TIMES.values() if t is not None)
    asked = run(Ahead(make, (), 8), 100)
    assert min(t for p in asked if (t := TIMES[p]) is not None) == best
