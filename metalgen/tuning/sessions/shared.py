"""Measuring one study together with workers on other machines of the same chip."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from metalgen.database.measurement import Measurement
from metalgen.database.merging import merge_rows
from metalgen.database.rows import row_of_measurement
from metalgen.database.store import Store
from metalgen.families import Schedule
from metalgen.tuning.progress import Outcome, Rejected
from metalgen.tuning.search.ahead import Asks
from metalgen.tuning.search.search import Search
from metalgen.tuning.sessions.measured import MeasuredSession
from metalgen.tuning.study.distributed import Share, SharedStudy
from metalgen.tuning.study.storage import close_storage, open_storage

if TYPE_CHECKING:
    from optuna.storages import BaseStorage


@dataclass(kw_only=True)
class SharedSession(MeasuredSession):
    """Takes schedules that no other worker has; the store gets every worker's rows.

    One of the workers races the best; the others wait for it, take its rows, and check its
    finalists on their own device.
    """

    share: Share
    store: Store  # others' rows are merged into it

    storage: BaseStorage = field(init=False)
    study: SharedStudy | None = field(init=False, default=None)
    warm: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.storage = open_storage(self.share.url)

    def close(self) -> None:
        """Give back what is claimed, and the connection."""
        if self.study is not None:
            self.study.close()
            self.study = None
        close_storage(self.storage)

    def work(self) -> Outcome:
        """The same as alone, but for the study."""
        self.warm = False
        try:
            outcome = super().work()
            assert self.study is not None
            return dataclasses.replace(outcome, new=self.study.published)
        finally:
            if self.study is not None:
                self.study.close()
                self.study = None

    def _asks(
        self, make: Callable[[], Search[Schedule]], rows: Sequence[Measurement]
    ) -> Asks[Schedule]:
        facts = {
            "chip": self.chip.name,
            "cores": self.chip.cores,
            "device": self.device.name,
            "template_hash": self.report.template_hash,
            "policy": self.policy_key,
        }
        self.study = SharedStudy(
            self.share,
            self.storage,
            self.problem,
            facts,
            self.space,
            make,
            self.goal(),
            self.executor.ahead,
            self._receive,
        )
        self.study.contribute(rows)
        return self.study

    def _receive(self, rows: list[Measurement]) -> None:
        merge_rows(self.store, map(row_of_measurement, rows))

    def _keep(self, row: Measurement, search: Asks[Schedule]) -> None:
        assert self.study is not None
        self.store.add_measurement(row)
        self.study.publish(row)

    def _next(self, search: Asks[Schedule]) -> Schedule | None:
        """What this worker measures now; None when there is nothing left for any of them."""
        assert self.study is not None
        while True:
            while search.ask() is not None:
                pass
            if search.pending:
                self.executor.prepare(self.problem, search.pending)
                return search.pending[0]
            if not self.study.unfinished:
                return None
            self._wait(search)

    def _wait(self, search: Asks[Schedule]) -> None:
        self._show_search(search)  # also ends the run when its budget is spent
        time.sleep(self.share.poll)

    def _measure(self, schedule: Schedule, search: Asks[Schedule], *, cold: bool) -> Measurement:
        # Others may have measured before this worker's first: the device is as cold as ever.
        row = super()._measure(schedule, search, cold=not self.warm)
        self.warm = True
        return row

    def _finals(self) -> tuple[Measurement | None, list[Rejected], str]:
        study = self.study
        assert study is not None
        while not study.claim_finals():
            if study.raced():
                return super()._finals()  # the rows are there: nothing is raced again
            self._wait(study)
        found = super()._finals()
        # What was checked goes along, and so does what failed its check.
        rows = self.rows(self.policy_key) + self.rows(self.policy_key, "final")
        study.publish_finals(
            [m for m in rows if m.phase == "final" or m.verified or m.status == "wrong"]
        )
        return found
