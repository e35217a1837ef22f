"""The scores of the chip model as text: as shipped, on unseen dimensions and chips, baselines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from metalgen.chips.coefficients import Coefficients
from metalgen.chips.scoring import (
    Score,
    Seconds,
    by_chip,
    by_dimension,
    constant_fraction,
    errors,
    interpolation,
    overall,
    score,
    shipped,
    unseen,
)
from metalgen.chips.tables import Row

HEADER = ("chip", "kernel", "type", "rows", "covered", "median", "90 %", "rank", "regret", "worst")
CLOSE = 0.25
"""Of published times, the share within this error is told."""


def lines(rows: Sequence[Row], coefficients: Coefficients) -> Iterator[str]:
    """The whole report, line by line; the fits that leave something out take some seconds."""
    yield "Errors are |modelled / measured - 1|: median and 90th percentile. Rank is Spearman's"
    yield "correlation of times. Regret is the share of the best measured speed that is lost by"
    yield "what the model prefers: median and worst over head dimensions."
    seconds = shipped(rows, coefficients)
    yield from _part("As shipped (fitted)", rows, seconds)
    if (dimension := unseen(rows, by_dimension)) or _tiles(rows):
        yield from _part("Unseen: fitted without the row's head dimension", rows, dimension)
    yield from _part("Unseen: fitted without the row's chip", rows, unseen(rows, by_chip))
    if tiles := _tiles(rows):
        for name, baseline in (
            ("Baseline: a constant fraction of peak, without the dimension", by_dimension),
            ("Baseline: a constant fraction of peak, without the chip", by_chip),
        ):
            yield from _part(name, tiles, constant_fraction(tiles, baseline), compact=True)
        name = "Baseline: interpolation between neighbouring dimensions (same chip and tile only)"
        yield from _part(name, tiles, interpolation(tiles), compact=True)
    if published := [row for row in rows if row.tile is None]:
        wrong = errors(published, shipped(published, coefficients))
        close = sum(error <= CLOSE for error in wrong)
        yield ""
        yield f"Published: {len(wrong)} of {len(published)} rows covered"
        if wrong:
            share = close / len(wrong)
            yield f"  {close} of them ({share:.0%}) within {CLOSE:.0%}"
        reasons = Counter(row.reason for row in published if row.reason)
        for reason, count in reasons.most_common():
            yield f"  not covered: {count} ({reason})"


def _tiles(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.tile is not None]


def _part(
    title: str, rows: Sequence[Row], seconds: Seconds, *, compact: bool = False
) -> Iterator[str]:
    yield ""
    yield title
    if not seconds:
        yield "  nothing: too few rows remain to fit"
        return
    scores = score(rows, seconds, together=compact)
    if not compact:
        scores += [one for one in score(rows, seconds, together=True) if one.covered]
    scores.append(overall(rows, seconds))
    table = [HEADER, *(_cells(one) for one in scores if one.covered)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        left = [cell.ljust(width) for cell, width in zip(cells[:3], widths, strict=False)]
        right = [cell.rjust(width) for cell, width in zip(cells[3:], widths[3:], strict=True)]
        yield "  " + "  ".join(left + right)


def _cells(one: Score) -> tuple[str, ...]:
    rank = "-" if one.rank_correlation is None else f"{one.rank_correlation:.2f}"
    return (
        one.chip,
        one.kernel,
        one.dtype,
        str(one.rows),
        str(one.covered),
        _percent(one.median_error),
        _percent(one.p90_error),
        rank,
        _percent(one.median_regret),
        _percent(one.worst_regret),
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
