"""The Gaussian process, against the textbook formulas written out point by point."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import numpy as np
import pytest
from test_replay import bowl

from metalgen.tuning.search import search as searching
from metalgen.tuning.search.search import Search
from metalgen.tuning.search.surrogate import (
    CATEGORY,
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


@pytest.mark.parametrize(("large", "rows"), [(120, 400), (400, 24), (120, 24)])
def test_in_a_large_space_and_with_many_rows_a_search_still_goes_on_as_it_would_and_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int, rows: int
) -> None:
    monkeypatch.setattr(searching, "LARGE", large)
    monkeypatch.setattr(searching, "ROWS", rows)
    space = bowl(tmp_path)

    def run(known: list[tuple[int, int]], count: int) -> list[tuple[int, int]]:
        search = Search(space, list(space.times), 1)
        for entry in known:
            search.tell(entry, space.times[entry])
        while len(search.times) < count and (entry := search.ask()) is not None:
            search.tell(entry, space.times[entry])
        return list(search.times)

    whole = run([], 70)
    assert len(set(whole)) == 70
    assert (13, 6) in whole
    for stop in (9, 23, 41, 69):
        assert run(whole[:stop], 70) == whole


def test_rows_that_were_never_asked_for_are_learnt_from(tmp_path: Path) -> None:
    space = bowl(tmp_path)
    told = random.Random(0).sample(list(space.times), 30)
    search = Search(space, list(space.times), 2)
    for entry in told:
        search.tell(entry, space.times[entry])
    asked = []
    for _ in range(20):
        entry = search.ask()
        assert entry is not None
        search.tell(entry, space.times[entry])
        asked.append(entry)
    assert not set(asked) & set(told)
    assert (13, 6) in {*asked, *told}
