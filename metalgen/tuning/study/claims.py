"""One problem's Optuna study: who tries which schedule, who is alive, and what came of it.

A search that is alone keeps its study in memory; workers that share one meet in a storage. The code
is the same: a claim is a running trial, made in one transaction. Two workers may claim the same
schedule at the same moment; the claim with the lower number holds, because numbers are given out
under a lock and a worker reads all claims after it made its own. What a search starts with are
enqueued trials, which are claimed before anything else. A worker shows that it is alive by a
counter in its trials; others watch it by their own clocks, so that clocks need not agree, and a
worker that died before its first beat is noticed too (Optuna's own heartbeat does not notice that,
and its journal has none). The trial of a dead worker is marked as lost, and its schedule is the
next to be asked for, by whichever worker asks first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import optuna
from optuna.trial import TrialState

from metalgen.database.measurement import Measurement
from metalgen.families import Schedule
from metalgen.source.hashes import template_hash
from metalgen.tuning.study.heart import Heart
from metalgen.tuning.study.pruning import make_pruner
from metalgen.tuning.study.sampling import Sampling
from metalgen.tuning.study.storage import StorageError
from metalgen.tuning.study.trials import FINALS, STATES, Trials

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

LOSSES = 3
"""Workers that may die of a schedule before nobody tries it again."""
RELEASED = "its worker gave it back"
"""Why a trial was lost, where that is no one's death."""


@dataclass(frozen=True)
class Extent:
    """How much a study tries.

    Args:
        goal: schedules that all workers together try.
        ahead: schedules that one worker may have claimed at a time.
    """

    goal: int
    ahead: int = 1


@dataclass
class _Item:
    """What the finished trials of one schedule, or of the finals, come to."""

    first: int
    outcomes: list[int] = field(default_factory=list)  # numbers of trials that have rows
    losses: int = 0


