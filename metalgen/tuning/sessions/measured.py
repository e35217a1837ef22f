"""Tuning on the chip itself: a device's clock decides.

Run on an NVIDIA H200, never on an Apple GPU by its authors; tested with devices and clocks made for
tests.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from metalgen.calls.check import failure_status, first_line
from metalgen.database.measurement import Measurement, host
from metalgen.database.merging import merge_rows
from metalgen.database.rows import row_of_measurement
from metalgen.database.store import Store
from metalgen.database.winners import Standing, ordered, winner
from metalgen.devices import Device
from metalgen.errors import MetalgenError
from metalgen.families import Limits, Schedule
from metalgen.plurals import counted
from metalgen.tuning.progress import Outcome, Rejected
from metalgen.tuning.search.candidates import candidates
from metalgen.tuning.search.named import BRUTE_FORCE, DEFAULT_SAMPLER, make_sampler
from metalgen.tuning.search.ranking import rank
from metalgen.tuning.search.starts import borrowed_schedules
from metalgen.tuning.sessions.session import CHECKS_A_PROBLEM, Session, by_time
from metalgen.tuning.timing.measure import Policy
from metalgen.tuning.timing.racing import MLX
from metalgen.tuning.workers.executing import Executor

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

    from metalgen.tuning.study.claims import TuningStudy
    from metalgen.tuning.study.trials import Share

MODEL_STARTS = 8
"""The chip model's best schedules, with which a search starts after the default."""
DEFAULT_TRIALS = 100
"""Schedules that are tried for a problem, unless told otherwise."""
FINALISTS = 5
"""Schedules that are measured again, interleaved with the default and MLX."""
DRIFT_EVERY = 25
"""Measurements after which the best so far is measured again."""
DRIFT = 0.03
"""Change of its time from which the device is warmed up anew."""
HOPELESS = 10.0
"""A schedule this many times slower than the best is measured once only."""


