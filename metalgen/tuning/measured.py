"""Tuning on the chip itself: a device's clock decides.

Never run on an Apple GPU by its authors; tested with a device and a clock made for tests.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from metalgen.database.measurement import Measurement, host
from metalgen.devices import Device
from metalgen.errors import MetalgenError
from metalgen.schedule import Limits, Schedule
from metalgen.tuning.measure import Bench, Policy, mlx_runner
from metalgen.tuning.progress import Outcome, Rejected
from metalgen.tuning.search import Search, rank
from metalgen.tuning.session import CHECKS_A_PROBLEM, Session, by_time
from metalgen.tuning.starts import borrowed_schedules
from metalgen.tuning.verifying import failure_status, first_line

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
AGAIN = "default again"
"""The default schedule's second entry in a race, against itself."""
HOPELESS = 10.0
"""A schedule this many times slower than the best is measured once only."""


@dataclass
class MeasuredSession(Session):
    """Searches, measures, checks, and races the best against the default and MLX."""

    device: Device
    policy: Policy = field(default_factory=Policy)

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
        search = Search(self.space, self.valid, self.seed, first=self._starts(), small=self.goal())
        for row in self.rows(self.policy_key):
            search.tell(row.schedule, row.seconds if row.status == "ok" else None)
        bench = Bench(self.problem, self.policy, self.clock)
        known = len(search.times)
        self._show_search(search)
        # The default is asked for first: it races even where earlier rows are as many as wanted.
        while self.default not in search.times or len(search.times) < self.goal():
            schedule = search.ask()
            if schedule is None:
                break
            row = self._measure(bench, schedule, search, cold=len(search.times) == known)
            self.store.add_measurement(row)
            search.tell(schedule, row.seconds if row.status == "ok" else None)
            self._show_search(search)
            if len(search.times) % DRIFT_EVERY == 0:
                self._watch_drift(bench, search)
        self._note_search()
        winner, rejected, note = self._finals(bench)
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

    @property
    def policy_key(self) -> str:
        """The policy, and the software that it measured: another MLX or system measures anew."""
        here = host()
        software = {"mlx": here["mlx_version"], "os": here["os"].partition(".")[0]}
        fields = json.loads(self.policy.key) | software
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    def _starts(self) -> tuple[Schedule, ...]:
        """The best of earlier software, of near chips and buckets, and of the chip model."""
        earlier = self.store.measurements(
            self.problem,
            chip=self.chip.name,
            template_hash=self.report.template_hash,
            provenance="measured",
            verified=True,
        )
        stale = [m for m in by_time(earlier) if m.policy != self.policy_key]
        try:
            ranked = rank(self.problem, self.valid, self.chip)
        except MetalgenError:  # a chip that the model does not know
            ranked = []
        starts = [m.schedule for m in stale][:FINALISTS]
        starts += borrowed_schedules(self.problem, self.chip, self.store)
        starts += [s for _, s in ranked[:MODEL_STARTS]]
        return tuple(dict.fromkeys(s for s in starts if s in self.valid))

    def _show_search(self, search: Search[Schedule]) -> None:
        times = {s: t for s, t in search.times.items() if t < math.inf}
        best = min(times, key=lambda s: times[s], default=None)
        self.show(
            phase="measuring",
            tried=len(search.times),
            best=best,
            best_seconds=times[best] if best else None,
            default_seconds=times.get(self.default),
        )

    def _measure(
        self, bench: Bench, schedule: Schedule, search: Search[Schedule], *, cold: bool
    ) -> Measurement:
        """Build and time one schedule, whatever comes of it."""
        name, policy = self.device.name, self.policy_key
        best = min(search.times.values(), default=math.inf)
        try:
            runner = self.device.build(self.problem.config, schedule, self.problem.family)
            if cold:
                bench.warm_up(runner)
            timing = bench.measure(runner, give_up=HOPELESS * best)
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

    def _watch_drift(self, bench: Bench, search: Search[Schedule]) -> None:
        """Measure the best so far once more; where its time has changed, warm up."""
        best = min(search.times, key=lambda s: search.times[s])
        if search.times[best] == math.inf:
            return
        runner = self.device.build(self.problem.config, best, self.problem.family)
        change = bench.measure(runner).median / search.times[best] - 1.0
        self.notes.setdefault("drift", []).append(round(change, 4))
        if abs(change) > DRIFT:
            bench.warm_up(runner)

    def _note_search(self) -> None:
        """Put the drift that was seen and the number of outliers into the run's record."""
        if self.notes:
            self.store.note_run(self.report.run, self.problem.key, self.notes)

    def _finals(self, bench: Bench) -> tuple[Measurement | None, list[Rejected], str]:
        """Race the best that pass their check; the quickest of them wins."""
        policy = self.policy_key
        self.show(phase="checking")
        ran = by_time(self.rows(policy))
        finalists: list[Schedule] = []
        rejected: list[Rejected] = []
        for row in ran:
            if len(finalists) == FINALISTS or len(rejected) == CHECKS_A_PROBLEM:
                break
            check = self.checker.check(self.problem.config, row.schedule, self.problem.family)
            if check.ok:
                finalists.append(row.schedule)
            else:
                rejected.append(Rejected(row.schedule, check.status, check.detail))
            self.show()
        if not finalists:
            return None, rejected, "no schedule ran and passed its check"
        self.show(phase="finals")
        if any(m.schedule == self.default for m in ran) and self.default not in finalists:
            self.checker.check(self.problem.config, self.default, self.problem.family)
            finalists.append(self.default)
        if not {m.schedule for m in self.rows(policy, "final")}.issuperset(finalists):
            self._race(bench, finalists)
        finals = by_time([m for m in self.rows(policy, "final") if m.verified])
        return (finals[0], rejected, "") if finals else (None, rejected, "no finalist passed")

    def _race(self, bench: Bench, schedules: Sequence[Schedule]) -> None:
        """Measure finalists and MLX's own attention, interleaved, and keep the rows."""
        config, family = self.problem.config, self.problem.family
        runners = {s.key: self.device.build(config, s, family) for s in schedules}
        own = mlx_runner(self.problem)
        rivals = {"mlx": own} if own else {}
        if self.default.key in runners:  # A against A: what no difference looks like
            rivals[AGAIN] = runners[self.default.key]
        timings = bench.compare(runners | rivals)
        default = timings.get(self.default.key)
        if default:
            self.notes["noise_floor"] = round(abs(timings[AGAIN].median / default.median - 1), 5)
        outliers = sum(timing.outliers for timing in timings.values())
        if outliers:
            self.notes["outliers"] = self.notes.get("outliers", 0) + outliers
        self._note_search()
        self.store.add_measurements(
            self.row(
                schedule,
                self.device.name,
                self.policy_key,
                phase="final",
                seconds=timings[schedule.key].median,
                spread=timings[schedule.key].spread,
                samples=timings[schedule.key].samples,
                default_seconds=default.median if default else None,
                mlx_seconds=timings["mlx"].median if own else None,
            )
            for schedule in schedules
        )
