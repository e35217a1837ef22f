"""Bounds of masks, evaluated as integers, against the pairs that see each other, counted out."""

from __future__ import annotations

import itertools
import re
from random import Random
from typing import Any

import numpy as np
import pytest

from metalgen.features.bounds import Bound, Bounds, Interval, Side

COUNTS = {"query": 11, "key": 17}


def value(text: str, names: dict[str, int]) -> int:
    """An expression of the kernels' language."""
    found = re.fullmatch(r"\((.*) \? (.*) : 0\)", text)
    if found:
        condition = found[1].replace("&&", "and")
        return value(found[2], names) if eval(condition, {}, names) else 0
    return int(eval(text, {"min": min, "max": max}, names))


def seen(bounds: Bounds, names: dict[str, int]) -> Any:
    """Which of the columns each owned row sees, by the definition of a bound."""
    i, j = np.ogrid[: COUNTS["query"], : COUNTS["key"]]
    numbers = {"query": i, "key": j, "distance": j - (i + names["offset"])}
    found = np.ones((COUNTS["query"], COUNTS["key"]), bool)
    for bound in bounds.each:
        if bound.least is not None:
            found &= numbers[bound.of] >= value(bound.least, names)
        if bound.most is not None:
            found &= numbers[bound.of] <= value(bound.most, names)
    return found if bounds.owned == "query" else found.T


def columns(interval: Interval, names: dict[str, int], count: int) -> set[int]:
    low = 0 if interval.low is None else value(interval.low, names)
    return {*range(max(0, low), min(count, value(interval.past, names)))}


def made_up(random: Random) -> tuple[tuple[Bound, ...], dict[str, int]]:
    names = {"offset": random.randint(-12, 12)}
    names |= {f"n{number}": random.randint(0, 9) for number in range(6)}
    least, most = ((None, "0", "-n0", "n1"), (None, "0", "n2", "-n3"))
    each = [Bound("distance", random.choice(least), random.choice(most))]
    for of in ("key", "query"):
        each.append(Bound(of, random.choice((None, "n4")), random.choice((None, "n5"))))
    random.shuffle(each)
    return tuple(each[: random.randint(0, 3)]), names


@pytest.mark.parametrize("owned", ["query", "key"])
def test_rows_and_tiles_see_what_the_bounds_say(owned: Side) -> None:
    columns_of: Side = "key" if owned == "query" else "query"
    rows, count = COUNTS[owned], COUNTS[columns_of]
    for seed in range(60):
        each, names = made_up(Random(seed))
        bounds = Bounds(each, owned)
        names |= {"count": count, "lane": 3}
        truth = seen(bounds, names)
        for first, last in itertools.combinations_with_replacement(range(rows), 2):
            names |= {"first": first, "last": last}
            tile = truth[first : last + 1]
            some, every = tile.any(axis=0), tile.all(axis=0)
            found = columns(bounds.any("first", "last", "count"), names, count)
            assert found >= {*np.flatnonzero(some)}
            if tile.any(axis=1).all():
                assert found == {*range(some.argmax(), count - some[::-1].argmax())}
            found = columns(bounds.all("first", "last", "count"), names, count)
            assert found == {*np.flatnonzero(every)}
        for row in range(rows):
            names["row"] = row
            names["place"] = value(bounds.place("row"), names) - names["lane"]
            low, past = bounds.row("row", "count", "lane")
            begin = 0 if low is None else value(low, names) + names["lane"]
            end = value(past, names) + names["lane"]
            lane = range(names["lane"], count)  # the columns that a lane may have
            assert [begin <= n < end for n in lane] == [bool(truth[row, n]) for n in lane]


def test_a_first_row_that_is_zero_is_not_added() -> None:
    causal = Bounds((Bound("distance", "-WINDOW_LEFT", "0"),))
    assert causal.any("0", "q_len - 1", "kv_len") == (
        "offset - WINDOW_LEFT",
        "min(kv_len, q_len - 1 + offset + 1)",
    )


def test_keys_see_the_queries_that_see_them() -> None:
    causal = Bounds((Bound("distance", "-WINDOW_LEFT", "0"),), "key")
    assert causal.any("first", "last", "q_len") == (
        "first - offset",
        "min(q_len, last - offset + WINDOW_LEFT + 1)",
    )


def test_only_bounds_of_rows_differ_by_row() -> None:
    assert not Bounds((Bound("key", "kv_start"),)).by_row
    assert Bounds((Bound("key", "kv_start"),), "key").by_row
    assert Bounds((Bound("distance", None, "0"),)).by_row
    assert not Bounds((Bound("distance", None, "0"),)).has_low
    assert Bounds((Bound("distance", None, "0"),), "key").has_low
