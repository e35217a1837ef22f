"""Draws docs/chip-model-*.svg: modelled against measured times, and where the model is wrong.

    python benchmarks/chip_model_plots.py --tiles FILE.csv --published FILE.csv [--output docs]

The tables are other people's measurements and no part of the project (docs/chip-model.md tells
their columns). Tiles are drawn as a fit predicts them that never saw their head dimension.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from metalgen.chips.coefficients import DEFAULT
from metalgen.chips.scoring import by_dimension, shipped, unseen
from metalgen.chips.tables import Row, read_published, read_tiles

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
WIDTH, HEIGHT, LEFT, TOP = 330, 300, 56, 34
STYLE = "font-family='sans-serif' font-size='11' fill='#222'"


class Point(NamedTuple):
    """One mark: its place and its series."""

    x: float
    y: float
    series: str


class Axis(NamedTuple):
    """A range, where it is marked, and whether it is logarithmic."""

    low: float
    high: float
    ticks: tuple[float, ...]
    label: str
    log: bool = False

    def place(self, value: float, size: float) -> float:
        """Distance from the axis's start, of `size` in all; values outside stay at the edge."""
        scale: Callable[[float], float] = math.log if self.log else float
        value = min(max(value, self.low), self.high)
        return size * (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))


def panel(
    place: int,
    title: str,
    points: Sequence[Point],
    series: Sequence[str],
    x: Axis,
    y: Axis,
    lines: Sequence[tuple[float, float, float, float, str]],
) -> list[str]:
    """One plot; `lines` are from (x, y) to (x, y), with a dash pattern."""
    width, height = WIDTH - LEFT - 14, HEIGHT - TOP - 74

    def at(px: float, py: float) -> tuple[float, float]:
        return LEFT + x.place(px, width), TOP + height - y.place(py, height)

    out = [f"<g transform='translate({place * WIDTH},0)'>"]
    out.append(
        f"<rect x='{LEFT}' y='{TOP}' width='{width}' height='{height}' fill='#fafafa' "
        "stroke='#999'/>"
    )
    out.append(f"<text x='{LEFT}' y='{TOP - 12}' {STYLE} font-weight='bold'>{title}</text>")
    for tick in x.ticks:
        px, py = at(tick, y.low)
        out.append(
            f"<text x='{px:.1f}' y='{py + 14:.1f}' {STYLE} text-anchor='middle'>{tick:g}</text>"
        )
        out.append(f"<path d='M{px:.1f} {TOP}V{py:.1f}' stroke='#ddd' stroke-width='0.6'/>")
    for tick in y.ticks:
        px, py = at(x.low, tick)
        name = f"{tick:+.0%}" if y.label.startswith("error") else f"{tick:g}"
        out.append(
            f"<text x='{px - 5:.1f}' y='{py + 4:.1f}' {STYLE} text-anchor='end'>{name}</text>"
        )
        out.append(f"<path d='M{px:.1f} {py:.1f}h{width}' stroke='#ddd' stroke-width='0.6'/>")
    middle = LEFT + width / 2
    out.append(
        f"<text x='{middle}' y='{TOP + height + 30}' {STYLE} text-anchor='middle'>{x.label}</text>"
    )
    if place == 0:
        turn = f"rotate(-90 13 {TOP + height / 2})"
        out.append(
            f"<text x='13' y='{TOP + height / 2}' {STYLE} text-anchor='middle' transform='{turn}'>"
            f"{y.label}</text>"
        )
    for x0, y0, x1, y1, dash in lines:
        (ax, ay), (bx, by) = at(x0, y0), at(x1, y1)
        out.append(
            f"<path d='M{ax:.1f} {ay:.1f}L{bx:.1f} {by:.1f}' stroke='#555' fill='none' "
            f"stroke-dasharray='{dash}'/>"
        )
    colours = dict(zip(series, COLOURS, strict=False))
    for point in points:
        px, py = at(point.x, point.y)
        out.append(
            f"<circle cx='{px:.1f}' cy='{py:.1f}' r='2.2' fill='{colours[point.series]}' "
            "fill-opacity='0.55'/>"
        )
    left = float(LEFT)
    for name in series:
        if any(point.series == name for point in points):
            bottom = TOP + height + 50
            out.append(f"<circle cx='{left + 4}' cy='{bottom - 4}' r='4' fill='{colours[name]}'/>")
            out.append(f"<text x='{left + 12}' y='{bottom}' {STYLE}>{name}</text>")
            left += 22 + 6.2 * len(name)
    return [*out, "</g>"]


