"""What tuning by a device's clock and tuning by the chip model have in common."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from metalgen.calls.check import NoRoom, first_line
from metalgen.database.measurement import Measurement, host
from metalgen.database.protocol import TuningStore
from metalgen.errors import InvalidSchedule
from metalgen.families import Limits, Schedule, default_schedule, enumerate_valid
from metalgen.families.sizes import Problem
from metalgen.source.hashes import template_hash, template_hashes
from metalgen.tuning.progress import BudgetSpent, Observer, Outcome, Progress, Report
from metalgen.tuning.timing.measure import Clock
from metalgen.tuning.workers.checker import Checker

if TYPE_CHECKING:
    from metalgen.chips import Chip

CHECKS_A_PROBLEM = 8
"""Candidates that may fail their check before a problem is left without a winner."""


@dataclass
class Session(abc.ABC):
    """A run over several problems, one at a time.

    Args:
        chip: whose rows these are.
        store: where they go, as soon as they are there.
        checker: executes candidates against the reference.
        report: what the run adds its results to.
        trials: schedules to try for each problem; None: the kind's own choice.
        seed: of the search.
        observe: told of every change.
        clock: seconds.
        deadline: the clock's time at which the budget is spent.
    """

    chip: Chip
    store: TuningStore
    checker: Checker
    report: Report
    trials: int | None
    seed: int
    observe: Observer
    clock: Clock
    deadline: float
    start: float

    provenance: ClassVar[str]
    math_modes: ClassVar[tuple[str, ...]]

    problem: Problem = field(init=False)
    templates: frozenset[str] = field(init=False)
    progress: Progress = field(init=False)
    valid: tuple[Schedule, ...] = field(init=False)
    default: Schedule = field(init=False)

    @property
    @abc.abstractmethod
    def limits(self) -> Limits:
        """What a threadgroup may use."""

    @abc.abstractmethod
    def goal(self) -> int:
        """How many schedules of the present problem will have been tried."""

    @abc.abstractmethod
    def work(self) -> Outcome:
        """Tune the present problem."""

    def tune(self, problem: Problem, number: int, problems: int) -> Outcome:
        """Tune one problem, the `number`-th of `problems`.

        Raises:
            BudgetSpent: before the problem was finished; what was committed stays.
        """
        config, limits, family = problem.config, self.limits, problem.family
        self.problem = problem
        self.templates = template_hashes(family, limits.language)
        self.report.template_hashes |= self.templates
        self.progress = Progress(problem, number, problems, self.provenance == "modelled")
        try:
            self.default = default_schedule(config, limits, family)
        except InvalidSchedule as error:
            return self._too_large(error)
        self.valid = enumerate_valid(config, limits, family, self.math_modes)
        self.show(valid=len(self.valid), goal=self.goal())
        try:
            outcome = self.work()
        except NoRoom as error:
            return self._too_large(error)
        self.show(phase="done")
        return outcome

    def _too_large(self, error: Exception) -> Outcome:
        """A problem that this chip cannot run; it does not keep others from being tuned."""
        self.show(phase="done")
        p = self.progress
        return Outcome(self.problem, None, None, p.valid, p.tried, 0, note=first_line(error))

    def close(self) -> None:  # noqa: B027 - most sessions hold nothing
        """Let go of what the session holds beside the store."""

    def show(self, **changes: Any) -> None:
        """Tell the observer, and stop when the budget is spent."""
        for name, value in changes.items():
            setattr(self.progress, name, value)
        now = self.clock()
        self.progress.left = self._time_left(now)
        self.observe(self.progress)
        if now >= self.deadline and self.progress.phase != "done":
            raise BudgetSpent

    def _time_left(self, now: float) -> float | None:
        p = self.progress
        # Ranking is quick, and says nothing about how long a check takes.
        share = 0.0 if p.modelled or not p.goal else min(1.0, p.tried / p.goal)
        if p.phase == "done":
            share = 1.0
        done = p.number - 1 + share
        left = (now - self.start) / done * (p.problems - done) if done > 0 else None
        if self.deadline < math.inf:
            rest = max(0.0, self.deadline - now)
            left = rest if left is None else min(left, rest)
        return left

    def rows(self, policy: str, phase: str = "search") -> list[Measurement]:
        """What the store holds of this problem under the present templates and a policy."""
        return self.present(policy=policy, phase=phase)

    def present(self, **fields: Any) -> list[Measurement]:
        """What the store holds of this problem under the present templates, of these fields."""
        own: dict[str, Any] = {"chip": self.chip.name, "provenance": self.provenance}
        found = self.store.measurements(self.problem, **own, **fields)
        return [m for m in found if m.template_hash in self.templates]

    def row(self, schedule: Schedule, device: str, policy: str, **fields: Any) -> Measurement:
        """A new row of this run."""
        known: dict[str, Any] = {
            "problem": self.problem,
            "schedule": schedule,
            "template_hash": template_hash(schedule),
            "source_hash": self.checker.source_hash(self.problem.config, schedule),
            "chip": self.chip.name,
            "cores": self.chip.cores,
            "device": device,
            "provenance": self.provenance,
            "policy": policy,
            "run": self.report.run,
            **host(),
        }
        return Measurement(**known, **fields)


def by_time(rows: list[Measurement]) -> list[Measurement]:
    """Rows that ran, the quickest first; ties in the order of their keys."""
    ran = [m for m in rows if m.status == "ok"]
    return sorted(ran, key=lambda m: (m.seconds or math.inf, m.schedule.key))
