"""What a search begins with: what won elsewhere on the same config."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from metalgen.problem import Problem
from metalgen.schedule import Schedule

if TYPE_CHECKING:
    from metalgen.chips import Chip
    from metalgen.database.store import Store

BORROWED = 12
"""Points that are borrowed from other devices and buckets."""
TABLES = 8
"""Devices and buckets to borrow from, nearest first."""
UNKNOWN = 0.3
"""Fraction of the optimum that a point counts as where a device has not tried it."""

Item = TypeVar("Item", bound=Hashable)


def borrow(tables: Sequence[Mapping[Item, float]], count: int = BORROWED) -> list[Item]:
    """The winner of each table, in their order, then the points that are best on all together.

    Args:
        tables: seconds by point, one table a device or bucket, the nearest first.
        count: how many points at most.

    Best together is the greatest geometric mean of the fractions of each table's optimum.
    """
    tables = [table for table in tables if table]
    best = [min(table.values()) for table in tables]
    winners = [
        next(item for item, seconds in table.items() if seconds == least)
        for table, least in zip(tables, best, strict=True)
    ]
    fitness = {
        item: sum(
            math.log(least / table[item] if item in table else UNKNOWN)
            for table, least in zip(tables, best, strict=True)
        )
        for table in tables
        for item in table
    }
    together = sorted(fitness, key=lambda item: -fitness[item])[:count]
    return list(dict.fromkeys([*winners, *together]))[:count]


def borrowed_schedules(problem: Problem, chip: Chip, store: Store) -> list[Schedule]:
    """What won for the config on near chips and in near buckets, by the user's database and ours.

    Measured rows only, whatever templates they were made from: a hint needs no proof.
    """
    from metalgen.chips import neighbours
    from metalgen.database.records import recorded

    chips = [chip.name, *neighbours(chip)]
    tables: dict[tuple[str, Problem], dict[Schedule, float]] = {}
    rows = store.measurements(config=problem.config.key, family=problem.family)
    for m in [*rows, *recorded(problem, chips)]:
        own = m.chip == chip.name and m.problem == problem
        if m.status != "ok" or m.provenance != "measured" or m.chip not in chips or own:
            continue
        assert m.seconds is not None
        table = tables.setdefault((m.chip, m.problem), {})
        table[m.schedule] = min(m.seconds, table.get(m.schedule, math.inf))
    here = (problem.batch_heads, problem.q_len, problem.kv_len)

    def distance(key: tuple[str, Problem]) -> tuple[float, int, str]:
        name, other = key
        sizes = (other.batch_heads, other.q_len, other.kv_len)
        apart = sum(abs(math.log2(a / b)) for a, b in zip(sizes, here, strict=True))
        return apart + 2.0 * chips.index(name), chips.index(name), other.key

    return borrow([tables[key] for key in sorted(tables, key=distance)[:TABLES]])
