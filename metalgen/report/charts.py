"""Where the marks of a picture stand: SVG paths in the units of its view box."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

WIDTH, HEIGHT = 420.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 20.0, 24.0, 38.0
"""Margins around the plotted area."""
MOST_MARKS = 2000
"""Dots, or crosses, of one picture; of more every n-th is drawn."""
STRIP = 220.0
"""Width of a strip of samples."""
FAR = 4.0
"""Times beyond so many times the best stand at a picture's upper edge."""


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: its place, and what stands there."""

    at: float
    text: str


@dataclass(frozen=True)
class Axis:
    """A scale from values to places.

    Args:
        low, high: values at the ends.
        start, end: places of these.
        log: whether equal factors are equal distances.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        value = min(max(value, self.low), self.high)
        if not self.high > self.low:
            share = 0.5
        elif self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)


@dataclass(frozen=True)
class Chart:
    """Paths in a box of `WIDTH` by `HEIGHT`; an empty path draws nothing.

    Args:
        line: the best so far, or predicted times by rank.
        band: between two quantiles.
        dots, far, failed: measurements, those beyond the upper edge, and those without a time.
        default, mlx: heights of these times, or None.
        x_ticks, y_ticks: of the axes; times in milliseconds.
    """

    line: str
    band: str
    dots: str
    far: str
    failed: str
    default: float | None
    mlx: float | None
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def chart(
    line: Sequence[tuple[float, float]],
    *,
    step: bool = False,
    log: bool = False,
    end: float,
    band: Sequence[tuple[float, float, float]] = (),
    dots: Sequence[tuple[float, float]] = (),
    failed: Sequence[float] = (),
    default: float | None = None,
    mlx: float | None = None,
    far: float = FAR,
) -> Chart:
    """A picture of times over a count from 1 to `end`.

    Args:
        line: counts and seconds, in ascending order of counts; at least one.
        step: keep each value until the next one.
        log: a logarithmic count.
        band: counts, lower and upper seconds.
        dots: counts and seconds of single measurements.
        failed: counts without a time.
        default, mlx: seconds of horizontal lines.
        far: the multiple of the best time beyond which nothing is told apart.
    """
    best = min(t for _, t in line)
    drawn = [t for t in (default, mlx) if t is not None and best / far <= t <= far * best]
    drawn += [min(t, far * best) for _, t in line]
    if dots:  # half of them within the picture, unless that would flatten the line
        drawn.append(min(statistics.median_low([t for _, t in dots]), 2 * best))
    margin = 0.1 * (1.05 * max(drawn) - min(drawn))
    low, high = min(drawn) - margin, max(drawn) + margin
    x = Axis(1, max(end, 2), LEFT, WIDTH - RIGHT, log)
    y = Axis(low, high, HEIGHT - BOTTOM, TOP)
    near = thinned([(x(n), y(t)) for n, t in dots if t <= high])
    beyond = thinned([x(n) for n, t in dots if t > high])
    lower = "L".join(f"{x(n):g} {y(t):g}" for n, t, _ in band)
    upper = "L".join(f"{x(n):g} {y(t):g}" for n, _, t in reversed(band))
    return Chart(
        line=_path([(x(n), y(t)) for n, t in line], step),
        band=f"M{lower}L{upper}Z" if band else "",
        dots="".join(f"M{a:g} {b:g}h0" for a, b in near),
        far="".join(f"M{a - 2.5:g} {TOP + 5:g}l2.5 -5l2.5 5z" for a in beyond),
        failed="".join(
            f"M{x(n) - 2:g} {HEIGHT - BOTTOM - 5:g}l4 4m0 -4l-4 4" for n in thinned(failed)
        ),
        default=y(default) if default is not None and low <= default <= high else None,
        mlx=y(mlx) if mlx is not None and low <= mlx <= high else None,
        x_ticks=tuple(Tick(x(n), f"{n:g}") for n in _counts(end, log)),
        y_ticks=tuple(
            Tick(y(v / 1e3), text) for v, text in _labelled(ticks(low * 1e3, high * 1e3))
        ),
    )


Mark = TypeVar("Mark")


