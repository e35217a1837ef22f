"""A space of which every valid point is known, as Optuna's samplers and ours see it.

Nothing here knows what a schedule is: a point is a value for each of its parameters. A parameter
that has no choice at a point, because of the values of those before it, is absent there.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

Params = Mapping[str, Any]
"""Values of the parameters of a point, by name."""
CATEGORY = 0.05
"""Squared distance of two values of a parameter, however near they are."""


class FiniteSpace:
    """Known points of named parameters.

    Args:
        choices: of each parameter its values in their order; parameters in the order in which they
            are suggested. The condition on which one is absent depends on those before it only.
        points: the parameters of every valid point, each point once.
        inactive: the value that a parameter counts as where it is absent; one of its own for those
            that are not named.

    Attributes:
        ranks: ``(n, d)`` the place of each point's values in the parameter's order.
        scaled: ``(n, d')`` the same from 0 to 1, of the parameters that differ anywhere.
    """

    def __init__(
        self,
        choices: Mapping[str, Sequence[Hashable]],
        points: Iterable[Params],
        inactive: Params | None = None,
    ) -> None:
        self.choices = {name: tuple(values) for name, values in choices.items()}
        self.points = [dict(point) for point in points]
        self._index = {frozenset(point.items()): n for n, point in enumerate(self.points)}
        if not self.points or len(self._index) < len(self.points):
            raise ValueError("points: expected at least one, and none twice")
        self._orders: dict[str, dict[Any, int]] = {}
        absent: dict[str, int] = {}
        for name, values in self.choices.items():
            order = self._orders[name] = {value: n for n, value in enumerate(values)}
            absent[name] = order.get((inactive or {}).get(name), len(order))
        names = list(self.choices)
        self.present = np.array([[name in point for name in names] for point in self.points])
        self.present = self.present.reshape(len(self.points), len(names))
        try:
            ranks = [
                [self._orders[n][p[n]] if n in p else absent[n] for n in names] for p in self.points
            ]
        except KeyError as error:
            raise ValueError(f"points: a value {error.args[0]!r} that is no choice") from None
        self.ranks = np.array(ranks, dtype=np.int16).reshape(self.present.shape)
        codes = self.ranks - self.ranks.min(axis=0)
        top = codes.max(axis=0)
        self.scaled: NDArray[np.float64] = codes[:, top > 0] / top[top > 0]

    def __len__(self) -> int:
        return len(self.points)

    def index(self, params: Params) -> int | None:
        """The number of the point that has exactly these parameters."""
        try:
            return self._index.get(frozenset(params.items()))
        except TypeError:  # a value that is not even hashable
            return None

    @functools.cached_property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's distribution of each parameter that has a choice."""
        return {
            name: distribution(values) for name, values in self.choices.items() if len(values) > 1
        }

    def suggest(self, trial: Trial) -> int:
        """Let a trial suggest a point, parameter by parameter; returns its number.

        Raises:
            ValueError: the sampler suggested what is no point of the space.
        """
        left = np.ones(len(self.points), dtype=bool)
        for column, name in enumerate(self.choices):
            if name not in self.distributions or not self.present[left, column].any():
                continue
            value = suggest(trial, name, self.distributions[name])
            left &= self.ranks[:, column] == self._orders[name].get(value, -1)
            if not left.any():
                raise ValueError(f"the sampler suggested {trial.params}, which is no valid point")
        return int(np.flatnonzero(left)[0])

    def nearest(self, params: Params, allowed: NDArray[np.bool_]) -> NDArray[np.intp]:
        """The points nearest to any values, of those allowed: several where they are as near.

        The distance of two values of an ordered parameter is that of their places, over all places
        (a value between two choices lies between their places); of two others it is 1.
        """
        squares = np.zeros(len(self.points))
        for column, (name, values) in enumerate(self.choices.items()):
            if name not in params or len(values) < 2:
                continue
            apart = np.abs(self.ranks[:, column] - self._place(name, params[name]))
            if is_ordered(values):
                apart = apart / (len(values) - 1)
            else:
                apart = (apart > 0).astype(float)
            squares += (apart * apart + CATEGORY * (apart > 0)) * self.present[:, column]
        squares[~allowed] = math.inf
        found: NDArray[np.intp] = np.flatnonzero(squares <= squares.min() * (1 + 1e-9))
        return found

    def rounded(self, params: Params) -> dict[str, Any]:
        """The same with each value of an ordered parameter replaced by the nearest choice."""
        found = dict(params)
        for name in params:
            if is_ordered(self.choices[name]):
                found[name] = self.choices[name][round(self._place(name, params[name]))]
        return found

    def matches(self, params: Params, number: int) -> bool:
        """Whether a point has these values, but for parameters that are absent there."""
        return self.points[number].items() <= params.items()

    def neighbours(self, number: int) -> list[int]:
        """The points that differ from one in a single parameter."""
        found: list[int] = (
            ((self.ranks != self.ranks[number]).sum(axis=1) == 1).nonzero()[0].tolist()
        )
        return found

    def _place(self, name: str, value: Any) -> float:
        values = self.choices[name]
        if value in self._orders[name] or not is_ordered(values):
            return float(self._orders[name].get(value, -1))
        scale = np.log if values[0] > 0 and value > 0 else np.asarray  # type: ignore[operator]
        return float(np.interp(scale(value), scale(np.array(values)), np.arange(len(values))))


def is_ordered(values: Sequence[Any]) -> bool:
    """Whether choices are numbers in ascending order."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return numbers and list(values) == sorted(values)


def distribution(values: Sequence[Any]) -> BaseDistribution:
    """Optuna's distribution of a parameter's choices: integers where it can say them.

    Integers with equal steps between them, or else, where they are positive, on a logarithmic
    scale: then a sampler may suggest others, and `RestrictedSampler` takes the nearest choice.
    """
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if is_ordered(values) and all(isinstance(v, int) for v in values) and len(values) > 1:
        steps = {b - a for a, b in itertools.pairwise(values)}
        if len(steps) == 1:
            return IntDistribution(values[0], values[-1], step=steps.pop())
        if values[0] > 0:
            return IntDistribution(values[0], values[-1], log=True)
    return CategoricalDistribution(values)


def suggest(trial: Trial, name: str, declared: BaseDistribution) -> Any:
    """Let a trial suggest a value of a distribution."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(declared, CategoricalDistribution):
        return trial.suggest_categorical(name, declared.choices)
    assert isinstance(declared, IntDistribution)
    low, high = declared.low, declared.high
    return trial.suggest_int(name, low, high, step=declared.step, log=declared.log)
