"""Scores of the chip model against tables: on what it was fitted to, and on what it never saw."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from metalgen.chips.coefficients import FITTED, Coefficients
from metalgen.chips.fitting import Sample, fit, modelled
from metalgen.chips.tables import INSTRUCTIONS, Row

CONFIGURATIONS = 8
"""A head dimension needs as many configurations for a rank correlation."""
Seconds = dict[int, float]
"""Modelled seconds by index of a row."""


@dataclass(frozen=True)
class Score:
    """How well modelled times agree with measured ones, for one chip, kernel and type.

    Args:
        rows, covered: rows of the table, and those that could be modelled.
        median_error, p90_error: of ``|modelled / measured - 1|``; None where nothing is covered.
        rank_correlation: Spearman's, median over head dimensions with `CONFIGURATIONS` or more;
            None where there is none.
        median_regret, worst_regret: over head dimensions, the share of the best measured speed
            that is lost by the configuration which the model prefers; None in tables without
            configurations.
    """

    chip: str
    kernel: str
    dtype: str
    rows: int
    covered: int
    median_error: float | None
    p90_error: float | None
    rank_correlation: float | None
    median_regret: float | None
    worst_regret: float | None

    def to_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return asdict(self)


def shipped(rows: Sequence[Row], coefficients: Coefficients) -> Seconds:
    """The modelled seconds of all rows that are covered."""
    return {
        index: modelled(row.sample, coefficients)
        for index, row in enumerate(rows)
        if row.sample is not None
    }


def unseen(rows: Sequence[Row], of: Callable[[Row], Hashable]) -> Seconds:
    """The modelled seconds of each row, by a fit to the rows that differ from it in ``of(row)``.

    Rows whose complement is too small for a fit are left out.
    """
    found: Seconds = {}
    covered = [(index, row) for index, row in enumerate(rows) if row.sample is not None]
    for left_out in dict.fromkeys(of(row) for _, row in covered):
        seen = [row.sample for _, row in covered if of(row) != left_out and row.sample]
        if len(seen) < len(FITTED):
            continue
        coefficients = fit(seen)
        for index, row in covered:
            if of(row) == left_out and row.sample is not None:
                found[index] = modelled(row.sample, coefficients)
    return found


def by_dimension(row: Row) -> int:
    """What is left out for the score on unseen head dimensions."""
    return row.head_dim


def by_chip(row: Row) -> str:
    """What is left out for the score on unseen chips."""
    return row.chip.name if row.chip else ""


def constant_fraction(rows: Sequence[Row], of: Callable[[Row], Hashable]) -> Seconds:
    """A baseline: the median fraction of a chip's peak that other rows reach, for every row.

    For unseen dimensions the other rows are those of the same chip, for unseen chips all others.
    """
    fractions = {i: _peak_seconds(row) / row.sample.seconds for i, row in _tiles(rows)}
    found: Seconds = {}
    cache: dict[Hashable, float] = {}
    for index, row in _tiles(rows):
        key = (by_chip(row), of(row))
        if key not in cache:
            same = of is by_chip
            others = [
                fractions[i]
                for i, other in _tiles(rows)
                if of(other) != of(row) and (same or by_chip(other) == by_chip(row))
            ]
            cache[key] = statistics.median(others) if others else math.nan
        if not math.isnan(cache[key]):
            found[index] = _peak_seconds(row) / cache[key]
    return found


def interpolation(rows: Sequence[Row]) -> Seconds:
    """A baseline: rates between those of the neighbouring head dimensions, linear in D.

    Same chip, kernel, type and tile; rows at either end have a neighbour on one side only, whose
    rate they take.
    """
    groups: dict[Hashable, list[int]] = {}
    for index, row in _tiles(rows):
        key = (by_chip(row), row.kernel, row.dtype, row.tile and _configuration(row))
        groups.setdefault(key, []).append(index)
    found: Seconds = {}
    for indices in groups.values():
        rate = {i: _instructions(rows[i]) / rows[i].sample.seconds for i in indices}  # type: ignore[union-attr]
        dims = {i: rows[i].head_dim for i in indices}
        for i in indices:
            below = max((j for j in indices if dims[j] < dims[i]), key=dims.__getitem__, default=-1)
            above = min((j for j in indices if dims[j] > dims[i]), key=dims.__getitem__, default=-1)
            if below < 0 and above < 0:
                continue
            if below < 0 or above < 0:
                between = rate[max(below, above)]
            else:
                part = (dims[i] - dims[below]) / (dims[above] - dims[below])
                between = rate[below] * (1 - part) + rate[above] * part
            found[i] = _instructions(rows[i]) / between
    return found


def score(rows: Sequence[Row], seconds: Seconds, *, together: bool = False) -> list[Score]:
    """The scores of modelled seconds by chip, kernel and type, in the table's order.

    Args:
        together: by chip only, all kernels and types in one.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    for index, row in enumerate(rows):
        kernel, dtype = ("all", "all") if together else (row.kernel, row.dtype)
        groups.setdefault((by_chip(row), kernel, dtype), []).append(index)
    return [_score(name, rows, seconds, indices) for name, indices in groups.items()]