@dataclass
class MeasuredSession(Session):
    """Searches, measures, checks, and races the best against the default and MLX.

    The search is an Optuna study: in memory, or where others work on it too (`share`). Then one of
    the workers races the best; the others wait for it, take its rows, and check its finalists on
    their own device.
    """

    device: Device
    policy: Policy
    executor: Executor
    share: Share | None = None
    sampler: str = DEFAULT_SAMPLER
    prune: bool = True

    storage: BaseStorage = field(init=False)
    study: TuningStudy | None = field(init=False, default=None)
    notes: dict[str, Any] = field(default_factory=dict)
    """What the run's record says of the present problem: drift, outliers, noise floor."""
    warm: bool = field(init=False, default=False)

    provenance = "measured"
    math_modes = ("safe", "fast")

    def __post_init__(self) -> None:
        from optuna.storages import InMemoryStorage

        from metalgen.tuning.study.storage import open_storage

        self.storage = open_storage(self.share.url) if self.share else InMemoryStorage()

    @property
    def limits(self) -> Limits:
        """The device's."""
        return self.device.limits

    def goal(self) -> int:
        """As many as were asked for, or 100; all where there are fewer, or by brute force."""
        usual = len(self.valid) if self.sampler == BRUTE_FORCE else DEFAULT_TRIALS
        return min(len(self.valid), self.trials or usual)

    def close(self) -> None:
        """Give back what is claimed, and the connection."""
        from metalgen.tuning.study.storage import close_storage

        self._leave()
        close_storage(self.storage)

    def work(self) -> Outcome:
        """Search until the goal, then the finals."""
        self.notes = {}
        self.warm = False
        try:
            return self._tune(self._join())
        finally:
            self._leave()

    def _tune(self, study: TuningStudy) -> Outcome:
        self._show_search(study)
        while schedule := self._next(study):
            row = self._measure(schedule, study)
            self.store.add_measurement(row)
            study.publish(row)
            self._show_search(study)
            if len(study.rows) % DRIFT_EVERY == 0:
                self._watch_drift(study)
        self._note_search()
        won, rejected, note = self._finals(study)
        if won:  # what is shown at last; the budget has no say any more
            self.progress.best, self.progress.best_seconds = won.schedule, won.seconds
            self.progress.default_seconds = won.default_seconds
        return Outcome(
            self.problem,
            won,
            won.default_seconds if won else study.seconds.get(self.default),
            len(self.valid),
            len(study.rows),
            study.published,
            tuple(rejected),
            note,
        )

    # The study

    def _join(self) -> TuningStudy:
        """The study of the present problem, which knows the rows that are there."""
        from metalgen.tuning.study.claims import Extent, TuningStudy
        from metalgen.tuning.study.sampling import Sampling
        from metalgen.tuning.study.trials import Trials

        config, family = self.problem.config, self.problem.family
        points = candidates(config, self.limits, family, self.math_modes)
        starts = (self.default, *self._starts())
        # Where all will be tried, it does not matter what a sampler would say.
        whole = self.goal() == len(self.valid)
        sampling = Sampling(
            points.finite,
            make_sampler(BRUTE_FORCE if whole else self.sampler, points.finite, self.seed),
            {points.index[s] for s in starts},
            None if self.share else self.executor.ahead,
        )
        facts = {
            "chip": self.chip.name,
            "cores": self.chip.cores,
            "device": self.device.name,
            "policy": self.policy_key,
        }
        trials = Trials(self.storage, self.problem, facts, points, self.share)
        extent = Extent(self.goal(), self.executor.ahead)
        self.study = study = TuningStudy(trials, sampling, extent, self._receive)
        study.contribute(self.rows(self.policy_key))
        study.enqueue(starts)
        return study

    def _leave(self) -> None:
        if self.study is not None:
            self.study.close()
            self.study = None

    def _receive(self, rows: list[Measurement]) -> None:
        assert isinstance(self.store, Store)  # of a run that shares its work
        merge_rows(self.store, map(row_of_measurement, rows))

    def _next(self, study: TuningStudy) -> Schedule | None:
        """What to measure now, after asking for what to compile meanwhile; None at the goal."""
        while True:
            while study.ask() is not None:
                pass
            pending = study.pending
            self.executor.prepare(self.problem, pending)
            if pending:
                if len(study.asked) >= self.goal():  # less and less to compile from now on
                    best = sorted(study.seconds, key=study.seconds.__getitem__)[:FINALISTS]
                    self.executor.prepare_race(self.problem, self._with_default(best))
                return pending[0]
            if not study.unfinished:
                return None
            self._wait(study)

    def _wait(self, study: TuningStudy) -> None:
        assert self.share is not None, "nobody else has what is missing"
        self._show_search(study)  # also ends the run when its budget is spent
        time.sleep(self.share.poll)

    def _with_default(self, schedules: Sequence[Schedule]) -> list[Schedule]:
        return list(dict.fromkeys([*schedules, self.default]))

    @property
    def policy_key(self) -> str:
        """The policy, and the software that it measured: another MLX or system measures anew."""
        here = host()
        software = {"mlx": here["mlx_version"], "os": here["os"].partition(".")[0]}
        fields = json.loads(self.policy.key) | software
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    def _starts(self) -> tuple[Schedule, ...]:
        """What won here by other software, templates or policies; elsewhere; by the chip model."""
        from metalgen.database.records import recorded

        name = self.chip.name
        earlier = self.store.measurements(self.problem, chip=name, provenance="measured")
        shipped = (m for m in recorded(self.problem, [name]) if m.problem == self.problem)
        other = [
            m
            for m in (*earlier, *shipped)
            if m.provenance == "measured"
            and (m.template_hash not in self.templates or m.policy != self.policy_key)
        ]
        stale = ordered(m for m in other if m.status == "ok")
        try:
            ranked = rank(self.problem, self.valid, self.chip)
        except MetalgenError:  # a chip that the model does not know
            ranked = []
        starts = list(dict.fromkeys(m.schedule for m in stale))[:FINALISTS]
        starts += borrowed_schedules(self.problem, self.chip, self.store)
        starts += [s for _, s in ranked[:MODEL_STARTS]]
        valid = set(self.valid)
        return tuple(dict.fromkeys(s for s in starts if s in valid))

    def _show_search(self, study: TuningStudy) -> None:
        times = study.seconds
        best = min(times, key=times.__getitem__, default=None)
        self.show(
            phase="measuring",
            tried=len(study.rows),
            best=best,
            best_seconds=times[best] if best else None,
            default_seconds=times.get(self.default),
        )

    def _measure(self, schedule: Schedule, study: TuningStudy) -> Measurement:
        """Build and time one schedule, whatever comes of it."""
        name, policy = self.device.name, self.policy_key
        best = min(study.seconds.values(), default=math.inf)
        stop = functools.partial(study.report, schedule) if self.prune else None
        try:
            if not self.warm:  # whatever others measured, this device is cold
                self.executor.warm_up(self.problem, schedule)
            timing = self.executor.measure(self.problem, schedule, HOPELESS * best, stop)
        except (MetalgenError, RuntimeError, ValueError) as error:
            status, detail = failure_status(error), first_line(error)
            return self.row(schedule, name, policy, status=status, detail=detail)
        finally:
            self.warm = True
        if timing.outliers:
            self.notes["outliers"] = self.notes.get("outliers", 0) + timing.outliers
        default = study.seconds.get(self.default)
        if schedule == self.default:
            default = timing.median
        taken = len(timing.samples)
        seen = f"ended after {counted(taken, 'sample')}, by which it could not win"
        return self.row(
            schedule,
            name,
            policy,
            status="pruned" if timing.stopped else "ok",
            detail=seen if timing.stopped else "",
            seconds=timing.median,
            spread=timing.spread,
            samples=timing.samples,
            default_seconds=default,
        )

    def _watch_drift(self, study: TuningStudy) -> None:
        """Measure the best so far once more; where its time has changed, warm up."""
        times = study.seconds
        if not times:
            return
        best = min(times, key=times.__getitem__)
        try:
            again = self.executor.measure(self.problem, best)
            change = again.median / times[best] - 1.0
            self.notes.setdefault("drift", []).append(round(change, 4))
            if abs(change) > DRIFT:
                self.executor.warm_up(self.problem, best)
        except (MetalgenError, RuntimeError, ValueError) as error:
            failure_status(error)  # the finals will have the last word on this kernel

    def _note_search(self) -> None:
        """Put the drift that was seen and the number of outliers into the run's record."""
        if self.notes:
            self.store.note_run(self.report.run, self.problem.key, self.notes)

    def _finals(self, study: TuningStudy) -> tuple[Measurement | None, list[Rejected], str]:
        """Race the best, or wait for the worker that does."""
        while not study.claim_finals():
            if study.raced():
                return self._race_best()  # the rows are there: nothing is raced again
            self._wait(study)
        found = self._race_best()
        # What was checked goes along, and so does what failed its check.
        rows = self.rows(self.policy_key) + self.rows(self.policy_key, "final")
        study.publish_finals(
            [m for m in rows if m.phase == "final" or m.verified or m.status == "wrong"]
        )
        return found

    def _race_best(self) -> tuple[Measurement | None, list[Rejected], str]:
        """Race the best that pass their check; the quickest beyond doubt wins, or the default."""
        policy = self.policy_key
        self.show(phase="checking")
        before = {m.schedule: m.status for m in self.rows(policy, "final")}
        raced = set(before)
        ran = by_time(self.rows(policy))
        likely = self._with_default([m.schedule for m in ran[:FINALISTS]])
        if not raced.issuperset(likely):
            self.executor.prepare_race(self.problem, likely)
        finalists: list[Schedule] = []
        rejected: list[Rejected] = []
        for row in ran:
            if len(finalists) == FINALISTS or len(rejected) == CHECKS_A_PROBLEM:
                break
            check = self.checker.check(self.problem.config, row.schedule)
            if check.ok:
                finalists.append(row.schedule)
            else:
                rejected.append(Rejected(row.schedule, check.status, check.detail))
            self.show()
        if not finalists:
            return None, rejected, "no schedule ran and passed its check"
        self.show(phase="finals")
        known = {*finalists, *(r.schedule for r in rejected)}
        if any(m.schedule == self.default for m in ran) and self.default not in known:
            check = self.checker.check(self.problem.config, self.default)
            if check.ok:
                finalists.append(self.default)
            else:  # wrong figures are nothing to compare with
                rejected.append(Rejected(self.default, check.status, check.detail))
        note = ""
        if not raced.issuperset(finalists):
            finalists = [s for s in finalists if before.get(s, "ok") == "ok"]
            note = self._race(finalists)
            if note and (running := self._still_running(finalists)):
                note = self._race(running)
        won = winner(self.rows(policy, "final"))
        return won, rejected, self._used_instead(won) if won else note or "no finalist passed"

    def _used_instead(self, won: Measurement) -> str:
        """Why calls use another row than the one that won now; empty where they do not."""
        best = winner(self.present())
        if best is None or best.schedule == won.schedule:
            return ""
        how = "with a cold cache" if Standing.of(won).warm else "under another policy"
        return f"calls use {best.schedule}, measured {how}"

    def _still_running(self, schedules: Sequence[Schedule]) -> list[Schedule]:
        """The finalists of a race that failed that run by themselves; the others become rows."""
        running = []
        for schedule in schedules:
            try:
                self.executor.measure(self.problem, schedule)
                running.append(schedule)
            except (MetalgenError, RuntimeError, ValueError) as error:
                status, detail = failure_status(error), first_line(error)
                fields = {"phase": "final", "status": status, "detail": detail}
                name, policy = self.device.name, self.policy_key
                self.store.add_measurement(self.row(schedule, name, policy, **fields))
        return running

    def _race(self, schedules: Sequence[Schedule]) -> str:
        """Measure finalists and MLX's own attention, interleaved, and keep the rows.

        Returns why there are none, where the race could not be run.
        """
        takes_part = self.default if self.default in schedules else None
        try:
            race = self.executor.race(self.problem, schedules, takes_part, self.deadline)
        except (MetalgenError, RuntimeError, ValueError) as error:
            return f"the finals ended with status {failure_status(error)}: {first_line(error)}"
        if takes_part:
            self.notes["noise_floor"] = round(race.noise, 5)
        outliers = sum(timing.outliers for timing in race.timings.values())
        if outliers:
            self.notes["outliers"] = self.notes.get("outliers", 0) + outliers
        self._note_search()
        default = race.timings[takes_part.key].median if takes_part else None
        own = race.timings.get(MLX)
        self.store.add_measurements(
            self.row(
                schedule,
                self.device.name,
                self.policy_key,
                phase="final",
                seconds=race.timings[schedule.key].median,
                spread=race.timings[schedule.key].spread,
                samples=race.timings[schedule.key].samples,
                default_seconds=default,
                mlx_seconds=own.median if own else None,
                error=self.checker.error(self.problem.config, schedule),
                detail=race.reservation(schedule.key),
            )
            for schedule in schedules
        )
        return ""
