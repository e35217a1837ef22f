"""The trials of one problem's study in an Optuna storage: what is written, what is read.

A measured row travels as a canonical line in its trial, and is checked like any record from
elsewhere by whichever worker reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import optuna
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from metalgen.database.measurement import Measurement
from metalgen.database.rows import FAULTS, check, row_of_measurement, short
from metalgen.database.untrusted import parse_object
from metalgen.errors import ArgumentError
from metalgen.families import Schedule, decode_schedule
from metalgen.families.sizes import Problem
from metalgen.kinds import get_kind
from metalgen.source.hashes import template_hash
from metalgen.tuning.search.candidates import Candidates
from metalgen.tuning.study.heart import BEAT
from metalgen.tuning.study.storage import StorageError, explained, masked

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

FINALS = "finals"
"""What a trial is of, other than a schedule: the race of the best."""
STATES = {"ok": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
"""Of trials, by the status of their rows; any other status is a failure."""


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


class Trials:
    """The trials of one problem's study.

    Args:
        storage: where the study is: in memory for a worker that is alone.
        problem: what is tuned.
        facts: what all workers must have in common: chip, policy and the like. Their templates
            must be the same, too.
        candidates: the valid schedules.
        share: where workers meet; None for a worker that is alone.

    Raises:
        StorageError: the storage fails, or its study is of workers unlike this one.
    """

    def __init__(
        self,
        storage: BaseStorage,
        problem: Problem,
        facts: Mapping[str, Any],
        candidates: Candidates,
        share: Share | None = None,
    ) -> None:
        self.storage = storage
        self.problem = problem
        self.facts = dict(facts)
        self.candidates = candidates
        self.share = share
        self.templates = {*map(template_hash, {*map(type, candidates.schedules)})}
        self.worker = uuid.uuid4().hex
        self._beats: dict[int, tuple[object, float]] = {}
        self.name, self.study = self._open()

    @property
    def title(self) -> str:
        """Name of the shared study that workers join."""
        return self.share.study if self.share else "metalgen"

    def _open(self) -> tuple[str, int]:
        name = f"{self.title}: {str(self.problem)[:200]} [{_digest(self.problem.key)}]"
        choices = list(self.candidates.finite.choices.items())
        # Optuna takes no other choices of a parameter later on.
        own = {"problem": self.problem.key, "space": _digest(json.dumps(choices))}
        mine = own | {"template_hashes": sorted(self.templates)} | self.facts
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
                    self._where,
                    f"study {self.title!r} is of workers with {key} {theirs.get(key)}, and "
                    f"this one has {value}; run it with what they have, or under another --study",
                )
        return name, study

    def all(self) -> list[FrozenTrial]:
        """Every trial, in the order of their numbers."""
        with self._explained():
            return self.storage.get_all_trials(self.study, deepcopy=False)

    def optuna_study(self, pruner: BasePruner) -> optuna.Study:
        """Optuna's own view of the study."""
        with self._explained():
            return optuna.load_study(study_name=self.name, storage=self.storage, pruner=pruner)

    def new(
        self,
        key: str,
        schedule: Schedule | None,
        state: TrialState,
        rows: Sequence[Measurement] = (),
    ) -> tuple[int, int]:
        """The id and the number of a new trial."""
        finite = self.candidates.finite
        point = self.candidates.index.get(schedule) if schedule else None
        params = finite.points[point] if point is not None else {}
        attributes: dict[str, Any] = {"item": key, "worker": self.worker, BEAT: 0}
        if schedule:
            attributes["schedule"] = str(schedule)
        if state.is_finished():
            attributes |= _attributes(rows)
        template = create_trial(
            state=state,
            value=rows[0].seconds if state == TrialState.COMPLETE else None,
            params=params,
            distributions={name: finite.distributions[name] for name in params},
            user_attrs=attributes,
            intermediate_values=dict(enumerate(rows[0].samples)) if rows and schedule else None,
        )
        with self._explained():
            trial = self.storage.create_new_trial(self.study, template)
            return trial, self.storage.get_trial_number_from_id(trial)

    def take(self, trial: int) -> bool:
        """Set an enqueued trial running, as this worker's; False where another was quicker."""
        try:
            with self._explained():
                if not self.storage.set_trial_state_values(trial, TrialState.RUNNING):
                    return False
                self.storage.set_trial_user_attr(trial, "worker", self.worker)
        except UpdateFinishedTrialError:
            return False
        return True

    def finish(self, trial: int, state: TrialState, rows: Sequence[Measurement]) -> bool:
        """End a running trial with its rows; False where it was taken for dead meanwhile."""
        values = [rows[0].seconds or 0.0] if state == TrialState.COMPLETE else None
        try:
            with self._explained():
                for name, value in _attributes(rows).items():
                    self.storage.set_trial_user_attr(trial, name, value)
                self.storage.set_trial_state_values(trial, state, values)
        except UpdateFinishedTrialError:
            return False
        return True

    def fail(self, trial: int, name: str, reason: str) -> None:
        """End a running or enqueued trial without rows, with an attribute that says why."""
        with contextlib.suppress(UpdateFinishedTrialError), self._explained():
            self.storage.set_trial_user_attr(trial, name, reason)
            self.storage.set_trial_state_values(trial, TrialState.FAIL)

    def report(self, study: optuna.Study, trial: int, step: int, seconds: float) -> bool:
        """Report an intermediate value of a running trial; whether the pruner would end it."""
        with self._explained():
            running = optuna.trial.Trial(study, trial)
            running.report(seconds, step)
            return running.should_prune()

    def bury(self, trials: Sequence[FrozenTrial], own: set[int]) -> bool:
        """Mark trials of others that have shown no sign of life for too long; whether any was.

        Args:
            trials: all of them.
            own: ids of this worker's.
        """
        if self.share is None:
            return False
        now, buried = time.monotonic(), False
        for trial in trials:
            if trial.state != TrialState.RUNNING or trial._trial_id in own:
                continue
            beat = trial.user_attrs.get(BEAT)
            seen = self._beats.get(trial.number)
            if seen is None or seen[0] != beat:
                self._beats[trial.number] = beat, now
            elif now - seen[1] > self.share.grace:
                self.fail(trial._trial_id, "lost", "its worker showed no sign of life")
                buried = True
        return buried

    def schedule(self, key: str) -> Schedule:
        """The schedule that a trial is of."""
        try:
            language = get_kind(self.candidates.default.kind).language
            return decode_schedule(parse_object(key), self.problem.family, language)
        except FAULTS as error:
            raise self._foreign(error) from None

    def read(self, key: str, lines: object) -> list[Measurement]:
        """The rows of a trial, as carefully as those of a record file."""
        try:
            if not isinstance(lines, list) or (key != FINALS and len(lines) != 1):
                raise ValueError("a trial without its row")
            rows = []
            for line in lines:
                m = Measurement.from_record(parse_object(line))
                check(m)
                facts = {name: getattr(m, name) for name in self.facts}
                known = facts == self.facts and m.template_hash == template_hash(m.schedule)
                if m.problem != self.problem or not known:
                    raise ValueError("a row of another problem, chip, policy or template")
                if key not in (FINALS, m.schedule.key):
                    raise ValueError("a row of another schedule")
                row_of_measurement(m)
                rows.append(m)
        except FAULTS as error:
            raise self._foreign(error) from None
        return rows

    def _foreign(self, error: Exception) -> StorageError:
        reason = f"study {self.title!r} holds what is not a worker's ({short(error)})"
        return StorageError(self._where, reason)

    @property
    def _where(self) -> str:
        return masked(self.share.url) if self.share else "in memory"

    def _explained(self) -> contextlib.AbstractContextManager[None]:
        return explained(self.share.url if self.share else "in memory")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _attributes(rows: Sequence[Measurement]) -> dict[str, Any]:
    """What a finished trial says of its rows; their lines name them in a tuning database."""
    found: dict[str, Any] = {"rows": [m.to_line() for m in rows]}
    if len(rows) == 1:
        found |= {"status": rows[0].status} | ({"detail": rows[0].detail} if rows[0].detail else {})
    return found
