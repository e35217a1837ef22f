"""A Gaussian process over the points of a space: what untried schedules are likely to take.

Every valid point is known, so none of this proposes an invalid or a known one. Parameters are
ranks scaled to 0..1; the kernel is Matern 5/2 with a length scale for each parameter, in whose
distance two different values also differ by a constant, as categories do. Times are logarithms.
After Rasmussen and Williams, Gaussian Processes for Machine Learning, chapters 2, 4 and 5.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

NOISE = 1e-3
"""Variance of a measurement, of the variance of all."""
CATEGORY = 0.05
"""Squared distance of two values of a parameter, however near they are."""
LENGTH = 0.7
"""Length scale of a parameter before anything is known."""
PRIOR = 0.5
"""Strength of the belief in that length scale, in units of log-likelihood."""
SHORTEST, LONGEST, SWEEPS = 0.1, 8.0, 3


class Surrogate:
    """A Gaussian process given some points and their times.

    Args:
        points: ``(n, d)`` parameters, each from 0 to 1.
        values: ``(n,)`` logarithms of times.
        lengths: ``(d,)`` length scales, as `length_scales` finds them.
    """

    def __init__(self, points: Array, values: Array, lengths: Array) -> None:
        self.points = points
        self.lengths = lengths
        self.mean = float(values.mean())
        self.deviation = float(values.std()) or 1.0
        scaled = (values - self.mean) / self.deviation
        self.least = float(scaled.min())
        self.factor, self.weights, self.variance, _ = _fit(
            _squares(points, points), scaled, lengths
        )

    def expected(self, points: Array) -> Array:
        """``(m,)`` expected logarithms of the times of points."""
        covariance = _kernel(_squares(points, self.points), self.lengths)
        found: Array = covariance @ self.weights * self.deviation + self.mean
        return found

    def improvement(self, points: Array) -> Array:
        """``(m,)`` expected improvement of points over the best time known, in deviations.

        ``sigma (u Phi(u) + phi(u))`` with ``u = (best - mu) / sigma`` (Jones et al., 1998).
        """
        covariance = _kernel(_squares(points, self.points), self.lengths)
        mean = covariance @ self.weights
        solved = np.linalg.solve(self.factor, covariance.T)
        known = np.einsum("ij,ij->j", solved, solved)
        sigma = np.sqrt(np.maximum(1e-12, 1.0 - known) * self.variance)
        u = (self.least - mean) / sigma
        below = np.array([0.5 * (1.0 + math.erf(x)) for x in u / math.sqrt(2.0)])
        gain: Array = sigma * (u * below + np.exp(-u * u / 2.0) / math.sqrt(2.0 * math.pi))
        return gain


def length_scales(points: Array, values: Array) -> Array:
    """``(d,)`` length scales of the greatest posterior, by coordinate steps of a factor of two."""
    deviation = float(values.std()) or 1.0
    scaled = (values - values.mean()) / deviation
    squares = _squares(points, points)
    lengths = np.full(points.shape[1], LENGTH)
    best = _posterior(squares, scaled, lengths)
    for _ in range(SWEEPS):
        before = best
        for dimension in range(len(lengths)):
            for factor in (0.5, 2.0):
                trial = lengths.copy()
                trial[dimension] = min(LONGEST, max(SHORTEST, trial[dimension] * factor))
                value = _posterior(squares, scaled, trial)
                if value > best:
                    best, lengths = value, trial
        if best == before:
            break
    return lengths


def _posterior(squares: Array, scaled: Array, lengths: Array) -> float:
    likelihood = _fit(squares, scaled, lengths)[3]
    return likelihood - PRIOR * float(np.sum(np.log(lengths / LENGTH) ** 2))


def _squares(a: Array, b: Array) -> Array:
    """``(d, n, m)`` squared distances in each parameter."""
    apart: Array = np.abs(a.T[:, :, None] - b.T[:, None, :])
    squares: Array = np.asarray(apart * apart + CATEGORY * (apart > 0))
    return squares


def _kernel(squares: Array, lengths: Array) -> Array:
    r: Array = np.sqrt(5.0 * np.tensordot(1.0 / lengths**2, squares, 1))
    kernel: Array = np.asarray((1.0 + r + r * r / 3.0) * np.exp(-r))
    return kernel


def _fit(squares: Array, scaled: Array, lengths: Array) -> tuple[Array, Array, float, float]:
    """Cholesky factor, weights, variance and log marginal likelihood (up to a constant)."""
    n = len(scaled)
    factor = np.linalg.cholesky(_kernel(squares, lengths) + NOISE * np.eye(n))
    weights = np.linalg.solve(factor.T, np.linalg.solve(factor, scaled))
    variance = max(1e-6, float(scaled @ weights) / n)
    likelihood = -0.5 * n * math.log(variance) - float(np.log(np.diag(factor)).sum())
    return factor, weights, variance, likelihood
