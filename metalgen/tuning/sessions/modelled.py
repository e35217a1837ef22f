"""Tuning for a chip that is not here: the chip model ranks, the simulator checks.

Nothing is timed. All rows are marked ``modelled``; of the thousands that are ranked, the best and
the default's are stored.
"""

from __future__ import annotations

import functools
import json
import random

from metalgen.calls.check import CannotCheck, first_line
from metalgen.chips.counts import covers
from metalgen.database.measurement import Measurement
from metalgen.database.winners import ordered, winner
from metalgen.families import Limits, Schedule
from metalgen.imports import code_digest, modules_behind
from metalgen.tuning.progress import Outcome, Rejected
from metalgen.tuning.search.ranking import rank
from metalgen.tuning.sessions.session import CHECKS_A_PROBLEM, Session

KEPT = 64
"""Modelled rows that are stored for a problem, beside the default schedule's."""


@functools.cache
def model_version() -> str:
    """8 hexadecimal digits that change when a prediction of the chip model might."""
    return code_digest(modules_behind(["metalgen.chips.model"])).hex()[:8]


class ModelledSession(Session):
    """Ranks the whole space of each problem; checks in that order until a kernel passes."""

    provenance = "modelled"
    math_modes = ("safe",)

    @property
    def limits(self) -> Limits:
        """The chip's."""
        return self.chip.limits

    def goal(self) -> int:
        """All valid schedules, or as many as were asked for."""
        return min(len(self.valid), self.trials or len(self.valid))

    def work(self) -> Outcome:
        """Rank, keep the best, check them in order."""
        candidates = self._candidates()
        spec: dict[str, object] = {"model": model_version(), "ranked": len(candidates)}
        if len(candidates) < len(self.valid):
            spec["seed"] = self.seed
        policy = json.dumps(spec, sort_keys=True, separators=(",", ":"))
        rows = self.rows(policy)
        new = 0
        if not rows:
            rows = self._rank(candidates, policy)
            new = len(candidates)
        else:  # of other versions of the model, which came from elsewhere, none is kept
            self.store.add_measurements(rows, replace_predictions=self.templates)
        rows = [m for m in ordered(self._predictions()) if m.status == "ok"]
        default = next((m.seconds for m in rows if m.schedule == self.default), None)
        self.show(
            phase="checking",
            tried=len(candidates),
            best=rows[0].schedule if rows else None,
            best_seconds=rows[0].seconds if rows else None,
            default_seconds=default,
        )
        won, rejected, note = self._first_that_passes(rows)
        return Outcome(
            self.problem,
            won,
            default,
            len(self.valid),
            len(candidates),
            new,
            tuple(rejected),
            note,
        )

    def _candidates(self) -> tuple[Schedule, ...]:
        """All valid schedules, or the default and a seeded choice of others."""
        if self.goal() == len(self.valid):
            return self.valid
        chosen = random.Random(self.seed).sample(self.valid[1:], self.goal() - 1)
        return (self.default, *chosen)

    def _rank(self, candidates: tuple[Schedule, ...], policy: str) -> list[Measurement]:
        def tick(tried: int, seconds: float, schedule: Schedule) -> None:
            self.show(tried=tried, best_seconds=seconds, best=schedule)

        ranked = rank(self.problem, candidates, self.chip, tick)
        times = {schedule: seconds for seconds, schedule in ranked}
        kept = dict.fromkeys([*(schedule for _, schedule in ranked[:KEPT]), self.default])
        default = times[self.default]
        rows = [
            self.row(s, "model", policy, seconds=times[s], default_seconds=default) for s in kept
        ]
        self.store.add_measurements(rows, replace_predictions=self.templates)
        return self.rows(policy)

    def _predictions(self) -> list[Measurement]:
        """All that is predicted of the present problem, whichever schedules were asked about."""
        return self.present()

    def _first_that_passes(
        self, rows: list[Measurement]
    ) -> tuple[Measurement | None, list[Rejected], str]:
        """The best row whose kernel passes its check, those before it that failed, and a note."""
        rejected: list[Rejected] = []
        for row in rows:
            try:
                check = self.checker.check(self.problem.config, row.schedule)
            except CannotCheck as error:
                return None, rejected, f"not checked: {first_line(error)}"
            if check.ok:
                won = winner(self._predictions())
                assert won is not None  # this row, for all before it have failed
                self.show(best=won.schedule, best_seconds=won.seconds)
                return won, rejected, covers(self.problem.config) or ""
            rejected.append(Rejected(row.schedule, check.status, check.detail))
            if len(rejected) == CHECKS_A_PROBLEM:
                return None, rejected, f"the best {CHECKS_A_PROBLEM} failed their checks"
            self.show()
        return None, rejected, "no schedule passed its check"
