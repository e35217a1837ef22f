"""One study that several workers share: who tries what, who is alive, and what came of it.

A claim is a running trial of an Optuna study, made in one transaction. Two workers may claim the
same schedule at the same moment; the claim with the lower number holds, because numbers are given
out under a lock and a worker reads all claims after it made its own. A worker shows that it is
alive by a counter in its trials; others watch it by their own clocks, so that clocks need not
agree, and a worker that died before its first beat is noticed too (Optuna's own heartbeat does not
notice that, and its journal has none). The trial of a dead worker is marked as lost, and its
schedule is the next to be asked for, by whoever asks first.

A measured row travels as a canonical line in its trial, and is checked like any record from
elsewhere by whoever reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from metalgen.database.measurement import Measurement
from metalgen.database.rows import FAULTS, check, row_of_measurement, short
from metalgen.database.untrusted import parse_object
from metalgen.errors import ArgumentError
from metalgen.families import Schedule, Space, decode_schedule
from metalgen.families.sizes import Problem
from metalgen.tuning.search.search import FAILED, Search
from metalgen.tuning.study.heart import BEAT, Heart
from metalgen.tuning.study.storage import StorageError, explained, masked

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial, TrialState

LOSSES = 3
"""Workers that may die of a schedule before nobody tries it again."""
RELEASED = "its worker gave it back"
"""Why a trial was lost, where that is no one's death."""
FINALS = "finals"
"""What a claim is on, beside schedules: the race of the best."""


@dataclass(frozen=True)
class Share:
    """Where and how workers meet.

    Args:
        url: of the storage (`metalgen.tuning.study.storage.open_storage`).
        study: the name under which they meet; each problem is a study of Optuna's under it.
        beat: seconds between two signs of life of a worker.
        grace: seconds without one after which others take a worker for dead.
        poll: seconds between two looks at what others are doing, when there is nothing to do.

    Raises:
        ArgumentError: a name that is empty or too long, or times that make no sense.
    """

    url: str
    study: str = "metalgen"
    beat: float = 5.0
    grace: float = 60.0
    poll: float = 1.0

    def __post_init__(self) -> None:
        if not self.study.isprintable() or not 0 < len(self.study) <= 100:
            raise ArgumentError("study", "a name of 1 to 100 printable characters", self.study)
        if not 0 < self.beat < self.grace:
            raise ArgumentError("beat", f"seconds above 0 and below {self.grace}", self.beat)

    def __repr__(self) -> str:
        return f"Share({masked(self.url)!r}, {self.study!r})"


@dataclass
class _Item:
    """What all trials of one schedule, or of the finals, come to."""

    first: int
    holder: int | None = None  # the number of the trial that has it now
    outcomes: list[int] = field(default_factory=list)  # numbers of trials that have rows
    losses: int = 0

    @property
    def is_lost(self) -> bool:
        """Whether it was claimed, nobody has it and nothing came of it."""
        return self.holder is None and not self.outcomes


