"""What a tuning run says while it goes on, and when it is over. Times are in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from metalgen.database.measurement import Measurement
from metalgen.families import Schedule
from metalgen.families.sizes import Problem


@dataclass
class Progress:
    """Where a run is: what its observer sees.

    ``phase`` is ``"ranking"``, ``"measuring"``, ``"checking"``, ``"finals"`` or ``"done"``.
    """

    problem: Problem
    number: int
    problems: int
    modelled: bool
    phase: str = "ranking"
    valid: int = 0
    goal: int = 0
    tried: int = 0
    best: Schedule | None = None
    best_seconds: float | None = None
    default_seconds: float | None = None
    left: float | None = None


Observer = Callable[[Progress], None]


@dataclass(frozen=True)
class Rejected:
    """A schedule that would have won and failed its check."""

    schedule: Schedule
    status: str
    detail: str


@dataclass(frozen=True)
class Outcome:
    """What a run found for one problem.

    Args:
        problem: what was tuned.
        winner: the best verified row, or None.
        default_seconds: the default schedule's time, same provenance.
        valid: valid schedules in the space.
        tried: schedules that were ranked or measured, in this run or earlier.
        new: of these, the ones from this run.
        rejected: candidates before the winner that failed their check in this run.
        note: why there is no winner, or what of the config a modelled time leaves out.
    """

    problem: Problem
    winner: Measurement | None
    default_seconds: float | None
    valid: int
    tried: int
    new: int
    rejected: tuple[Rejected, ...] = ()
    note: str = ""


@dataclass
class Report:
    """A run, complete or not.

    ``stopped`` is None, ``"budget"`` or ``"interrupted"``; ``checks`` counts the kernels that were
    executed against the reference in this run; ``kept`` rows of other templates that were kept
    when it began, because their kernels are the same; ``template_hashes`` are those of the families
    and kinds that were tuned.
    """

    run: str
    chip: str
    provenance: str
    outcomes: list[Outcome] = field(default_factory=list)
    stopped: str | None = None
    seconds: float = 0.0
    checks: int = 0
    kept: int = 0
    template_hashes: set[str] = field(default_factory=set)


class BudgetSpent(Exception):
    """The run's time is over."""
