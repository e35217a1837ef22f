"""The Gaussian process, against the textbook formulas written out point by point."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from metalgen.tuning.search.finite import CATEGORY
from metalgen.tuning.search.surrogate import (
    LENGTH,
    LONGEST,
    MARGIN,
    NOISE,
    PRIOR,
    SHORTEST,
    Surrogate,
    length_scales,
    outcomes,
)

DRAW = np.random.default_rng(1)
POINTS = DRAW.integers(0, 5, (14, 3)) / 4.0
VALUES = outcomes(np.exp(POINTS[:, 0] - POINTS[:, 1] ** 2))
ASKED = np.array(list(itertools.product((0.0, 0.25, 1.0), repeat=3)))
LENGTHS = np.array([0.7, 1.5, 3.0])


def kernel(a: np.ndarray, b: np.ndarray, lengths: np.ndarray = LENGTHS) -> float:
    """Matern 5/2 of two points, every two values further apart by the square root of CATEGORY."""
    squares = ((x - y) ** 2 + (CATEGORY if x != y else 0.0) for x, y in zip(a, b, strict=True))
    r = math.sqrt(5 * sum(s / length**2 for s, length in zip(squares, lengths, strict=True)))
    return (1 + r + r * r / 3) * math.exp(-r)


def posterior(point: np.ndarray) -> tuple[float, float]:
    """Mean and deviation by the inverse of the covariance (Rasmussen and Williams, 2.25-2.26)."""
    n = len(POINTS)
    inverse = np.linalg.inv([[kernel(a, b) for b in POINTS] for a in POINTS] + NOISE * np.eye(n))
    cross = np.array([kernel(point, b) for b in POINTS])
    variance = VALUES @ inverse @ VALUES / n
    return cross @ inverse @ VALUES, math.sqrt((1 - cross @ inverse @ cross) * variance)


def grown(first: int) -> Surrogate:
    """All of POINTS: some at once, the others one by one."""
    surrogate = Surrogate(POINTS[:first], ASKED, LENGTHS, len(POINTS))
    for point in POINTS[first:]:
        surrogate.add(point)
    return surrogate


@pytest.mark.parametrize("first", [1, 8, len(POINTS)])
def test_means_and_deviations_are_those_of_the_textbook_however_the_points_came(
    first: int,
) -> None:
    means, deviations = grown(first).expected(VALUES)
    expected = np.array([posterior(point) for point in ASKED])
    assert means == pytest.approx(expected[:, 0], abs=1e-9)
    assert deviations == pytest.approx(expected[:, 1], abs=1e-9)


def test_the_expected_improvement_is_the_mean_over_draws() -> None:
    surrogate = grown(8)
    means, deviations = surrogate.expected(VALUES)
    draws = means[:, None] + deviations[:, None] * DRAW.standard_normal((len(ASKED), 200_000))
    gains = np.maximum(VALUES.min() - MARGIN - draws, 0.0)
    spread = gains.std(axis=1) / math.sqrt(200_000)
    assert (np.abs(surrogate.improvement(VALUES) - gains.mean(axis=1)) <= 5 * spread + 1e-9).all()


def test_the_length_scales_are_no_worse_than_any_beside_them_by_the_marginal_likelihood() -> None:
    def objective(lengths: np.ndarray) -> float:
        n = len(POINTS)
        matrix = np.array([[kernel(a, b, lengths) for b in POINTS] for a in POINTS])
        matrix += NOISE * np.eye(n)
        variance = VALUES @ np.linalg.inv(matrix) @ VALUES / n
        likelihood = -0.5 * (n * math.log(variance) + np.linalg.slogdet(matrix)[1])
        return float(likelihood - PRIOR * np.sum(np.log(lengths / LENGTH) ** 2))

    found = length_scales(POINTS, VALUES)
    assert objective(found) > objective(np.full(3, LENGTH))
    for dimension, factor in itertools.product(range(3), (0.5, 2.0)):
        other = found.copy()
        other[dimension] *= factor
        assert SHORTEST <= other[dimension] <= LONGEST
        assert objective(other) <= objective(found) + 1e-9


def test_a_parameter_that_does_nothing_gets_a_long_scale() -> None:
    points = np.random.default_rng(0).random((40, 2))
    lengths = length_scales(points, outcomes(np.exp(np.sin(6 * points[:, 0]))))
    assert lengths[1] > 2 * lengths[0]


def test_outcomes_keep_the_order_flatten_the_slow_and_count_failures_as_the_slowest() -> None:
    found = outcomes(np.array([1.0, 1.1, 8.0, 8.8, math.inf]))
    assert found.mean() == pytest.approx(0.0, abs=1e-12)
    assert found.std() == pytest.approx(1.0)
    assert found[0] < found[1] < found[2] < found[3] == found[4]
    assert found[1] - found[0] > 4 * (found[3] - found[2])


def test_a_copy_with_more_room_knows_the_same_and_learns_by_itself() -> None:
    surrogate = Surrogate(POINTS[:9], ASKED, LENGTHS, 9)
    copy = surrogate.with_room(5)
    for point in POINTS[9:]:
        copy.add(point)
    values, before = VALUES[:9], Surrogate(POINTS[:9], ASKED, LENGTHS, 9)
    assert np.array_equal(surrogate.expected(values), before.expected(values))
    assert np.array_equal(copy.expected(VALUES), grown(9).expected(VALUES))
