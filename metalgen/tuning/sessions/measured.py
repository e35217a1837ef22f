"""Tuning on the chip itself: a device's clock decides.

Run on an NVIDIA H200, never on an Apple GPU by its authors; tested with devices and clocks made for
tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from metalgen.calls.check import failure_status, first_line
from metalgen.database.measurement import Measurement, host
from metalgen.database.winners import Standing, ordered, winner
from metalgen.devices import Device
from metalgen.errors import MetalgenError
from metalgen.families import Limits, Schedule
from metalgen.tuning.progress import Outcome, Rejected
from metalgen.tuning.search.ahead import Ahead, Asks
from metalgen.tuning.search.search import FAILED, Search, rank
from metalgen.tuning.search.starts import borrowed_schedules
from metalgen.tuning.sessions.session import CHECKS_A_PROBLEM, Session, by_time
from metalgen.tuning.timing.measure import Policy
from metalgen.tuning.timing.racing import MLX
from metalgen.tuning.workers.executing import Executor

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
    """Searches, measures, checks, and races the best against the default and MLX."""

    device: Device
    policy: Policy
    executor: Executor

    notes: dict[str, Any] = field(default_factory=dict)
    """What the run's record says of the present problem: drift, outliers, noise floor."""

    provenance = "measured"
    math_modes = ("safe", "fast")

    @property
    def limits(self) -> Limits:
        """The device's."""
        return self.device.limits

    def goal(self) -> int:
        """As many as were asked for, or 100; all where there are fewer."""
        return min(len(self.valid), self.trials or DEFAULT_TRIALS)

    def work(self) -> Outcome:
        """Search until the goal, then the finals."""
        self.notes = {}
        starts = self._starts()

        def make() -> Search[Schedule]:
            return Search(self.space, self.valid, self.seed, first=starts, small=self.goal())

        search = self._asks(make, self.rows(self.policy_key))
        known = len(search.times)
        self._show_search(search)
        while schedule := self._next(search):
            row = self._measure(schedule, search, cold=len(search.times) == known)
            self._keep(row, search)
            self._show_search(search)
            if len(search.times) % DRIFT_EVERY == 0:
                self._watch_drift(search)
        self._note_search()
        winner, rejected, note = self._finals()
        if winner:  # what is shown at last; the budget has no say any more
            self.progress.best, self.progress.best_seconds = winner.schedule, winner.seconds
            self.progress.default_seconds = winner.default_seconds
        default = search.times.get(self.default, math.inf)
        return Outcome(
            self.problem,
            winner,
            winner.default_seconds if winner else default if default < math.inf else None,
            len(self.valid),
            len(search.times),
            len(search.times) - known,
            tuple(rejected),
            note,
        )

    def _asks(
        self, make: Callable[[], Search[Schedule]], rows: Sequence[Measurement]
    ) -> Asks[Schedule]:
        """The search of the present problem, which knows the rows that are there."""
        return Ahead(make, [(m.schedule, _seconds(m)) for m in rows], self.executor.ahead)

    def _keep(self, row: Measurement, search: Asks[Schedule]) -> None:
        """Commit a row, then let the search know."""
        self.store.add_measurement(row)
        search.tell(row.schedule, _seconds(row))

    def _next(self, search: Asks[Schedule]) -> Schedule | None:
        """What to measure now, after asking for what to compile meanwhile; None at the goal."""
        # The default is asked for first: it races even where earlier rows are as many as wanted.
        while self.default not in search.asked or len(search.asked) < self.goal():
            if search.ask() is None:
                break
        pending = search.pending
        self.executor.prepare(self.problem, pending)
        if pending and len(search.asked) >= self.goal():  # less and less to compile from now on
            times = {s: t for s, t in search.times.items() if t < FAILED}
            best = sorted(times, key=lambda s: times[s])[:FINALISTS]
            self.executor.prepare_race(self.problem, self._with_default(best))
        return pending[0] if pending else None

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
        present = (self.report.template_hash, self.policy_key)
        other = [
            m
            for m in (*earlier, *shipped)
            if (m.template_hash, m.policy) != present and m.provenance == "measured"
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

    def _show_search(self, search: Asks[Schedule]) -> None:
        times = {s: t for s, t in search.times.items() if t < math.inf}
        best = min(times, key=lambda s: times[s], default=None)
        self.show(
            phase="measuring",
            tried=len(search.times),
            best=best,
            best_seconds=times[best] if best else None,
            default_seconds=times.get(self.default),
        )

    def _measure(self, schedule: Schedule, search: Asks[Schedule], *, cold: bool) -> Measurement:
        """Build and time one schedule, whatever comes of it."""
        name, policy = self.device.name, self.policy_key
        best = min(search.times.values(), default=math.inf)
        try:
            if cold:
                self.executor.warm_up(self.problem, schedule)
            timing = self.executor.measure(self.problem, schedule, HOPELESS * best)
        except (MetalgenError, RuntimeError, ValueError) as error:
            status, detail = failure_status(error), first_line(error)
            return self.row(schedule, name, policy, status=status, detail=detail)
        if timing.outliers:
            self.notes["outliers"] = self.notes.get("outliers", 0) + timing.outliers
        default = search.times.get(self.default, math.inf)
        if schedule == self.default:
            default = timing.median
        return self.row(
            schedule,
            name,
            policy,
            seconds=timing.median,
            spread=timing.spread,
            samples=timing.samples,
            default_seconds=default if default < math.inf else None,
        )

    def _watch_drift(self, search: Asks[Schedule]) -> None:
        """Measure the best so far once more; where its time has changed, warm up."""
        best = min(search.times, key=lambda s: search.times[s])
        if search.times[best] == FAILED:
            return
        try:
            again = self.executor.measure(self.problem, best)
            change = again.median / search.times[best] - 1.0
            self.notes.setdefault("drift", []).append(round(change, 4))
            if abs(change) > DRIFT:
                self.executor.warm_up(self.problem, best)
        except (MetalgenError, RuntimeError, ValueError) as error:
            failure_status(error)  # the finals will have the last word on this kernel

    def _note_search(self) -> None:
        """Put the drift that was seen and the number of outliers into the run's record."""
        if self.notes:
            self.store.note_run(self.report.run, self.problem.key, self.notes)

    def _finals(self) -> tuple[Measurement | None, list[Rejected], str]:
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
        rows = self.store.measurements(
            self.problem,
            chip=self.chip.name,
            template_hash=self.report.template_hash,
            provenance=self.provenance,
        )
        best = winner(rows)
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


def _seconds(row: Measurement) -> float | None:
    return row.seconds if row.status == "ok" else None