class TuningStudy:
    """One problem's study, asked and told by one worker or by many.

    Args:
        trials: of the study.
        sampling: what asks the sampler.
        extent: how much is tried.
        receive: told of the rows that other workers measured.

    Attributes:
        pending: what this worker claimed and has no outcome of, in order.
        published: outcomes that this worker measured.

    Raises:
        StorageError: the storage fails, or holds what no worker wrote.
    """

    def __init__(
        self,
        trials: Trials,
        sampling: Sampling,
        extent: Extent,
        receive: Callable[[list[Measurement]], None] = lambda rows: None,
    ) -> None:
        self.trials = trials
        self.candidates = trials.candidates
        self.sampling = sampling
        self.extent = extent
        self.published = 0
        self.pending: list[Schedule] = []
        self._receive = receive
        self._items: dict[str, _Item] = {}
        self._folded: set[int] = set()  # numbers of the finished trials that `_items` knows
        self._running: dict[str, int] = {}  # the lowest numbers of running trials
        self._waiting: dict[str, tuple[int, int]] = {}  # numbers and ids of enqueued trials
        self._schedules: dict[str, Schedule] = {}
        self._rows: dict[int, list[Measurement]] = {}
        self._own: dict[str, int] = {}  # ids of this worker's running trials
        self.refresh()  # may raise: nothing beats for a worker that never joined
        share = trials.share
        self._heart = Heart(trials.storage, share.beat) if share else None
        self._live: optuna.Study | None = None

    # What a session asks

    @property
    def asked(self) -> list[Schedule]:
        """Every schedule that any worker took, in the order of the first claims."""
        first = {key: item.first for key, item in self._items.items()}
        for key, number in self._running.items():
            first[key] = min(number, first.get(key, number))
        return [
            self._schedules[key] for key in sorted(first, key=first.__getitem__) if key != FINALS
        ]

    @property
    def rows(self) -> dict[Schedule, Measurement]:
        """The outcomes so far, in the order of the first claims."""
        items = {self._schedules[k]: i for k, i in self._items.items() if k != FINALS}
        return {s: self._rows[items[s].outcomes[0]][0] for s in self.asked if self._done(s.key)}

    @property
    def seconds(self) -> dict[Schedule, float]:
        """The times of those that ran and were measured whole."""
        return {s: m.seconds for s, m in self.rows.items() if m.status == "ok" and m.seconds}

    @property
    def unfinished(self) -> bool:
        """Whether another worker is at a schedule, or one that was lost must be tried again."""
        keys = {*self._items, *self._running} - {FINALS}
        return any((k in self._running and not self._done(k)) or self._to_retry(k) for k in keys)

    def ask(self) -> Schedule | None:
        """Claim a schedule that nobody has; None at the goal, or when outcomes must come first."""
        while len(self.pending) < self.extent.ahead:
            self.refresh()
            found = next((s for key, s in self._schedules.items() if self._to_retry(key)), None)
            if found is None and self._waiting and self._wanted(self._next_waiting()):
                found = self._next_waiting()
                claimed = self._take_waiting(found.key)
            else:
                found = found or self._new()
                if found is None:
                    return None
                claimed = self._claim(found.key, found)
            if claimed:
                self.pending.append(found)
                return found
        return None

    def _done(self, key: str) -> bool:
        return key in self._items and bool(self._items[key].outcomes)

    def _to_retry(self, key: str) -> bool:
        item = self._items.get(key)
        lost = item is not None and not item.outcomes and key not in self._running
        return lost and item is not None and item.losses < LOSSES

    def _wanted(self, schedule: Schedule) -> bool:
        """Whether one more is to be tried; the default always is."""
        return schedule == self.candidates.default or len(self.asked) < self.extent.goal

    def _next_waiting(self) -> Schedule:
        return self._schedules[min(self._waiting, key=lambda key: self._waiting[key][0])]

    def _new(self) -> Schedule | None:
        asked, rows = self.asked, self.rows
        index = self.candidates.index
        valid = sum(s in index for s in asked)
        if len(asked) >= self.extent.goal or valid >= len(index):
            return None
        tried: list[tuple[int | None, Measurement | None]] = []
        for schedule in asked:
            row = rows.get(schedule)
            item = self._items.get(schedule.key)
            if row is None and item is not None and item.losses >= LOSSES:
                row = self._given_up(schedule)
            tried.append((index.get(schedule), row))
        point = self.sampling.ask(tried)
        return None if point is None else self.candidates.schedules[point]

    def _given_up(self, schedule: Schedule) -> Measurement:
        fields = {"provenance": "measured", "status": "timeout", **self.trials.facts}
        fields["template_hash"] = template_hash(schedule)
        return Measurement(self.trials.problem, schedule, **fields)

    # Claims and outcomes

    def contribute(self, rows: Sequence[Measurement]) -> None:
        """Enter rows that this worker measured earlier, where nobody has that schedule."""
        for m in rows:
            key = m.schedule.key
            if self._done(key) or key in self._running:
                continue
            self.trials.new(key, m.schedule, STATES.get(m.status, TrialState.FAIL), [m])
        self.refresh()

    def enqueue(self, schedules: Sequence[Schedule]) -> None:
        """Let these be tried before any that the sampler suggests, where nobody has them."""
        for schedule in schedules:
            known = {*self._items, *self._running, *self._waiting}
            if schedule.key not in known:
                self.trials.new(schedule.key, schedule, TrialState.WAITING)
        self.refresh()

    def report(self, schedule: Schedule, step: int, seconds: float) -> bool:
        """Report a sample of a schedule that this worker claimed; whether to end it there.

        The default is never ended: every other one is compared with it.
        """
        if self._live is None:
            self._live = self.trials.optuna_study(make_pruner())
        hopeless = self.trials.report(self._live, self._own[schedule.key], step, seconds)
        return hopeless and schedule != self.candidates.default

    def publish(self, row: Measurement) -> None:
        """The outcome of a schedule that this worker claimed."""
        self.pending.remove(row.schedule)
        state = STATES.get(row.status, TrialState.FAIL)
        self._finish(row.schedule.key, row.schedule, state, [row])
        self.published += 1
        self.refresh()

    def claim_finals(self) -> bool:
        """Whether this worker is to race the best: nobody has, since the last outcome."""
        self.refresh()
        if self.raced() or not self._claim(FINALS, None):
            return False
        if self.raced():  # by a worker that ended between our look and our claim
            self._drop(FINALS, "withdrawn", "another worker did it")
            return False
        return True

    def raced(self) -> bool:
        """Whether the best were raced after the last outcome of the search."""
        item = self._items.get(FINALS)
        done = max(item.outcomes) if item and item.outcomes else -1
        searched = (
            max(i.outcomes) for key, i in self._items.items() if key != FINALS and i.outcomes
        )
        return done > max(searched, default=-1)

    def publish_finals(self, rows: Sequence[Measurement]) -> None:
        """What came of the race that this worker claimed; also of the rows that were checked."""
        self._finish(FINALS, None, TrialState.PRUNED, rows)  # neither failed, nor a best trial
        self.refresh()

    def _claim(self, key: str, schedule: Schedule | None) -> bool:
        return self._hold(key, schedule, *self.trials.new(key, schedule, TrialState.RUNNING))

    def _take_waiting(self, key: str) -> bool:
        number, trial = self._waiting[key]
        return self.trials.take(trial) and self._hold(key, self._schedules[key], trial, number)

    def _hold(self, key: str, schedule: Schedule | None, trial: int, number: int) -> bool:
        """Whether a claim that was made holds, now that all others can be seen."""
        self._own[key] = trial
        self._watch()
        self.refresh()
        # Where several took the last places at once, those with the lower numbers keep them.
        places = [s.key for s in self.asked][: self.extent.goal]
        beyond = key != FINALS and key not in places and schedule != self.candidates.default
        earlier = self._waiting.get(key, (number, 0))[0] < number  # enqueued meanwhile
        holds = self._running.get(key) == number and not earlier
        if holds and not (key != FINALS and self._done(key)) and not beyond:
            return True
        self._drop(key, "withdrawn", "another worker has it")
        return False

    def _watch(self) -> None:
        if self._heart:
            self._heart.watch(set(self._own.values()))

    def _finish(
        self, key: str, schedule: Schedule | None, state: TrialState, rows: Sequence[Measurement]
    ) -> None:
        trial = self._own.pop(key)
        self._watch()
        if not self.trials.finish(trial, state, rows):  # this machine slept
            self.trials.new(key, schedule, state, rows)

    def _drop(self, key: str, name: str, reason: str) -> None:
        trial = self._own.pop(key)
        self._watch()
        self.trials.fail(trial, name, reason)

    # What others do

    def refresh(self) -> None:
        """Read what happened, mark what the dead have left, hand on what others measured."""
        trials = self.trials.all()
        if self.trials.bury(trials, set(self._own.values())):
            trials = self.trials.all()
        self._running.clear()
        self._waiting.clear()
        received: list[Measurement] = []
        for trial in trials:
            if trial.number not in self._folded:
                received += self._note(trial)
        for key in {*self._items, *self._running} & {*self._waiting}:
            if key in self._items or self._running[key] < self._waiting[key][0]:
                _, stale = self._waiting.pop(key)
                self.trials.fail(stale, "withdrawn", "it was tried already")
        if received:
            self._receive(received)

    def _note(self, trial: FrozenTrial) -> list[Measurement]:
        """Take note of a trial; returns the rows of another worker that were not yet seen."""
        attributes, number = trial.user_attrs, trial.number
        key = attributes.get("item")
        if trial.state.is_finished():
            self._folded.add(number)
        if not isinstance(key, str) or "withdrawn" in attributes:
            return []
        if key != FINALS and key not in self._schedules:
            self._schedules[key] = self.trials.schedule(key)
        if trial.state == TrialState.WAITING:
            self._waiting.setdefault(key, (number, trial._trial_id))
            return []
        if "rows" in attributes:  # even where its worker ended before it could say so
            item = self._items.setdefault(key, _Item(number))
            if number in item.outcomes:
                return []
            item.first = min(item.first, number)
            item.outcomes.append(number)
            self._rows[number] = rows = self.trials.read(key, attributes["rows"])
            return rows if attributes.get("worker") != self.trials.worker else []
        if trial.state == TrialState.RUNNING:
            self._running.setdefault(key, number)
        else:
            item = self._items.setdefault(key, _Item(number))
            item.first = min(item.first, number)
            item.losses += attributes.get("lost") != RELEASED
        return []

    def close(self) -> None:
        """Give back what was claimed, so that others need not wait."""
        if self._heart:
            self._heart.stop()
        for key in list(self._own):
            with contextlib.suppress(StorageError):
                self._drop(key, "lost", RELEASED)
        self.pending.clear()
