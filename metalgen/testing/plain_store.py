"""The definition of a store: lists in memory, searched from end to end.

Stores are compared with it call by call (`metalgen.testing.stores`), as kernels are with the
float64 reference. Nothing of it is shared with `metalgen.database.store` or `lookup`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from metalgen.database import exchange
from metalgen.database.errors import DatabaseError, ReadOnlyDatabase
from metalgen.database.hit import Hit
from metalgen.database.layout import STATUSES
from metalgen.database.measurement import (
    Measurement,
    check_field,
    check_fields,
    finite,
    host,
    now,
)
from metalgen.database.protocol import Check, Run
from metalgen.errors import ArgumentError, InvalidSchedule
from metalgen.families import Limits, Schedule, check_schedule, get_tuned
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

Kernel = tuple[str, str, str, str]
"""Family, key of the config, key of the schedule, template hash."""

GRAVITY = ("pruned", "timeout", "runtime", "compile", "invalid", "wrong")
"""Of two ways to fail the later one here counts."""


@dataclass
class Contents:
    """What stays when a store is closed."""

    rows: list[Measurement] = field(default_factory=list)
    checks: dict[tuple[Kernel, str], Check] = field(default_factory=dict)
    runs: dict[str, Run] = field(default_factory=dict)
    pins: dict[Problem, Schedule] = field(default_factory=dict)


def _kernel(m: Measurement) -> Kernel:
    return m.problem.family, m.problem.config.key, m.schedule.key, m.template_hash


class PlainStore:
    """A `TuningStore` of contents in memory; several may be open on the same."""

    def __init__(self, contents: Contents, *, read_only: bool = False) -> None:
        self._contents: Contents | None = contents
        self._read_only = read_only

    def close(self) -> None:
        self._contents = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _kept(self) -> Contents:
        if self._contents is None:
            raise DatabaseError("in memory", "is closed")
        return self._contents

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Contents]:
        """The contents; all that was done to them is undone where an exception ends it."""
        kept = self._kept
        if self._read_only:
            raise ReadOnlyDatabase("in memory", "read-only")
        before = {name: copy.copy(value) for name, value in vars(kept).items()}
        try:
            yield kept
        except BaseException:
            vars(kept).update(before)
            raise

    # Runs

    def begin_run(self, chip: str, seed: int, notes: dict[str, Any] | None = None) -> str:
        with self._writing() as kept:
            run = f"run {len(kept.runs)}"
            kept.runs[run] = Run(run, chip, seed, now(), None, None, json.dumps(notes or {}))
        return run

    def end_run(self, run: str, outcome: str) -> None:
        with self._writing() as kept:
            kept.runs[run] = replace(self._run(run), ended=now(), outcome=outcome)

    def note_run(self, run: str, name: str, value: Any) -> None:
        with self._writing() as kept:
            notes = json.loads(self._run(run).notes) | {name: value}
            kept.runs[run] = replace(self._run(run), notes=json.dumps(notes))

    def runs(self) -> list[Run]:
        return list(self._kept.runs.values())

    def _run(self, run: str) -> Run:
        if run not in self._kept.runs:
            raise ArgumentError("run", "a run that was begun", run)
        return self._kept.runs[run]

    # Measurements

    def add_measurement(self, measurement: Measurement) -> bool:
        return self.add_measurements([measurement]) == 1

    def add_measurements(
        self, measurements: Iterable[Measurement], *, replace_predictions: Collection[str] = ()
    ) -> int:
        added, predictions = 0, []
        with self._writing() as kept:
            for m in measurements:
                check_fields(m)
                if m.run not in kept.runs:
                    raise DatabaseError("in memory", f"no run {m.run}")
                if m.provenance == "modelled":
                    predictions.append(m)
                if exchange.identity(m) not in map(exchange.identity, kept.rows):
                    kept.rows.append(self._as_checked(m))
                    added += 1
            of_templates = [m for m in kept.rows if m.template_hash in replace_predictions]
            old = [m for m in of_templates if any(_replaces(new, m) for new in predictions)]
            kept.rows = [m for m in kept.rows if m not in old]
        return added

    def _as_checked(self, m: Measurement) -> Measurement:
        checks = self._checks(_kernel(m))
        good = m.status == "ok" and all(check.ok for check in checks)
        if not good or not (m.verified or checks):
            return replace(m, verified=False)
        errors = [check.error for check in checks if check.error is not None]
        error = max(errors, default=None) if m.error is None else m.error
        return replace(m, verified=True, error=error)

    def measurements(self, problem: Problem | None = None, **filters: Any) -> list[Measurement]:
        wanted = {name: value for name, value in filters.items() if value is not None}
        wanted |= {} if problem is None else {"problem": problem}
        return [m for m in self._kept.rows if all(_field(m, n) == v for n, v in wanted.items())]

    def problems(self, chip: str | None = None) -> list[Problem]:
        found = {m.problem for m in self._kept.rows if chip in (None, m.chip)}
        return sorted(found, key=lambda problem: problem.key)

    def prune(
        self,
        *,
        keep_templates: Collection[str] | None = None,
        provenance: str | None = None,
        chip: str | None = None,
        dry_run: bool = False,
    ) -> int:
        with self._writing() as kept:
            gone = [
                m
                for m in self.measurements(provenance=provenance, chip=chip)
                if keep_templates is None or m.template_hash not in keep_templates
            ]
            if not dry_run:
                kept.rows = [m for m in kept.rows if m not in gone]
        return len(gone)

    def count_of_other_templates(self, present: Collection[str]) -> int:
        return sum(m.template_hash not in present for m in self._kept.rows)

    # Checks and pins

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
        for name, value in (
            ("device", device),
            ("template_hash", template_hash),
            ("detail", detail),
        ):
            check_field(name, value)
        if status not in STATUSES:
            raise ArgumentError("status", f"one of {', '.join(STATUSES)}", status)
        error, tolerance = finite("error", error), finite("tolerance", tolerance)
        outcome = (status, error, tolerance, shape, detail, family, now())
        check = Check(config, schedule, template_hash, device, *outcome)
        kernel = (family, config.key, schedule.key, template_hash)
        with self._writing() as kept:
            kept.checks[kernel, device] = check
            passed = all(c.ok for c in self._checks(kernel))
            follows: dict[str, Any] = {"verified": check.ok, "error": error}
            if not check.ok:
                follows |= {"status": status, "detail": detail}
            if passed or not check.ok:
                kept.rows = [
                    replace(m, **follows) if m.status == "ok" and _kernel(m) == kernel else m
                    for m in kept.rows
                ]

    def _checks(self, kernel: Kernel) -> list[Check]:
        return [check for (known, _), check in self._kept.checks.items() if known == kernel]

    def find_check(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        template_hash: str,
        device: str | None = None,
        *,
        family: str = "forward",
    ) -> Check | None:
        found = self._checks((family, config.key, schedule.key, template_hash))
        on_it = [check for check in found if device in (None, check.device)]
        return min(on_it, key=lambda check: check.ok, default=None)

    def pin(self, problem: Problem, schedule: Schedule, note: str = "") -> None:
        with self._writing() as kept:
            kept.pins[problem] = schedule

    def unpin(self, problem: Problem) -> bool:
        with self._writing() as kept:
            return kept.pins.pop(problem, None) is not None

    # What other modules do with an SQLite file

    def merge(self, sources: Iterable[Path], *, dry_run: bool = False) -> exchange.Summary:
        """As `metalgen.database.exchange.merge`."""
        summary = exchange.Summary()
        arrived: dict[exchange.Key, list[Measurement]] = {}
        for path in sources:
            part = exchange.Summary()
            rows = list(exchange.read(path, part))
            summary.rejected += part.rejected
            summary.refused += part.refused
            summary.reasons += part.reasons
            for m in rows if not part.refused else ():
                arrived.setdefault(exchange.identity(m), []).append(m)
        with self._writing() as kept:
            merged = list(kept.rows)
            places = {exchange.identity(m): n for n, m in enumerate(merged)}
            for key, sides in arrived.items():
                new = functools.reduce(exchange.join, sides)
                failed = [c.status for c in self._checks(_kernel(new)) if not c.ok]
                if failed and new.status == "ok":
                    gravest = max(failed, key=GRAVITY.index)
                    new = replace(new, status=gravest, verified=False)
                known = [merged[places[key]]] if key in places else []
                # What a check of ours made of a row is no conflict between the sources.
                conflict = len({m.status == "ok" for m in sides}) > 1
                conflict |= len({m.status == "ok" for m in (new, *known)}) > 1
                summary.conflicts += conflict
                if not known:
                    merged.append(replace(new, run="merged"))
                    summary.new += 1
                    continue
                here = exchange.canonical(known[0])
                joined = exchange.join(here, new)
                summary.same += joined == here
                summary.pooled += joined != here
                if joined != here:
                    merged[places[key]] = replace(joined, run="merged")
            if not dry_run:
                kept.rows = merged
        return summary

    def look_up(
        self,
        problem: Problem,
        chip: str,
        limits: Limits,
        neighbours: Sequence[str],
        template_hash: str,
    ) -> Hit | None:
        """As `metalgen.database.lookup.lookup`, but for `Hit.place` and `Hit.path`."""
        pinned = self._kept.pins.get(problem)
        if pinned is not None and _runs(problem, pinned, limits):
            return Hit(pinned, "pinned", "", "", exact=True)
        base = chip.partition("-")[0]
        chips = [chip, *sorted(neighbours, key=lambda name: name.partition("-")[0] != base)]
        answers = [
            m
            for m in self._kept.rows
            if m.verified
            and m.template_hash == template_hash
            and m.problem.config == problem.config
            and m.problem.family == problem.family
            and m.chip in chips
            and _runs(problem, m.schedule, limits)
        ]

        def order(m: Measurement) -> tuple[Any, ...]:
            sizes = (m.problem.batch_heads, m.problem.q_len, m.problem.kv_len)
            here = (problem.batch_heads, problem.q_len, problem.kv_len)
            apart = sum(abs(math.log2(a / b)) for a, b in zip(sizes, here, strict=True))
            place = (m.problem != problem, chips.index(m.chip), apart, sizes)
            overlapped = '"chained":true' not in m.policy
            warm = '"cache":"warm"' in m.policy
            within = (_stale(m), warm, overlapped, m.phase != "final", m.detail != "")
            time = (*self._time(m), m.schedule.key)
            return (m.provenance != "measured", *place, *within, *time)

        if not answers:
            return None
        m = min(answers, key=order)
        here = m.problem == problem and m.chip == chip
        times = (m.seconds, m.default_seconds, m.mlx_seconds, m.verified, m.error)
        exact = here and not _stale(m) and '"cache":"warm"' not in m.policy
        return Hit(m.schedule, m.provenance, "", m.chip, exact, _stale(m), *times)

    def _time(self, m: Measurement) -> tuple[Any, ...]:
        """Of two rows the one with less: seconds, or bytes where predictions are as good as equal.

        Those are within 1 % of the least prediction, checked or not, and not above the default's.
        """
        if m.provenance == "measured":
            return (m.seconds,)
        same = [o for o in self._kept.rows if o.problem == m.problem and o.chip == m.chip]
        same = [o for o in same if (o.provenance, o.template_hash) == ("modelled", m.template_hash)]
        seconds = m.seconds or math.inf
        if seconds > 1.01 * min(o.seconds for o in same if o.seconds):
            return (True, 0, seconds)
        if m.default_seconds is not None and seconds > m.default_seconds:
            return (True, 0, seconds)
        return (False, _bytes_read(m.problem, m.schedule), seconds)


def _bytes_read(problem: Problem, schedule: Schedule) -> int:
    sizes = {"batch_heads": problem.batch_heads, "q_len": problem.q_len, "kv_len": problem.kv_len}
    return get_tuned(problem.family).bytes_read(problem.config, schedule, **sizes)


def _replaces(new: Measurement, old: Measurement) -> bool:
    """Whether a prediction is by another version of the chip model than an older one."""

    def asked(m: Measurement) -> tuple[Any, ...]:
        return m.provenance, m.problem, m.chip, m.cores

    return asked(new) == asked(old) and _model(new.policy) != _model(old.policy)


def _model(policy: str) -> Any:
    try:
        return json.loads(policy)["model"]
    except (ValueError, LookupError, TypeError):
        return policy


def _field(m: Measurement, name: str) -> Any:
    if name == "config":
        return m.problem.config.key
    return m.problem.family if name == "family" else getattr(m, name)


def _runs(problem: Problem, schedule: Schedule, limits: Limits) -> bool:
    try:
        check_schedule(problem.config, schedule, limits)
    except InvalidSchedule:
        return False
    return True


def _stale(m: Measurement) -> bool:
    here = host()
    same = m.os.split(".")[0] == here["os"].split(".")[0]
    return m.provenance == "measured" and not (same and m.mlx_version == here["mlx_version"])
