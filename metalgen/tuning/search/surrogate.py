"""A Gaussian process over the points of a space: what untried schedules are likely to take.

Every valid point is known, so none of this proposes an invalid or a known one. Parameters are
ranks scaled to 0..1; the kernel is Matern 5/2 with a length scale for each parameter, in whose
distance two different values also differ by a constant, as categories do. Times are logarithms,
compressed above the best (`outcomes`). After Rasmussen and Williams, Gaussian Processes for
Machine Learning, chapters 2, 4 and 5.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metalgen.tuning.search.finite import CATEGORY

Array = NDArray[np.floating[Any]]

NOISE = 1e-2
"""Variance of a measurement, of the variance of all. It also covers what the kernel cannot say."""
LENGTH = 1.5
"""Length scale of a parameter before anything is known."""
PRIOR = 0.5
"""Strength of the belief in that length scale, in units of log-likelihood."""
SHORTEST, LONGEST, SWEEPS = 0.1, 8.0, 3
KNEE = 0.5
"""Logarithm of the time over the best from where differences count less and less."""
MARGIN = 0.05
"""Improvement that is asked for beyond the best known, in deviations."""


def outcomes(times: Array) -> Array:
    """``(n,)`` what the surrogate learns of ``(n,)`` times; what failed counts as the slowest.

    ``log(1 + log(time / best) / KNEE)``: how much slower the slow ones are says little about
    where the fast ones lie. Then scaled to mean 0 and deviation 1. At least one time is finite.
    """
    ran = np.isfinite(times)
    apart = np.log(np.where(ran, times, times[ran].max()) / times[ran].min())
    values = np.log1p(apart / KNEE)
    scaled: Array = (values - values.mean()) / (float(values.std()) or 1.0)
    return scaled


class Surrogate:
    """A Gaussian process given some points, asked about a fixed set of others.

    What it knows of the candidates is kept, so that one more point costs one more row.

    Args:
        points: ``(n, d)`` parameters of what was measured, each from 0 to 1.
        candidates: ``(m, d)`` parameters of what may be asked about.
        lengths: ``(d,)`` length scales, as `length_scales` finds them.
        room: how many points it will know at most.
    """

    def __init__(self, points: Array, candidates: Array, lengths: Array, room: int) -> None:
        self.candidates = candidates
        self.lengths = lengths
        self.size = 0
        self._points = np.zeros((room, points.shape[1]))
        self._inverse = np.zeros((room, room))  # of the Cholesky factor
        self._solved = np.zeros((room, len(candidates)))  # factor^-1 covariance
        self._explained = np.zeros(len(candidates))
        for point in points:
            self.add(point)

    def with_room(self, more: int) -> Surrogate:
        """A copy that can take so many more points, whatever this one will be told."""
        n = self.size
        copy = Surrogate(self._points[:0], self.candidates, self.lengths, n + more)
        copy.size = n
        copy._points[:n] = self._points[:n]
        copy._inverse[:n, :n] = self._inverse[:n, :n]
        copy._solved[:n] = self._solved[:n]
        copy._explained += self._explained
        return copy

    def add(self, point: Array) -> None:
        """One more point, of ``(d,)`` parameters, was measured."""
        n, one = self.size, point[None]
        known = _covariance(one, self._points[:n], self.lengths)[0]
        row = _product(self._inverse[:n, :n].T, known)
        diagonal = math.sqrt(max(1e-12, 1.0 + NOISE - float((row * row).sum())))
        covariance = _covariance(one, self.candidates, self.lengths)[0]
        self._points[n] = point
        self._inverse[n, :n] = _product(self._inverse[:n, :n], row) / -diagonal
        self._inverse[n, n] = 1.0 / diagonal
        self._solved[n] = (covariance - _product(self._solved[:n], row)) / diagonal
        self._explained += self._solved[n] ** 2
        self.size += 1

    def expected(self, values: Array) -> tuple[Array, Array]:
        """``(m,)`` means and ``(m,)`` deviations of every candidate, given ``(n,)`` `outcomes`."""
        n = self.size
        weights = _product(self._inverse[:n, :n].T, values)
        variance = max(1e-6, float((weights * weights).sum()) / n)
        means = _product(self._solved[:n], weights)
        return means, np.sqrt(np.maximum(1e-12, 1.0 - self._explained) * variance)

    def improvement(self, values: Array) -> Array:
        """``(m,)`` expected improvement of every candidate over the best known by `MARGIN`.

        ``sigma (u Phi(u) + phi(u))`` with ``u = (best - margin - mu) / sigma`` (Jones et al.,
        1998).
        """
        mean, sigma = self.expected(values)
        u = (float(values.min()) - MARGIN - mean) / sigma
        below = np.array([0.5 * math.erfc(x) for x in (u / -math.sqrt(2.0)).tolist()])
        gain: Array = sigma * (u * below + np.exp(-u * u / 2.0) / math.sqrt(2.0 * math.pi))
        return gain


def length_scales(points: Array, values: Array) -> Array:
    """``(d,)`` length scales of the greatest posterior, by coordinate steps of a factor of two."""
    apart = np.abs(points.T[:, :, None] - points.T[:, None, :])
    squares = apart * apart + CATEGORY * (apart > 0)
    lengths = np.full(points.shape[1], LENGTH)
    best = _posterior(squares, values, lengths)
    for _ in range(SWEEPS):
        before = best
        for dimension in range(len(lengths)):
            for factor in (0.5, 2.0):
                trial = lengths.copy()
                trial[dimension] = min(LONGEST, max(SHORTEST, trial[dimension] * factor))
                value = _posterior(squares, values, trial)
                if value > best:
                    best, lengths = value, trial
                    break
        if best == before:
            break
    return lengths


def _posterior(squares: Array, values: Array, lengths: Array) -> float:
    """Log marginal likelihood and prior, up to a constant; the variance is the likeliest one."""
    n = len(values)
    covariance = _matern(np.einsum("d,dij->ij", 1.0 / lengths**2, squares))
    left = np.column_stack([covariance + NOISE * np.eye(n), values])
    determinant = explained = 0.0
    for k in range(n):  # Gauss's elimination of a symmetric matrix and its right-hand side
        row = left[k, k + 1 :] / left[k, k]
        determinant += math.log(left[k, k])
        explained += float(left[k, n] * row[-1])
        left[k + 1 :, k + 1 :] -= left[k, k + 1 : n, None] * row
    likelihood = -0.5 * (n * math.log(max(1e-6, explained / n)) + determinant)
    return likelihood - PRIOR * float(np.sum(np.log(lengths / LENGTH) ** 2))


def _product(matrix: Array, vector: Array) -> Array:
    """``(m,)``: a row ``(n,)`` times a matrix ``(n, m)``.

    Nothing here calls BLAS, whose threads wait for each other: beside compilers that use every
    core, an ask took ten times as long.
    """
    found: Array = np.einsum("i,ij->j", vector, matrix)
    return found


def _covariance(a: Array, b: Array, lengths: Array) -> Array:
    """``(n, m)`` of ``(n, d)`` and ``(m, d)`` points."""
    squares = np.zeros((len(a), len(b)))
    for one, other, length in zip(a.T, b.T, lengths, strict=True):
        apart = np.abs(one[:, None] - other[None])
        squares += (apart * apart + CATEGORY * (apart > 0)) / length**2
    return _matern(squares)


def _matern(squares: Array) -> Array:
    r: Array = np.sqrt(5.0 * squares)
    kernel: Array = (1.0 + r + r * r / 3.0) * np.exp(-r)
    return kernel
