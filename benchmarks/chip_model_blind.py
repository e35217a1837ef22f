"""How much the chip model's score owes to figures that were set by hand.

    python benchmarks/chip_model_blind.py --tiles FILE.csv --published FILE.csv

First each figure is moved a fifth down and a quarter up, and the coefficients are fitted anew. Then
six of them are chosen anew by every second head dimension, from values that switch their mechanism
off, and scored on the others. Some minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from metalgen.chips import adapters, fitting
from metalgen.chips.coefficients import PRIOR, Coefficients
from metalgen.chips.fitting import fit
from metalgen.chips.scoring import overall, score, shipped
from metalgen.chips.tables import Row, read_published, read_tiles

OFF: dict[str, float] = {
    "adrift": PRIOR.in_step,
    "AHEAD": 0,
    "UNROLLED": 10**9,
    "SECTOR": adapters.LINE,
    "BRANCH": 0,
    "near": 131072.0,
}
GRID: dict[str, Sequence[float]] = {
    "adrift": (PRIOR.in_step, 0.33, 0.36, 0.39, 0.42, 0.45, 0.5),
    "AHEAD": (0, 16, 32, 48, 64),
    "UNROLLED": (10**9, 240, 290, 340, 390),
    "SECTOR": (128, 64, 32),
    "BRANCH": (0, 5, 10, 15),
    "near": (131072.0, 32768.0, 49152.0, 65536.0, 98304.0),
}
"""In capitals: figures of `metalgen.chips.adapters`; the others are coefficients."""
LIMITS = (0.08, 0.2, 0.1)
"""Goals for median error, 90th percentile and worst regret: what a choice is judged by."""


def set_figures(figures: Mapping[str, float]) -> None:
    """Puts figures in place, in this process."""
    for name, value in figures.items():
        if name.isupper():
            setattr(adapters, name, value)
    coefficients = {name: value for name, value in figures.items() if not name.isupper()}
    fitting.PRIOR = PRIOR._replace(**coefficients)  # type: ignore[attr-defined]
    adapters._touched.cache_clear()


def fitted(path: Path, published: Sequence[Row], dims: set[int]) -> tuple[list[Row], Coefficients]:
    """All tiles as the present figures count them, and a fit to those of some dimensions."""
    rows = read_tiles(path)
    seen = [row for row in rows if row.head_dim in dims]
    samples = [row.sample for row in [*seen, *published] if row.sample]
    return rows, fit(samples, fitting.PRIOR)  # type: ignore[attr-defined]


def told(rows: Sequence[Row], coefficients: Coefficients) -> str:
    """The scores of some rows, as text."""
    seconds = shipped(rows, coefficients)
    total = overall(rows, seconds)
    chips = score(rows, seconds, together=True)
    return (
        f"median {total.median_error:.1%}, 90 % {total.p90_error:.1%}, worst regret "
        f"{total.worst_regret:.1%}; "
        + ", ".join(f"{s.chip} 90 % {s.p90_error:.1%} regret {s.worst_regret:.1%}" for s in chips)
    )


def badness(rows: Sequence[Row], coefficients: Coefficients) -> float:
    """The mean over chips, kernels and types of all scores, in units of their goals."""
    parts = []
    for s in score(rows, shipped(rows, coefficients)):
        values = (s.median_error or 0.0, s.p90_error or 0.0, s.worst_regret or 0.0)
        parts.append(sum(value / limit for value, limit in zip(values, LIMITS, strict=True)))
    return sum(parts) / len(parts)


def sensitivity(path: Path, published: Sequence[Row], dims: set[int]) -> None:
    """The score with each figure moved."""
    names = [*GRID, "live_registers", "OCCUPANCY_REGISTERS"]
    figures = {n: getattr(adapters if n.isupper() else PRIOR, n) for n in names}
    print(f"{'as it is':28}", told(*fitted(path, published, dims)))
    for name, value in figures.items():
        factors = (0.5, 2.0) if name == "SECTOR" else (0.8, 1.25)
        for factor in factors:
            moved = int(value * factor) if isinstance(value, int) else value * factor
            set_figures(figures | {name: moved})
            print(f"{name} {value:g} -> {moved:g}".ljust(28), told(*fitted(path, published, dims)))
    set_figures(figures)


def chosen(path: Path, published: Sequence[Row], dims: set[int]) -> dict[str, float]:
    """Figures that some dimensions prefer, one after the other, twice."""
    figures = dict(OFF)
    for _ in range(2):
        for name, values in GRID.items():
            found = []
            for value in values:
                set_figures(figures | {name: value})
                rows, coefficients = fitted(path, published, dims)
                seen = [row for row in rows if row.head_dim in dims]
                found.append((badness(seen, coefficients), value))
            figures[name] = min(found)[1]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiles", type=Path, required=True)
    parser.add_argument("--published", type=Path, required=True)
    arguments = parser.parse_args()
    published = read_published(arguments.published)
    dims = sorted({row.head_dim for row in read_tiles(arguments.tiles)})
    sensitivity(arguments.tiles, published, set(dims))
    for half in (dims[0::2], dims[1::2]):
        print(f"\nChosen by D={', '.join(map(str, half))}")
        for title, figures in (
            ("those", chosen(arguments.tiles, published, set(half))),
            ("all switched off", OFF),
        ):
            set_figures(figures)
            rows, coefficients = fitted(arguments.tiles, published, set(half))
            others = [row for row in rows if row.head_dim not in half]
            print(f"  {title}: {', '.join(f'{n} {v:g}' for n, v in figures.items())}")
            print(f"  on the others: {told(others, coefficients)}")


if __name__ == "__main__":
    main()
