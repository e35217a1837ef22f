"""Choosing which schedule to try next.

Where the clock is the chip model, everything is ranked: `rank`. Where a measurement costs time,
`Search` asks: first what it was given to start with (the default schedule always), then, in a
small space, everything else in a seeded order, in a large one Optuna's TPE behind the set of what
was tried. Each ask is seeded by the run's seed and the number of rows, so a search that was
interrupted and told its rows again goes on as an undisturbed one would.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from metalgen.errors import ArgumentError
from metalgen.problem import Problem
from metalgen.schedule import Schedule, default_schedule
from metalgen.tuning.space import Space

if TYPE_CHECKING:
    import optuna

    from metalgen.chips import Chip

TPE_ATTEMPTS = 24
"""Asks of TPE for a point that is valid and new, before one is drawn at random."""
STARTUP_TRIALS = 10
"""Random trials before TPE has a model."""
FAILED = float("inf")
"""The time of a schedule that did not run: worse than any."""


def rank(
    problem: Problem,
    schedules: Iterable[Schedule],
    chip: Chip,
    tick: Callable[[int, float, Schedule], None] | None = None,
) -> list[tuple[float, Schedule]]:
    """Predicted seconds of schedules on a chip, the quickest first; ties by their keys.

    Args:
        problem: what to run.
        schedules: valid ones.
        chip: whose model to ask.
        tick: called now and then with how many were ranked, and the best so far.

    Raises:
        IncompleteChip: the chip lacks figures that the model needs.
    """
    from metalgen.chips.model import predict

    ranked = []
    best, best_seconds = None, FAILED
    for n, schedule in enumerate(schedules, 1):
        seconds = predict(problem, schedule, chip).seconds
        ranked.append((seconds, schedule))
        if seconds < best_seconds:
            best, best_seconds = schedule, seconds
        if tick and best and n % 512 == 0:
            tick(n, best_seconds, best)
    ranked.sort(key=lambda pair: (pair[0], pair[1].key))
    return ranked


class Search:
    """Asks for schedules, is told their times, never asks for the same one twice.

    Args:
        space: where to look.
        valid: every valid schedule of it (`enumerate_valid`).
        seed: of the run.
        first: schedules to start with, after the default one.
        small: up to this many valid schedules all are tried.

    Raises:
        ArgumentError: `seed` is not a whole number from 0 to 2**31 - 1.
    """

    def __init__(
        self,
        space: Space,
        valid: Sequence[Schedule],
        seed: int = 0,
        *,
        first: Sequence[Schedule] = (),
        small: int = 0,
    ) -> None:
        if type(seed) is not int or not 0 <= seed < 1 << 31:
            raise ArgumentError("seed", "a whole number from 0 to 2147483647", seed)
        self.space = space
        self.valid = tuple(valid)
        self.seed = seed
        self.small = small
        default = default_schedule(space.config, space.limits, space.family)
        self.first = tuple(dict.fromkeys((default, *first)))
        self.times: dict[Schedule, float] = {}
        self._members = set(self.valid)
        self._study: optuna.Study | None = None

    def tell(self, schedule: Schedule, seconds: float | None) -> None:
        """The outcome of a schedule: its time, or None where it has none."""
        if schedule in self.times:
            return
        self.times[schedule] = FAILED if seconds is None else seconds
        if self._study is not None:
            self._add(self._study, schedule)

    def ask(self) -> Schedule | None:
        """The next schedule to try; None when all have been."""
        for schedule in self.first:
            if schedule in self._members and schedule not in self.times:
                return schedule
        if all(schedule in self.times for schedule in self.valid):
            return None
        # A generator of its own for each ask: only the seed and the rows so far decide.
        seed = random.Random(f"{self.seed} {len(self.times)}").getrandbits(31)
        if len(self.valid) > self.small:
            found = self._ask_tpe(seed)
            if found:
                return found
        left = [schedule for schedule in self.valid if schedule not in self.times]
        return random.Random(seed).choice(left)

    def _ask_tpe(self, seed: int) -> Schedule | None:
        import optuna

        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self._study = optuna.create_study(direction="minimize")
            for schedule in self.times:
                self._add(self._study, schedule)
        study = self._study
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        for _ in range(TPE_ATTEMPTS):
            trial = study.ask()
            point: dict[str, object] = {}
            for parameter in self.space.parameters:
                values = parameter.values(point)
                point[parameter.name] = (
                    trial.suggest_categorical(parameter.name, values)
                    if len(values) > 1
                    else values[0]
                )
            # What is asked for is told by `tell`, as a trial of its own, also after a resume.
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            schedule = self.space.schedule(point)
            if schedule in self._members and schedule not in self.times:
                return schedule
        return None

    def _add(self, study: optuna.Study, schedule: Schedule) -> None:
        import optuna

        point = self.space.point(schedule)
        if point is None:
            return
        free: dict[str, object] = {}
        choices: dict[str, optuna.distributions.BaseDistribution] = {}
        for parameter in self.space.parameters:
            values = parameter.values(point)
            if len(values) > 1:
                free[parameter.name] = point[parameter.name]
                choices[parameter.name] = optuna.distributions.CategoricalDistribution(values)
        value = self.times[schedule]
        study.add_trial(optuna.trial.create_trial(params=free, distributions=choices, value=value))
