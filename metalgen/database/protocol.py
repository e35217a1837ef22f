"""What a store of tuning records is: the methods that tuning, exporting and the commands call.

`metalgen.database.store.Store`, an SQLite file, is the one that metalgen has. Any other one must
pass `metalgen.testing.stores.StoreConformance`, which says what each method promises.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from metalgen.database.measurement import Measurement
    from metalgen.families import Schedule
    from metalgen.families.sizes import Problem
    from metalgen.problem.config import AttentionConfig


@dataclass(frozen=True)
class Check:
    """One execution of a config by a schedule against the float64 reference.

    ``error`` and ``tolerance`` are relative (norm over norm), and None where there is no finite
    one; ``shape`` says what was run.
    """

    config: AttentionConfig
    schedule: Schedule
    template_hash: str
    device: str
    status: str
    error: float | None = None
    tolerance: float | None = None
    shape: str = ""
    detail: str = ""
    family: str = "forward"
    created: str = ""

    @property
    def ok(self) -> bool:
        """Whether the kernel may be dispatched as far as this check goes."""
        return self.status == "ok"


@dataclass(frozen=True)
class Run:
    """A tuning run; ``notes`` is JSON of an object; ``ended`` and ``outcome`` come with its end."""

    id: str
    chip: str
    seed: int
    started: str
    ended: str | None
    outcome: str | None
    notes: str


class TuningStore(Protocol):
    """An open store. Every method either commits before it returns or changes nothing.

    Methods raise `ArgumentError` for what cannot be recorded, and `DatabaseError` where the store
    itself is at fault: closed, read-only, or out of reach.
    """

    def close(self) -> None:
        """Let go of the store; twice does no harm."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exc: object) -> None: ...

    def begin_run(self, chip: str, seed: int, notes: dict[str, Any] | None = None) -> str:
        """Record that a tuning run began; returns its id."""
        ...

    def end_run(self, run: str, outcome: str) -> None:
        """Record how a run ended: ``"finished"``, ``"interrupted"``, ``"budget"``, ``"failed"``."""

    def note_run(self, run: str, name: str, value: Any) -> None:
        """Add to what is on record about a run; ``value`` is plain JSON."""

    def runs(self) -> list[Run]:
        """Every run, in the order they began."""
        ...

    def add_measurement(self, measurement: Measurement) -> bool:
        """Commit one measurement; False where the same one is there already, which is kept."""
        ...

    def add_measurements(
        self, measurements: Iterable[Measurement], *, replace_predictions: Collection[str] = ()
    ) -> int:
        """Commit several measurements at once, all or none; returns how many were new.

        With `replace_predictions`, template hashes, modelled rows of these about the same problem
        and chip that another version of the chip model made are removed. Measured rows never are.
        """
        ...

    def measurements(
        self,
        problem: Problem | None = None,
        *,
        chip: str | None = None,
        template_hash: str | None = None,
        provenance: str | None = None,
        policy: str | None = None,
        phase: str | None = None,
        verified: bool | None = None,
        config: str | None = None,
        family: str | None = None,
    ) -> list[Measurement]:
        """The measurements that fit every argument given, in the order they were committed."""
        ...

    def problems(self, chip: str | None = None) -> list[Problem]:
        """Every problem that has a measurement (on `chip`), in the order of their keys."""
        ...

    def record_check(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        template_hash: str,
        device: str,
        status: str,
        *,
        error: float | None = None,
        tolerance: float | None = None,
        shape: str = "",
        detail: str = "",
        family: str = "forward",
        source_hash: str = "",
    ) -> None:
        """Commit the outcome of a check, and what follows for the measurements of that kernel."""

    def find_check(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        template_hash: str,
        device: str | None = None,
        *,
        family: str = "forward",
    ) -> Check | None:
        """The check of a kernel on `device`; with None on any, a failed one before a passed one."""
        ...

    def pin(self, problem: Problem, schedule: Schedule, note: str = "") -> None:
        """Make look-ups of a problem answer with this schedule."""

    def unpin(self, problem: Problem) -> bool:
        """Undo `pin`; False if the problem was not pinned."""
        ...

    def prune(
        self,
        *,
        keep_templates: Collection[str] | None = None,
        provenance: str | None = None,
        chip: str | None = None,
        dry_run: bool = False,
    ) -> int:
        """Remove measurements that fit every argument given; returns how many."""
        ...

    def count_of_other_templates(self, present: Collection[str]) -> int:
        """How many measurements have a template hash that is none of these."""
        ...