def thinned(marks: Sequence[Mark], most: int = MOST_MARKS) -> Sequence[Mark]:
    """At most so many marks: every n-th."""
    return marks[:: -(-len(marks) // most) or 1]


def _path(points: Sequence[tuple[float, float]], step: bool) -> str:
    a, b = points[0]
    parts = [f"M{a:g} {b:g}"]
    for c, d in points[1:]:
        if step:
            parts.append(f"H{c:g}V{d:g}" if d != b else f"H{c:g}")
        else:
            parts.append(f"L{c:g} {d:g}")
        b = d
    return "".join(parts)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values from `low` to `high`, two to `most` of them, in steps of 1, 2 or 5.

    None at all where the two are too near, too small or too large for that.
    """
    if not 1e-300 < high - low < 1e300 or high - low < 1e-9 * high:
        return []
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    for step in (size * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
        if last - first < most:
            return [float(f"{n * step:.12g}") for n in range(first, last + 1)]
    raise AssertionError("a step of 20 sizes always fits")


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Values and their texts, all with as many decimals as one of them needs."""
    texts = [f"{v:.12g}" for v in values]
    if any("e" in text for text in texts):
        return list(zip(values, texts, strict=True))
    decimals = max((len(text.partition(".")[2]) for text in texts), default=0)
    return [(v, f"{v:.{decimals}f}") for v in values]


def _counts(end: float, log: bool) -> list[float]:
    if not log:
        return sorted({1.0, *(n for n in ticks(0, max(end, 2)) if n >= 1 and n == int(n))})
    powers = range(1 + int(math.log10(max(end, 2))))
    few = (1, 10, 100) if end > 1000 else (1, 2, 5, 10, 20, 50, 100)
    marks = {f * 10.0**p for p in powers for f in few if f < 10 or f in (10, 100)}
    return sorted(n for n in marks if n <= max(end, 2))


@dataclass(frozen=True)
class Strip:
    """Samples of one schedule on a common scale of `STRIP` units; places of single times."""

    dots: str
    median: float | None


def strips(
    rows: Sequence[tuple[Sequence[float], float]], marks: Sequence[float]
) -> tuple[list[Strip], list[float], tuple[float, float]]:
    """Strips of samples and medians, the places of `marks`, and the seconds at the two ends."""
    values = [t for samples, median in rows for t in (*samples, median)] + list(marks)
    low, high = min(values), max(values)
    x = Axis(low, high, 6, STRIP - 6)
    found = [
        Strip("".join(f"M{x(t):g} 10h0" for t in thinned(samples, 100)), x(median))
        for samples, median in rows
    ]
    return found, [x(t) for t in marks], (low, high)


@dataclass(frozen=True)
class Roofline:
    """Paths in a box of `WIDTH` by `HEIGHT`, both axes logarithmic.

    Args:
        roof: what the chip allows; empty where that is unknown.
        dots: the best schedules.
        mlx: crosses of MLX's own attention.
        x_ticks, y_ticks: operations for each byte, and 10^12 operations a second.
    """

    roof: str
    dots: str
    mlx: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def roofline(
    points: Sequence[tuple[float, float]],
    others: Sequence[tuple[float, float]],
    operations: float | None,
    memory: float | None,
) -> Roofline:
    """A picture of rates over intensities.

    Args:
        points: operations for each byte, and operations a second; at least one.
        others: the same of MLX's own attention.
        operations, memory: the chip's operations and bytes a second, or None.
    """
    every = [*points, *others]
    left, right = (f(x for x, _ in every) for f in (min, max))
    x = Axis(left / 1.5, right * 1.5, LEFT, WIDTH - RIGHT, log=True)
    tops = [y for _, y in every] + ([operations] if operations else [])
    y = Axis(min(tops) / 1.5, max(tops) * 1.2, HEIGHT - BOTTOM, TOP, log=True)
    corners = []
    if operations and memory:
        edges = (x.low, operations / memory, x.high)
        corners = [(e, min(e * memory, operations)) for e in edges if x.low <= e <= x.high]
    return Roofline(
        roof=_path([(x(a), y(b)) for a, b in corners], False) if corners else "",
        dots="".join(f"M{x(a):g} {y(b):g}h0" for a, b in thinned(points)),
        mlx="".join(f"M{x(a) - 3:g} {y(b) - 3:g}l6 6m0 -6l-6 6" for a, b in thinned(others)),
        x_ticks=tuple(Tick(x(v), f"{v:g}") for v in _decades(x.low, x.high)),
        y_ticks=tuple(Tick(y(v), f"{v / 1e12:g}") for v in _decades(y.low, y.high)),
    )


def _decades(low: float, high: float) -> list[float]:
    """Powers of 10 within an interval, or where it holds fewer than two also 2 and 5 times them."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    tens = [10.0**n for n in range(first, last + 1)]
    found = [v for v in tens if low <= v <= high]
    if len(found) >= 2:
        return found
    return [v * f for v in tens for f in (1, 2, 5) if low <= v * f <= high]


SPEEDS = 160.0
"""Width of a bar of speeds."""


def speed_axis(speeds: Iterable[float]) -> Axis:
    """The common scale of bars that start at 0, with the default schedule at 1."""
    return Axis(0.0, max(1.25, *speeds, 0.0), 0.0, SPEEDS)


HEAT = (1.02, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
"""Upper ends of the shades of a heat map, as multiples of the best time; beyond: the last."""


def shade(ratio: float) -> int:
    """The number of a shade: 0 is the best."""
    return next((n for n, end in enumerate(HEAT) if ratio <= end), len(HEAT))
