"""Optuna samplers for a space of which every valid point is known: none is tried twice.

`FiniteGPSampler` asks a Gaussian process (`metalgen.tuning.search.surrogate`). `RestrictedSampler`
makes any other sampler of Optuna's see valid points only. `UniformSampler` draws.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from metalgen.tuning.search.finite import FiniteSpace
from metalgen.tuning.search.surrogate import Surrogate, length_scales, outcomes

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from optuna.study import Study

    from metalgen.tuning.search.surrogate import Array

POINT = "finite:point"
"""The system attribute of a trial that holds the number of the point that it was given."""
STARTUP = 8
"""Trials before the Gaussian process is asked."""
SPREAD = 16
"""Before that, of so many drawn points the one is tried that is furthest from those tried
(Mitchell's best candidate)."""
GROWTH = 1.25
"""Its length scales are found anew when the known outcomes have grown by this factor."""
LARGE = 16_384
"""In a space of more points the process is asked about so many, drawn anew with each refit and each
new best, and about the neighbours of the best."""
ROUND_BEST = 4
"""Best points whose neighbours are asked about in a large space."""
ROWS = 400
"""Of more outcomes the process is given the better half of so many and the latest others."""
ATTEMPTS = 24
"""Suggestions of another sampler that may be invalid or tried already, before the valid point that
is nearest to the first of them is taken; fewer where it repeats itself."""
TIE = 1e-6
"""Relative difference of expected improvements up to which they count as equal."""
LARGEST_PRODUCT = 1 << 17
"""Points of the largest product of distributions that is searched where no space was given."""
FAILED = math.inf
"""What a failed trial counts as: worse than any."""


@dataclasses.dataclass
class History:
    """What the trials of a study say of the points of a space.

    Attributes:
        costs: of points with an outcome, by number, in the order of their trials: positive, less
            is better; infinity for what failed.
        pending: points that are being tried, in the order of their trials.
        waiting: points that are enqueued.
    """

    costs: dict[int, float] = dataclasses.field(default_factory=dict)
    pending: list[int] = dataclasses.field(default_factory=list)
    waiting: list[int] = dataclasses.field(default_factory=list)

    def free(self, count: int) -> NDArray[np.bool_]:
        """Whether each of `count` points is untried."""
        free = np.ones(count, dtype=bool)
        free[[*self.costs, *self.pending, *self.waiting]] = False
        return free


def history(study: Study, trial: FrozenTrial, space: FiniteSpace) -> History:
    """What is known of a space's points when a trial is sampled; other trials do not count.

    A trial that was pruned counts with the median of what it reported, and where several trials
    are of one point the first counts.
    """
    found, values = History(), dict[int, float]()
    for other in study.get_trials(deepcopy=False):
        if other.number == trial.number:
            continue
        if other.state == TrialState.WAITING:
            index = space.index(other.system_attrs.get("fixed_params", {}))
            if index is not None:
                found.waiting.append(index)
            continue
        params = {name: other.params[name] for name in other.params if name in space.choices}
        index = space.index(params)
        if index is None and other.state == TrialState.RUNNING:  # known, and not yet suggested
            fixed = space.index(other.system_attrs.get("fixed_params", {}))
            index = other.system_attrs.get(POINT, fixed)
        if index is None or index in values:
            continue
        if other.state == TrialState.RUNNING:
            found.pending.append(index)
        elif other.state == TrialState.COMPLETE and other.value is not None:
            values[index] = other.value
        elif other.state == TrialState.PRUNED and other.intermediate_values:
            values[index] = statistics.median(other.intermediate_values.values())
        else:
            values[index] = math.nan
    found.costs = _costs(values, study.direction)
    found.pending = [n for n in dict.fromkeys(found.pending) if n not in values]
    return found


def _costs(values: Mapping[int, float], direction: StudyDirection) -> dict[int, float]:
    """Values as positive costs, in proportion where all of one sign; NaN becomes infinity."""
    known = [v for v in values.values() if math.isfinite(v)]
    maximize = direction == StudyDirection.MAXIMIZE
    if all(v > 0 for v in known):
        costs = {n: 1.0 / v if maximize else v for n, v in values.items()}
    else:  # no ratios: an exponential scale of their deviation instead
        scale = max(map(abs, known)) or 1.0
        signed = {n: (-v if maximize else v) / scale for n, v in values.items()}
        apart = statistics.pstdev(v for v in signed.values() if math.isfinite(v)) or 1.0
        best = min(v for v in signed.values() if math.isfinite(v))
        costs = {n: math.exp(min(700.0, (v - best) / apart)) for n, v in signed.items()}
    return {n: cost if math.isfinite(cost) else FAILED for n, cost in costs.items()}


class FiniteSampler(BaseSampler):
    """What the samplers here have in common: a point of a known space for each trial.

    Args:
        space: where to search; None: the product of the study's distributions, as far as they are
            categorical, integer or have a step. (Parameters that are neither are then drawn.)
        seed: of every draw; None: any.

    When every point was tried, points are drawn from all of them again.
    """

    def __init__(self, space: FiniteSpace | None = None, *, seed: int | None = None) -> None:
        self.space = space
        self.seed = random.SystemRandom().getrandbits(31) if seed is None else seed
        self._random = RandomSampler(self.seed)
        self._intersection = IntersectionSearchSpace()
        self._product: tuple[dict[str, BaseDistribution], FiniteSpace] | None = None

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if self.space is not None:
            return dict(self.space.distributions)
        return _countable(self._intersection.calculate(study))

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        space = self.space or self._product_of(search_space)
        if space is None:
            return {}
        known = history(study, trial, space)
        free = known.free(len(space))
        if not free.any():
            free[:] = True
        # A generator of its own for each trial: only the seed and the trials decide.
        draw = random.Random(f"{self.seed} {trial.number}")
        point = self.choose(space, known, free, draw, (study, trial))
        study._storage.set_trial_system_attr(trial._trial_id, POINT, point)
        return dict(space.points[point])

    def choose(
        self,
        space: FiniteSpace,
        known: History,
        free: NDArray[np.bool_],
        draw: random.Random,
        asked: tuple[Study, FrozenTrial],
    ) -> int:
        """The number of a free point; drawn, unless a sampler knows better."""
        while 2 * free.sum() > len(free):
            number = draw.randrange(len(free))
            if free[number]:
                return number
        return int(draw.choice(np.flatnonzero(free).tolist()))

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        self._raise_error_if_multi_objective(study)
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def reseed_rng(self) -> None:
        self._random.reseed_rng()
        self.seed = random.SystemRandom().getrandbits(31)

    def _product_of(self, search_space: dict[str, BaseDistribution]) -> FiniteSpace | None:
        declared = _countable(search_space)
        if not declared:
            return None
        if self._product is None or self._product[0] != declared:
            choices = {name: _values(d) for name, d in declared.items()}
            points = (
                dict(zip(choices, values, strict=True))
                for values in itertools.product(*choices.values())
            )
            self._product = declared, FiniteSpace(choices, points)
        return self._product[1]


class UniformSampler(FiniteSampler):
    """Draws each untried point with the same probability."""


@dataclasses.dataclass
class _Fitted:
    """A process whose length scales were found for the ``first`` of its points.

    ``rows`` are the numbers of all that it knows, ``key`` is what the scales depend on.
    """

    key: object
    surrogate: Surrogate
    first: int
    rows: list[int]
    candidates: NDArray[np.intp]

    @property
    def later(self) -> list[int]:
        """The points that were added since."""
        return self.rows[self.first :]


class FiniteGPSampler(FiniteSampler):
    """Asks a Gaussian process for the untried point of the greatest expected improvement.

    Trials that run are taken to end in the median. Each choice follows from the seed, the number
    of the trial and the other trials, and from nothing else.
    """

    def __init__(self, space: FiniteSpace | None = None, *, seed: int | None = None) -> None:
        super().__init__(space, seed=seed)
        self._fitted: _Fitted | None = None

    def choose(
        self,
        space: FiniteSpace,
        known: History,
        free: NDArray[np.bool_],
        draw: random.Random,
        asked: tuple[Study, FrozenTrial],
    ) -> int:
        ran = [cost for cost in known.costs.values() if cost < FAILED]
        tried = [*known.costs, *known.pending]
        if len(tried) < STARTUP or len(set(ran)) < 2:
            any_point = functools.partial(super().choose, space, known, free, draw, asked)
            drawn = [any_point() for _ in range(SPREAD)]
            return max(drawn, key=lambda point: _apart(space, point, tried))
        surrogate, rows, candidates = self._process(space, known.costs)
        costs = [known.costs[n] for n in rows] + [statistics.median(ran)] * len(known.pending)
        if known.pending:
            surrogate = surrogate.with_room(len(known.pending))
            for number in known.pending:
                surrogate.add(space.scaled[number])
        gain = surrogate.improvement(outcomes(np.array(costs)))
        gain[~free[candidates]] = -1.0
        if (top := float(gain.max())) < 0.0:
            return super().choose(space, known, free, draw, asked)
        # Points that differ in nothing that was seen to matter are equal up to rounding.
        ties = np.flatnonzero(gain >= top * (1.0 - TIE)).tolist()
        return int(candidates[draw.choice(ties)])

    def _process(
        self, space: FiniteSpace, costs: Mapping[int, float]
    ) -> tuple[Surrogate, list[int], NDArray[np.intp]]:
        """A process that knows all outcomes, the points that it knows in order, its candidates."""
        order = list(costs)
        base = _base(space, costs)
        key = (id(space), self.seed, [(n, costs[n]) for n in order[:base]])
        fitted = self._fitted
        if fitted is None or fitted.key != key or fitted.later != order[base:][: len(fitted.later)]:
            fitted = self._fitted = self._fit(space, costs, base, key)
        for number in order[base + len(fitted.later) :]:
            fitted.surrogate.add(space.scaled[number])
            fitted.rows.append(number)
        return fitted.surrogate, fitted.rows, fitted.candidates

    def _fit(
        self, space: FiniteSpace, costs: Mapping[int, float], base: int, key: object
    ) -> _Fitted:
        """A process of the first outcomes."""
        rows = list(costs)[:base]
        best = sorted(rows, key=costs.__getitem__)[: ROWS // 2]
        if len(rows) > ROWS:
            rows = best + [n for n in rows if n not in set(best)][-(ROWS - len(best)) :]
        candidates: NDArray[np.intp] = np.arange(len(space))
        if len(space) > LARGE:
            draw = random.Random(f"{self.seed} candidates {base}")
            chosen = set(draw.sample(range(len(space)), LARGE))
            chosen.update(*(space.neighbours(n) for n in best[:ROUND_BEST]))
            candidates = np.array(sorted(chosen))
        points = space.scaled
        values: Array = np.array([costs[n] for n in rows])
        lengths = length_scales(points[rows], outcomes(values))
        room = len(rows) + max(2, int(base * GROWTH) - base)
        surrogate = Surrogate(points[rows], points[candidates], lengths, room)
        return _Fitted(key, surrogate, len(rows), list(rows), candidates)


def _apart(space: FiniteSpace, point: int, others: Sequence[int]) -> float:
    """Squared distance of a point from the nearest of others."""
    squares = ((space.scaled[list(others)] - space.scaled[point]) ** 2).sum(axis=1)
    return float(squares.min(initial=math.inf))


def _base(space: FiniteSpace, costs: Mapping[int, float]) -> int:
    """How many of the outcomes the process is fitted to: a matter of the outcomes alone."""
    base, step, best = min(STARTUP, len(costs)), STARTUP, FAILED
    while step <= len(costs):
        base, step = step, max(step + 2, int(step * GROWTH))
    if len(space) > LARGE:
        for n, cost in enumerate(costs.values(), 1):
            if cost < best:
                best, base = cost, max(base, n)
    return base


class RestrictedSampler(FiniteSampler):
    """Any sampler, restricted to the valid points of a space that were not tried yet.

    Each value that it suggests is taken for the nearest choice; where the point is invalid or was
    tried, it is asked again, up to `ATTEMPTS` times.

    Args:
        sampler: the other one. Its study has valid points only, but for those it sees the whole
            range of each distribution.
        space: where to search.
        seed: of draws among points that are as near.
    """

    def __init__(self, sampler: BaseSampler, space: FiniteSpace, *, seed: int | None = None):
        super().__init__(space, seed=seed)
        self.sampler = sampler

    def __str__(self) -> str:
        return str(self.sampler)

    def choose(
        self,
        space: FiniteSpace,
        known: History,
        free: NDArray[np.bool_],
        draw: random.Random,
        asked: tuple[Study, FrozenTrial],
    ) -> int:
        suggested: list[dict[str, Any]] = []
        for _ in range(ATTEMPTS):
            params = space.rounded(self._suggest(*asked, space))
            if params in suggested:
                break
            suggested.append(params)
            near = space.nearest(params, free)
            if space.matches(params, near[0]):
                return int(near[0])
        return int(draw.choice(space.nearest(suggested[0], free).tolist()))

    def _suggest(self, study: Study, trial: FrozenTrial, space: FiniteSpace) -> dict[str, Any]:
        own = self.sampler.infer_relative_search_space(study, trial)
        found = dict(self.sampler.sample_relative(study, trial, own))
        for name, declared in space.distributions.items():
            if name not in found:
                found[name] = self.sampler.sample_independent(study, trial, name, declared)
        return found

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self.sampler.before_trial(study, trial)

    def after_trial(
        self,
        study: Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        self.sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        super().reseed_rng()
        self.sampler.reseed_rng()


def _countable(search_space: Mapping[str, BaseDistribution]) -> dict[str, BaseDistribution]:
    """The distributions with a finite number of values, if their product is not too large."""
    found, size = {}, 1
    for name, declared in search_space.items():
        count = _count(declared)
        if count is not None and count > 1 and size * count <= LARGEST_PRODUCT:
            found[name] = declared
            size *= count
    return found


def _count(declared: BaseDistribution) -> int | None:
    if isinstance(declared, CategoricalDistribution):
        return len(declared.choices)
    low, high, step = declared.low, declared.high, declared.step  # type: ignore[attr-defined]
    return None if step is None else round((high - low) / step) + 1


def _values(declared: BaseDistribution) -> Sequence[Any]:
    if isinstance(declared, CategoricalDistribution):
        return declared.choices
    if isinstance(declared, IntDistribution):
        return range(declared.low, declared.high + 1, declared.step)
    low, step = declared.low, declared.step  # type: ignore[attr-defined]
    return [low + n * step for n in range(_count(declared) or 0)]