def picture(panels: Sequence[list[str]]) -> str:
    """Panels side by side, as one SVG."""
    width = WIDTH * len(panels)
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{width}' height='{HEIGHT}' "
        f"viewBox='0 0 {width} {HEIGHT}'><rect width='{width}' height='{HEIGHT}' fill='#fff'/>"
    )
    return "\n".join([head, *(line for one in panels for line in one), "</svg>"]) + "\n"


def scatter(tiles: list[Row], guesses: dict[int, float], published: list[Row]) -> str:
    """Modelled against measured milliseconds, a panel for each chip of tiles and one for MLX."""
    names = {"fwd": "forward", "bwd_dQ": "dQ", "bwd_dKV": "dK dV"}
    axes = {"M1Max": (0.3, 100.0), "M4": (0.15, 60.0)}
    ticks = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    panels: list[list[str]] = []
    for chip, (low, high) in axes.items():
        points = [
            Point(
                tiles[i].sample.seconds * 1e3,  # type: ignore[union-attr]
                seconds * 1e3,
                names[tiles[i].kernel],
            )
            for i, seconds in guesses.items()
            if tiles[i].chip is not None and tiles[i].chip.name == chip  # type: ignore[union-attr]
        ]
        marks = tuple(t for t in ticks if low <= t <= high)
        title = f"{'M1 Max' if chip == 'M1Max' else chip}: metal-flash-attention's tiles"
        x = Axis(low, high, marks, "measured, milliseconds", log=True)
        y = Axis(low, high, marks, "modelled, milliseconds", log=True)
        panels.append(
            panel(len(panels), title, points, list(names.values()), x, y, band(low, high))
        )
    found = shipped(published, DEFAULT)
    points = [
        Point(
            published[i].sample.seconds * 1e3,  # type: ignore[union-attr]
            seconds * 1e3,
            published[i].chip.product.removeprefix("Apple "),  # type: ignore[union-attr]
        )
        for i, seconds in found.items()
    ]
    low, high = 0.03, 60.0
    marks = (0.03, *ticks)
    x = Axis(low, high, marks, "measured, milliseconds", log=True)
    y = Axis(low, high, marks, "modelled, milliseconds", log=True)
    title = "MLX's own kernel (fitted rows)"
    panels.append(panel(len(panels), title, points, ["M1 Max", "M3 Max"], x, y, band(low, high)))
    return picture(panels)


def band(low: float, high: float) -> list[tuple[float, float, float, float, str]]:
    """The diagonal, and 20 % to either side."""
    return [
        (low, low, high, high, "0"),
        (low, low * 1.2, high / 1.2, high, "4 3"),
        (low * 1.2, low, high, high / 1.2, "4 3"),
    ]


def wrong(tiles: list[Row], guesses: dict[int, float]) -> str:
    """The error by head dimension, by what is cached, a panel for each chip."""
    kinds = {
        (False, False): "nothing cached",
        (False, True): "outputs",
        (True, False): "inputs",
        (True, True): "both",
    }
    panels: list[list[str]] = []
    for chip, kernels, title in (
        ("M1Max", ("fwd",), "M1 Max, forward"),
        ("M1Max", ("bwd_dQ",), "M1 Max, dQ"),
        ("M1Max", ("bwd_dKV",), "M1 Max, dK dV"),
        ("M4", ("fwd", "bwd_dQ", "bwd_dKV"), "M4, all kernels"),
    ):
        points = []
        for i, seconds in guesses.items():
            row = tiles[i]
            assert row.chip is not None and row.tile is not None and row.sample is not None
            if row.chip.name != chip or row.kernel not in kernels:
                continue
            ratio = seconds / row.sample.seconds
            kind = kinds[row.tile.cache_inputs, row.tile.cache_outputs]
            points.append(Point(row.head_dim, ratio - 1, kind))
        x = Axis(0, 264, (8, 64, 128, 192, 256), "head dimension")
        y = Axis(
            -0.8, 0.8, (-0.8, -0.4, -0.2, 0.0, 0.2, 0.4, 0.8), "error (modelled / measured - 1)"
        )
        zero = [(0.0, 0.0, 264.0, 0.0, "0")]
        panels.append(panel(len(panels), title, points, list(kinds.values()), x, y, zero))
    return picture(panels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--published", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    tiles, published = read_tiles(arguments.tiles), read_published(arguments.published)
    guesses = unseen(tiles + published, by_dimension)
    guesses = {i: seconds for i, seconds in guesses.items() if i < len(tiles)}
    for name, text in (
        ("chip-model-times.svg", scatter(tiles, guesses, published)),
        ("chip-model-errors.svg", wrong(tiles, guesses)),
    ):
        (arguments.output / name).write_text(text, encoding="utf-8")
        print(arguments.output / name)


if __name__ == "__main__":
    main()
