"""Optuna's own tests of samplers, on ours, as far as they fit a space of known points.

What does not fit: parameters that are drawn from an interval have no finite number of values. Ours
leaves them to Optuna's random sampler, one by one; so it has no relative parameters for the cases
of `RelativeSamplerTestCase` in which one of the two is such a parameter, and these are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    RelativeSamplerTestCase,
    SingleOnlySamplerTestCase,
)

from metalgen.tuning.search.finite import FiniteSpace
from metalgen.tuning.search.samplers import FiniteGPSampler, RestrictedSampler, UniformSampler


class _OwnSamplers(BasicSamplerTestCase, SingleOnlySamplerTestCase):
    @pytest.fixture(params=[FiniteGPSampler, UniformSampler])
    def sampler(self, request: pytest.FixtureRequest) -> Callable[[], BaseSampler]:
        return functools.partial(request.param, seed=0)


class TestOwnSamplers(_OwnSamplers):
    """Without a space: what the distributions of a study say is searched."""


class TestOwnSamplersOfCountableParameters(_OwnSamplers, RelativeSamplerTestCase):
    """The cases that sample parameters together."""

    COUNTABLE = (
        FloatDistribution(-10, 10, step=0.5),
        IntDistribution(3, 10),
        IntDistribution(1, 100, log=True),
        IntDistribution(3, 9, step=2),
    )

    @pytest.mark.parametrize("x_distribution", COUNTABLE)
    @pytest.mark.parametrize("y_distribution", COUNTABLE)
    def test_sample_relative_numerical(
        self,
        sampler: Callable[[], BaseSampler],
        x_distribution: FloatDistribution,
        y_distribution: FloatDistribution,
    ) -> None:
        super().test_sample_relative_numerical(sampler, x_distribution, y_distribution)

    @pytest.mark.parametrize("x_distribution", COUNTABLE[:3])
    def test_sample_relative_mixed(
        self, sampler: Callable[[], BaseSampler], x_distribution: FloatDistribution
    ) -> None:
        super().test_sample_relative_mixed(sampler, x_distribution)


class TestARestrictedSampler(SingleOnlySamplerTestCase):
    """Around Optuna's TPE, on a space of its own: what the suite suggests is none of it."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        space = FiniteSpace({"k": (1, 2, 4)}, [{"k": k} for k in (1, 2, 4)])
        return lambda: RestrictedSampler(TPESampler(seed=0), space, seed=0)
