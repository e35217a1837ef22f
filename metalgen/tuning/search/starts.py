"""What a search begins with: what won on near chips, in near sizes and for related configs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from metalgen.families import Limits, Schedule
from metalgen.families.sizes import Problem
from metalgen.kinds import get_kind
from metalgen.problem.config import AttentionConfig

if TYPE_CHECKING:
    from metalgen.chips import Chip
    from metalgen.database.protocol import TuningStore

BORROWED = 6
"""Points that are borrowed from other devices and buckets."""
TABLES = 8
"""Devices and buckets to borrow from, nearest first."""
WIDTHS = (64, 80, 96, 128, 256)
"""Head dimensions whose plain configs are related."""
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


def related(config: AttentionConfig) -> list[AttentionConfig]:
    """A config, then those whose schedules are worth a try for it, the nearest first.

    Without its features, causal or not; and so with other head dimensions, the nearest first.
    """

    def plain(head_dim: int, v_dim: int | None, causal: bool) -> AttentionConfig:
        return AttentionConfig(
            head_dim, config.dtype, v_dim, heads_per_kv=config.heads_per_kv, causal=causal
        )

    order = (config.causal, not config.causal)
    near = [plain(config.head_dim, config.value_head_dim, causal) for causal in order]
    widths = sorted(WIDTHS, key=lambda width: abs(math.log2(width / config.head_dim)))
    near += [plain(width, None, causal) for width in widths for causal in order]
    return list(dict.fromkeys([config, *near]))


def translated(
    schedule: Schedule, source: AttentionConfig, config: AttentionConfig, limits: Limits
) -> Schedule:
    """A schedule of one config for another: a head-dimension block stays whole, or fits."""
    kind = get_kind(schedule.kind)
    if "bd" not in schedule.knobs:
        return schedule
    here, there = (kind.widest_row(c, 1) for c in (config, source))
    return dataclasses.replace(
        schedule, bd=here if schedule.bd == there else min(schedule.bd, here)
    )


def borrowed_schedules(problem: Problem, chip: Chip, store: TuningStore) -> list[Schedule]:
    """What won on near chips, in near buckets and for related configs, by the database and ours.

    Measured rows only, whatever templates they were made from: a hint needs no proof. Some may
    not be valid for the problem.
    """
    from metalgen.chips import neighbours
    from metalgen.database.records import recorded

    chips = [chip.name, *neighbours(chip)]
    configs = related(problem.config)
    tables: dict[tuple[int, str, Problem], dict[Schedule, float]] = {}
    for place, config in enumerate(configs):
        asked = dataclasses.replace(problem, config=config)
        rows = store.measurements(config=config.key, family=problem.family)
        for m in [*rows, *recorded(asked, chips)]:
            own = m.chip == chip.name and m.problem == problem
            if m.status != "ok" or m.provenance != "measured" or m.chip not in chips or own:
                continue
            assert m.seconds is not None
            schedule = translated(m.schedule, config, problem.config, chip.limits)
            table = tables.setdefault((place, m.chip, m.problem), {})
            table[schedule] = min(m.seconds, table.get(schedule, math.inf))
    here = (problem.batch_heads, problem.q_len, problem.kv_len)

    def distance(key: tuple[int, str, Problem]) -> tuple[float, int, int, str]:
        place, name, other = key
        sizes = (other.batch_heads, other.q_len, other.kv_len)
        apart = sum(abs(math.log2(a / b)) for a, b in zip(sizes, here, strict=True))
        near = chips.index(name)
        return apart + 2.0 * near + place, place, near, other.key

    return borrow([tables[key] for key in sorted(tables, key=distance)[:TABLES]])
