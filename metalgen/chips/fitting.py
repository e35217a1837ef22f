"""Fits the model's coefficients to measured times: least squares of logarithms, made robust.

The result depends on the table and on nothing else: no random numbers, one starting point.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from metalgen.chips.chip import Chip
from metalgen.chips.coefficients import FITTED, PRIOR, Coefficients
from metalgen.chips.model import estimate
from metalgen.chips.work import Work
from metalgen.errors import ArgumentError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Vector = NDArray[np.float64]

OUTLIER = 0.1
"""Logarithmic error from which a row counts by its size and not by its square."""
PULL = 0.03
"""How far a coefficient is drawn to its prior: an e-fold off costs what this error of all rows
costs. It decides those that a table says nothing about."""
ITERATIONS = 30
DIGITS = 4
"""Significant digits that are kept of a fitted value."""


class Sample(NamedTuple):
    """One measured launch.

    Args:
        work, chip: what ran where.
        seconds: how long it took.
        launch: whether that includes the launch: a GPU's own clock does not see it.
        group: n rows of one chip and group count together as much as the root of n alone would,
            so that neither the largest nor the smallest group decides.
    """

    work: Work
    chip: Chip
    seconds: float
    launch: bool = False
    group: str = ""


def modelled(sample: Sample, coefficients: Coefficients) -> float:
    """The modelled seconds of a sample."""
    prediction = estimate(sample.work, sample.chip, coefficients)
    return prediction.seconds - (0.0 if sample.launch else prediction.parts["launch"])


def fit(samples: Sequence[Sample], start: Coefficients = PRIOR) -> Coefficients:
    """The coefficients that fit measured times best, drawn towards `PRIOR`.

    Levenberg and Marquardt's method on the logarithms of the coefficients, with derivatives by
    differences. Only those in `FITTED` change; they stay above zero.

    Raises:
        ArgumentError: fewer rows than coefficients.
    """
    import numpy as np

    if len(samples) < len(FITTED):
        raise ArgumentError("table", f"at least {len(FITTED)} rows to fit", len(samples))
    pull = PULL * len(samples) ** 0.5
    prior = _logs(PRIOR)
    sizes = Counter((s.chip.name, s.group) for s in samples)
    shares = np.array([sizes[s.chip.name, s.group] ** -0.5 for s in samples], dtype=np.float64)
    weights = np.sqrt(shares / shares.mean())

    def residuals(point: Vector) -> Vector:
        coefficients = _coefficients(point)
        errors = np.log(
            [modelled(s, coefficients) / s.seconds for s in samples],
            dtype=np.float64,
        )
        size = np.sqrt(2 * (np.sqrt(1 + (errors / OUTLIER) ** 2) - 1)) * OUTLIER
        return np.concatenate([weights * np.sign(errors) * size, pull * (point - prior)])

    point = _logs(start)
    now = residuals(point)
    damping = 1e-2
    for _ in range(ITERATIONS):
        steps = 1e-4 * np.eye(len(point))
        slopes = np.stack([(residuals(point + step) - now) / 1e-4 for step in steps], axis=1)
        square, gradient = slopes.T @ slopes, slopes.T @ now
        cost, gain = now @ now, 0.0
        while gain <= 0 and damping < 1e8:
            scaled = square + damping * np.diag(np.diag(square))
            moved = point + np.clip(np.linalg.solve(scaled, -gradient), -0.7, 0.7)
            there = residuals(moved)
            gain = float(cost - there @ there)
            damping = damping / 5 if gain > 0 else damping * 5
        if gain <= 0:
            break
        point, now = moved, there
        if gain < 1e-4 * cost:
            break
    return _coefficients(point)


def rounded(coefficients: Coefficients) -> dict[str, float]:
    """The fitted values, as they are kept."""
    return {name: float(f"{getattr(coefficients, name):.{DIGITS}g}") for name in FITTED}


def as_module(values: Mapping[str, float]) -> str:
    """The text of ``metalgen/chips/fitted.py``."""
    lines = "".join(f'    "{name}": {value!r},\n' for name, value in values.items())
    return (
        '"""Fitted coefficients of the chip model, as ``metalgen chips fit`` writes them."""\n\n'
        "from __future__ import annotations\n\n"
        f"VALUES = {{\n{lines}}}\n"
    )


def _logs(coefficients: Coefficients) -> Vector:
    import numpy as np

    return np.log([getattr(coefficients, name) for name in FITTED], dtype=np.float64)


def _coefficients(point: Vector) -> Coefficients:
    import math

    values = {name: math.exp(x) for name, x in zip(FITTED, point.tolist(), strict=True)}
    return PRIOR._replace(**values)
