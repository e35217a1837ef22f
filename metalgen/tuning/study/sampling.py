"""The study in which a sampler works: an Optuna study in memory, asked and told.

Its trials are what the sampler may know when it is asked. Where outcomes come late because
schedules are compiled ahead, the n-th ask knows the first ``n - late + 1`` outcomes, whichever
others have come by then. So a search that was interrupted goes on as an undisturbed one would.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState, create_trial

from metalgen.tuning.search.samplers import RestrictedSampler

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from metalgen.database.measurement import Measurement
    from metalgen.tuning.search.finite import FiniteSpace

Tried = tuple[int | None, "Measurement | None"]
"""The number of a point (None: outside of the space), and its row, or None while it is tried."""


class Sampling:
    """Asks a sampler for points, and tells it what came of them.

    Args:
        space: where to search.
        sampler: one that suggests points of the space (`metalgen.tuning.search.named`).
        starts: points that are tried first, without the sampler.
        late: trials that may be without an outcome at a time; None: every outcome counts as soon as
            it is there, as several workers need it.
    """

    def __init__(
        self,
        space: FiniteSpace,
        sampler: BaseSampler,
        starts: Collection[int] = (),
        late: int | None = 1,
    ) -> None:
        self.space = space
        self.starts = set(starts)
        self.late = late
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        self._trials: dict[int, int] = {}  # trials' numbers, by points
        self._told: set[int] = set()
        self._known = 0
        # A sampler that remembers more than its study holds is asked once more for what was tried.
        self._repeats = late is not None and isinstance(sampler, RestrictedSampler)

    def ask(self, tried: Sequence[Tried]) -> int | None:
        """The next point after those tried, in their order; None: outcomes must come first."""
        known = len(tried) if self.late is None else max(0, len(tried) - self.late + 1)
        if self.late is not None and any(row is None for _, row in tried[:known]):
            return None
        for n, (point, _) in enumerate(tried):
            if point is None or point in self._trials:
                continue
            if self.late is not None:
                self._tell(tried[: max(0, n - self.late + 1)])
            self._add(point)
        self._tell(tried[:known])
        return self._ask()

    def _ask(self) -> int:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            trial = self.study.ask()
            point = self.space.suggest(trial)
        self._trials.setdefault(point, trial.number)
        return point

    def _add(self, point: int) -> None:
        if self._repeats and point not in self.starts:
            found = self._ask()
            if found == point:
                return
            # Another search's rows: what this one would have asked for was never tried.
            self._repeats = False
            self.study.tell(self._trials.pop(found), state=TrialState.FAIL)
        params = self.space.points[point]
        declared = {name: self.space.distributions[name] for name in params}
        trial = create_trial(state=TrialState.RUNNING, params=params, distributions=declared)
        self._trials[point] = len(self.study.get_trials(deepcopy=False))
        self.study.add_trial(trial)

    def _tell(self, tried: Sequence[Tried]) -> None:
        start = self._known if self.late is not None else 0
        for point, row in tried[start:]:
            if point is None or row is None or point in self._told:
                continue
            self._told.add(point)
            number = self._trials[point]
            if row.status == "ok":
                self.study.tell(number, row.seconds)
                continue
            state = TrialState.FAIL
            if row.status == "pruned" and row.samples:
                state = TrialState.PRUNED
                storage, trial = self.study._storage, self.study.get_trials(deepcopy=False)[number]
                for step, sample in enumerate(row.samples):
                    storage.set_trial_intermediate_value(trial._trial_id, step, sample)
            self.study.tell(number, state=state)
        self._known = max(start, len(tried))