class SharedStudy:
    """One problem's study, asked and told as `metalgen.tuning.search.ahead.Ahead`, by many workers.

    Args:
        share: where workers meet.
        storage: it, open.
        problem: what is tuned.
        facts: what all workers must have in common: chip, policy, templates and the like.
        space: where the schedules are.
        make: a new search, which was told nothing.
        goal: schedules that all workers together try.
        ahead: schedules that this worker may have claimed at a time.
        receive: told of the rows that other workers measured.

    Raises:
        StorageError: the storage fails, or its study is of workers unlike this one.
    """

    def __init__(
        self,
        share: Share,
        storage: BaseStorage,
        problem: Problem,
        facts: Mapping[str, Any],
        space: Space,
        make: Callable[[], Search[Schedule]],
        goal: int,
        ahead: int = 1,
        receive: Callable[[list[Measurement]], None] = lambda rows: None,
    ) -> None:
        self.share = share
        self.storage = storage
        self.problem = problem
        self.facts = dict(facts)
        self.space = space
        self.goal = goal
        self.ahead = ahead
        self.worker = uuid.uuid4().hex
        self.published = 0
        self.pending: list[Schedule] = []
        self.times: dict[Schedule, float] = {}
        self._make = make
        self._receive = receive
        self._items: dict[str, _Item] = {}
        self._schedules: dict[str, Schedule] = {}
        self._rows: dict[int, list[Measurement]] = {}
        self._own: dict[str, int] = {}  # ids of this worker's running trials
        self._beats: dict[int, tuple[object, float]] = {}
        self._study = self._open()
        self.refresh()  # may raise: nothing beats for a worker that never joined
        self._heart = Heart(storage, share.beat)

    def _open(self) -> int:
        from optuna.exceptions import DuplicatedStudyError
        from optuna.study import StudyDirection

        name = f"{self.share.study}: {str(self.problem)[:200]} [{_digest(self.problem.key)}]"
        choices = [(parameter.name, parameter.choices) for parameter in self.space.parameters]
        # Optuna takes no other choices of a parameter later on.
        mine = {"problem": self.problem.key, "space": _digest(json.dumps(choices)), **self.facts}
        with self._explained():
            try:
                study = self.storage.create_new_study([StudyDirection.MINIMIZE], name)
            except DuplicatedStudyError:
                study = self.storage.get_study_id_from_name(name)
            if "metalgen" not in self.storage.get_study_user_attrs(study):
                self.storage.set_study_user_attr(study, "metalgen", json.dumps(mine))
            text = self.storage.get_study_user_attrs(study)["metalgen"]
        try:
            theirs = parse_object(text)
        except FAULTS as error:
            raise self._foreign(error) from None
        for key, value in mine.items():
            if theirs.get(key) != value:
                raise StorageError(
                    masked(self.share.url),
                    f"study {self.share.study!r} is of workers with {key} {theirs.get(key)}, and "
                    f"this one has {value}; run it with what they have, or under another --study",
                )
        return study

    # What a search asks

    @property
    def asked(self) -> list[Schedule]:
        """Every schedule that any worker took, in the order of the first claims."""
        items = ((item.first, key) for key, item in self._items.items() if key != FINALS)
        return [self._schedules[key] for _, key in sorted(items)]

    @property
    def unfinished(self) -> bool:
        """Whether another worker is at a schedule, or one that was lost must be tried again."""
        return any(
            (item.holder is not None and not item.outcomes) or self._to_retry(key)
            for key, item in self._items.items()
            if key != FINALS
        )

    def ask(self) -> Schedule | None:
        """Claim a schedule that nobody has; None at the goal, or when outcomes must come first."""
        while len(self.pending) < self.ahead:
            self.refresh()
            found = next((s for key, s in self._schedules.items() if self._to_retry(key)), None)
            if found is None:
                found = self._new()
            if found is None:
                return None
            if self._claim(found.key, found):
                self.pending.append(found)
                return found
        return None

    def _to_retry(self, key: str) -> bool:
        item = self._items.get(key)
        return item is not None and item.is_lost and item.losses < LOSSES

    def _new(self) -> Schedule | None:
        asked = self.asked
        default = self.space.default
        if len(asked) >= self.goal and default in asked:
            return None
        search = self._make()
        ran = [t for t in self.times.values() if t < FAILED]
        middle = statistics.median(ran) if ran else None
        for schedule in asked:
            time_ = self.times.get(schedule)
            given_up = schedule.key in self._items and self._items[schedule.key].losses >= LOSSES
            if time_ is None and not given_up:
                search.tell(schedule, middle)  # in someone's hands
            else:
                search.tell(schedule, time_ if time_ is not None and time_ < FAILED else None)
        return search.ask()

    # Claims and outcomes

    def contribute(self, rows: Sequence[Measurement]) -> None:
        """Enter rows that this worker measured earlier, where nobody has that schedule."""
        from optuna.trial import TrialState

        for m in rows:
            item = self._items.get(m.schedule.key)
            if item is not None and not item.is_lost:
                continue
            state = TrialState.COMPLETE if m.status == "ok" else TrialState.FAIL
            self._new_trial(m.schedule.key, m.schedule, state, [m])
        self.refresh()

    def tell(self, item: Schedule, seconds: float | None) -> None:
        """Nothing: an outcome is published with its row, by `publish`."""

    def publish(self, row: Measurement) -> None:
        """The outcome of a schedule that this worker claimed."""
        from optuna.trial import TrialState

        state = TrialState.COMPLETE if row.status == "ok" else TrialState.FAIL
        self.pending.remove(row.schedule)
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
        from optuna.trial import TrialState

        self._finish(FINALS, None, TrialState.PRUNED, rows)  # neither failed, nor a best trial
        self.refresh()

    def _claim(self, key: str, schedule: Schedule | None) -> bool:
        from optuna.trial import TrialState

        trial, number = self._new_trial(key, schedule, TrialState.RUNNING)
        self._own[key] = trial
        self._heart.watch(set(self._own.values()))
        self.refresh()
        item = self._items[key]
        # Where several took the last places at once, those with the lower numbers keep them.
        places = sorted(i.first for k, i in self._items.items() if k != FINALS)[: self.goal]
        beyond = key != FINALS and item.first not in places and schedule != self.space.default
        if item.holder == number and not (key != FINALS and item.outcomes) and not beyond:
            return True
        self._drop(key, "withdrawn", "another worker has it")
        return False

    def _new_trial(
        self,
        key: str,
        schedule: Schedule | None,
        state: TrialState,
        rows: Sequence[Measurement] = (),
    ) -> tuple[int, int]:
        from optuna.distributions import BaseDistribution, CategoricalDistribution
        from optuna.trial import TrialState, create_trial

        params: dict[str, Any] = {}
        choices: dict[str, BaseDistribution] = {}
        point = self.space.point(schedule) if schedule else None
        for parameter in self.space.parameters if point else ():
            assert point is not None
            if len(parameter.values(point)) > 1:
                params[parameter.name] = point[parameter.name]
                choices[parameter.name] = CategoricalDistribution(parameter.choices)
        attributes: dict[str, Any] = {"item": key, "worker": self.worker, BEAT: 0}
        if state.is_finished():
            attributes["rows"] = [m.to_line() for m in rows]
        template = create_trial(
            state=state,
            value=rows[0].seconds if state == TrialState.COMPLETE else None,
            params=params,
            distributions=choices,
            user_attrs=attributes,
        )
        with self._explained():
            trial = self.storage.create_new_trial(self._study, template)
            return trial, self.storage.get_trial_number_from_id(trial)

    def _finish(
        self, key: str, schedule: Schedule | None, state: TrialState, rows: Sequence[Measurement]
    ) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        trial = self._own.pop(key)
        self._heart.watch(set(self._own.values()))
        values = [rows[0].seconds or 0.0] if state == TrialState.COMPLETE else None
        try:
            with self._explained():
                self.storage.set_trial_user_attr(trial, "rows", [m.to_line() for m in rows])
                self.storage.set_trial_state_values(trial, state, values)
        except UpdateFinishedTrialError:  # this machine slept, and was taken for dead
            self._new_trial(key, schedule, state, rows)

    def _drop(self, key: str, name: str, reason: str) -> None:
        trial = self._own.pop(key)
        self._heart.watch(set(self._own.values()))
        self._fail(trial, name, reason)

    def _fail(self, trial: int, name: str, reason: str) -> None:
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        with contextlib.suppress(UpdateFinishedTrialError), self._explained():
            self.storage.set_trial_user_attr(trial, name, reason)
            self.storage.set_trial_state_values(trial, TrialState.FAIL)

    # What others do

    def refresh(self) -> None:
        """Read what happened, mark what the dead have left, hand on what others measured."""
        with self._explained():
            trials = self.storage.get_all_trials(self._study, deepcopy=False)
        if self._bury(trials):
            with self._explained():
                trials = self.storage.get_all_trials(self._study, deepcopy=False)
        self._items.clear()
        received: list[Measurement] = []
        for trial in trials:
            received += self._note(trial)
        self.times = {}
        for key, item in self._items.items():
            if key != FINALS and item.outcomes:
                (row,) = self._rows[item.outcomes[0]]
                ran = row.status == "ok" and row.seconds
                self.times[row.schedule] = row.seconds if ran and row.seconds else FAILED
        if received:
            self._receive(received)

    def _note(self, trial: FrozenTrial) -> list[Measurement]:
        """Add a trial to `_items`; returns the rows of another worker that were not yet seen."""
        from optuna.trial import TrialState

        attributes = trial.user_attrs
        key = attributes.get("item")
        if not isinstance(key, str) or "withdrawn" in attributes:
            return []
        if key != FINALS and key not in self._schedules:
            self._schedules[key] = self._schedule(key)
        item = self._items.setdefault(key, _Item(trial.number))
        if "rows" in attributes:
            item.outcomes.append(trial.number)
            if trial.number in self._rows:
                return []
            self._rows[trial.number] = rows = self._read(key, attributes["rows"])
            return rows if attributes.get("worker") != self.worker else []
        if trial.state == TrialState.RUNNING:
            item.holder = trial.number if item.holder is None else item.holder
        elif attributes.get("lost") != RELEASED:
            item.losses += 1
        return []

    def _bury(self, trials: Sequence[FrozenTrial]) -> bool:
        """Mark the trials of workers that have shown no sign of life for too long."""
        from optuna.trial import TrialState

        now, buried = time.monotonic(), False
        own = set(self._own.values())
        for trial in trials:
            if trial.state != TrialState.RUNNING or trial._trial_id in own:
                continue
            beat = trial.user_attrs.get(BEAT)
            seen = self._beats.get(trial.number)
            if seen is None or seen[0] != beat:
                self._beats[trial.number] = beat, now
            elif now - seen[1] > self.share.grace:
                self._fail(trial._trial_id, "lost", "its worker showed no sign of life")
                buried = True
        return buried

    def _schedule(self, key: str) -> Schedule:
        try:
            return decode_schedule(
                parse_object(key), self.problem.family, self.space.limits.language
            )
        except FAULTS as error:
            raise self._foreign(error) from None

    def _read(self, key: str, lines: object) -> list[Measurement]:
        """The rows of a trial, as carefully as those of a record file."""
        try:
            if not isinstance(lines, list) or (key != FINALS and len(lines) != 1):
                raise ValueError("a trial without its row")
            rows = []
            for line in lines:
                m = Measurement.from_record(parse_object(line))
                check(m)
                facts = {name: getattr(m, name) for name in self.facts}
                if m.problem != self.problem or facts != self.facts:
                    raise ValueError("a row of another problem, chip, policy or template")
                if key not in (FINALS, m.schedule.key):
                    raise ValueError("a row of another schedule")
                row_of_measurement(m)
                rows.append(m)
        except FAULTS as error:
            raise self._foreign(error) from None
        return rows

    def _foreign(self, error: Exception) -> StorageError:
        return StorageError(
            masked(self.share.url),
            f"study {self.share.study!r} holds what is not a worker's ({short(error)})",
        )

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(self.share.url)

    def close(self) -> None:
        """Give back what was claimed, so that others need not wait."""
        self._heart.stop()
        for key in list(self._own):
            with contextlib.suppress(StorageError):
                self._drop(key, "lost", RELEASED)
        self.pending.clear()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