def overall(rows: Sequence[Row], seconds: Seconds) -> Score:
    """The score of all rows together."""
    return _score(("all", "all", "all"), rows, seconds, range(len(rows)))


def errors(rows: Sequence[Row], seconds: Seconds) -> list[float]:
    """``|modelled / measured - 1|`` of the rows that were modelled."""
    found = []
    for index, value in seconds.items():
        sample = rows[index].sample
        assert sample is not None
        found.append(abs(value / sample.seconds - 1))
    return found


def _score(
    name: tuple[str, str, str], rows: Sequence[Row], seconds: Seconds, indices: Iterable[int]
) -> Score:
    indices = list(indices)
    covered = [i for i in indices if i in seconds]
    wrong = sorted(errors(rows, {i: seconds[i] for i in covered}))
    problems: dict[Hashable, list[tuple[float, float]]] = {}
    for i in covered:
        row = rows[i]
        if row.tile is not None and row.sample is not None:
            key = (by_chip(row), row.kernel, row.dtype, row.tile.length, row.head_dim)
            problems.setdefault(key, []).append((seconds[i], row.sample.seconds))
    regrets = [_regret(times) for times in problems.values()]
    ranks = [_spearman(t) for t in problems.values() if len(t) >= CONFIGURATIONS]
    return Score(
        *name,
        rows=len(indices),
        covered=len(covered),
        median_error=statistics.median(wrong) if wrong else None,
        p90_error=quantile(wrong, 0.9) if wrong else None,
        rank_correlation=statistics.median(ranks) if ranks else None,
        median_regret=statistics.median(regrets) if regrets else None,
        worst_regret=max(regrets) if regrets else None,
    )


def quantile(ordered: Sequence[float], share: float) -> float:
    """The quantile of values in ascending order, linear between neighbours."""
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _regret(times: Sequence[tuple[float, float]]) -> float:
    """Lost share of the best speed, of (modelled, measured) seconds."""
    chosen = min(times, key=lambda pair: pair[0])[1]
    return 1 - min(measured for _, measured in times) / chosen


def _spearman(times: Sequence[tuple[float, float]]) -> float:
    """Spearman's rank correlation: Pearson's of the ranks, ties at their mean rank."""
    left, right = (_ranks(column) for column in zip(*times, strict=True))
    spread = statistics.pstdev(left) * statistics.pstdev(right)
    if spread == 0:
        return 0.0
    mean = statistics.fmean(x * y for x, y in zip(left, right, strict=True))
    return (mean - statistics.fmean(left) * statistics.fmean(right)) / spread


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
        for value in values
    ]


def _tiles(rows: Sequence[Row]) -> list[tuple[int, Any]]:
    return [(i, row) for i, row in enumerate(rows) if row.tile is not None and row.sample]


def _configuration(row: Row) -> Hashable:
    assert row.tile is not None
    return row.tile._replace(head_dim=0)


def _instructions(row: Row) -> float:
    assert row.tile is not None
    return (INSTRUCTIONS[row.kernel] * row.head_dim + 5.0) * row.tile.length**2


def _peak_seconds(row: Row) -> float:
    chip = row.chip
    assert chip is not None and chip.fp32_tflops is not None
    return _instructions(row) / (chip.fp32_tflops * 1e12 / 2)


__all__ = [
    "Sample",
    "Score",
    "by_chip",
    "by_dimension",
    "constant_fraction",
    "errors",
    "interpolation",
    "overall",
    "quantile",
    "score",
    "shipped",
    "unseen",
]
