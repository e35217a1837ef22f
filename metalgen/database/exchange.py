"""Carrying measurements between databases: export, merge, compare.

Two rows are the same measurement when all of `IDENTITY` agrees. Where both sides have it, they are
joined: samples are pooled (each as often as in the side that has it more often) and the median is
taken anew; of the times of MLX and of the default schedule the better counts; the graver status
wins, so a row that one side found wrong stays wrong; texts and dates are those of the later side.
Each of these is commutative, associative and idempotent, and so is a merge.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sqlite3
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metalgen.config import AttentionConfig
from metalgen.database.errors import DatabaseError
from metalgen.database.layout import STATUSES
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store, problem_of, row_of
from metalgen.database.untrusted import is_database, open_untrusted, parse_object, read_lines
from metalgen.errors import ArgumentError, InvalidSchedule, MetalgenError
from metalgen.problem import Problem
from metalgen.schedule import Schedule, check_schedule

IDENTITY = (
    *("problem", "schedule", "template_hash", "chip", "cores", "device"),
    *("provenance", "policy", "phase"),
)
GRAVITY = ("ok", "timeout", "runtime", "compile", "invalid", "wrong")
assert sorted(GRAVITY) == sorted(STATUSES)
Key = tuple[Any, ...]
MAX_REASONS = 20
"""Rejected rows whose reason is kept; all are counted."""


@dataclass
class Summary:
    """What a merge does.

    Args:
        new: rows that were not there.
        pooled: rows that were there and changed.
        same: rows that added nothing.
        rejected: rows that were left out.
        conflicts: rows that one side has as ok and the other as failed; part of ``pooled``.
        reasons: why rows or whole files were left out: file, line or row, reason.
    """

    new: int = 0
    pooled: int = 0
    same: int = 0
    rejected: int = 0
    conflicts: int = 0
    refused: int = 0
    reasons: list[tuple[str, str, str]] = field(default_factory=list)

    def reject(self, path: Path, place: str, reason: str, *, whole: bool = False) -> None:
        """Count a row, or a whole file, that was left out."""
        self.refused += whole
        self.rejected += not whole
        if whole or len(self.reasons) < MAX_REASONS:
            self.reasons.append((str(path), place, reason))


def identity(m: Measurement) -> Key:
    """What makes two rows the same measurement."""
    return (
        *(m.problem.key, m.schedule.key, m.template_hash, m.chip, m.cores, m.device),
        *(m.provenance, m.policy, m.phase),
    )


def join(a: Measurement, b: Measurement) -> Measurement:
    """Both of two rows of the same measurement."""
    if a == b:
        return a
    grave = max(a, b, key=lambda m: (GRAVITY.index(m.status), m.detail))
    late = max(a, b, key=lambda m: (m.created, m.os, m.mlx_version, m.metalgen_version))
    samples = tuple(sorted((Counter(a.samples) | Counter(b.samples)).elements()))
    seconds: float | None
    spread: float | None
    if samples:
        seconds, spread = statistics.median(samples), _spread(samples)
    else:
        seconds, spread = _most(a.seconds, b.seconds), _most(a.spread, b.spread)
    return dataclasses.replace(
        grave,
        seconds=seconds,
        spread=spread,
        samples=samples,
        default_seconds=_least(a.default_seconds, b.default_seconds),
        mlx_seconds=_least(a.mlx_seconds, b.mlx_seconds),
        error=_most(a.error, b.error),
        verified=grave.status == "ok" and (a.verified or b.verified),
        os=late.os,
        mlx_version=late.mlx_version,
        metalgen_version=late.metalgen_version,
        created=late.created,
    )


def _spread(samples: tuple[float, ...]) -> float:
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


def _most(a: float | None, b: float | None) -> float | None:
    return max((x for x in (a, b) if x is not None), default=None)


def _least(a: float | None, b: float | None) -> float | None:
    return min((x for x in (a, b) if x is not None), default=None)


def canonical(m: Measurement) -> Measurement:
    """The row as it is exchanged: without its run, its samples in ascending order."""
    samples = tuple(sorted(float(x) for x in m.samples))
    if samples == m.samples and not m.run:
        return m
    return dataclasses.replace(m, samples=samples, run="")


# Reading

_FAULTS = (MetalgenError, ValueError, TypeError, KeyError, OverflowError, RecursionError)
"""What a bad row or line may raise while it is read."""


def read(path: Path, summary: Summary) -> Iterator[Measurement]:
    """The rows of a database or record file from elsewhere; what is wrong goes to `summary`."""
    try:
        if is_database(path):
            yield from _rows(path, summary)
        else:
            yield from _records(path, summary)
    except DatabaseError as error:
        summary.reject(path, "file", error.reason, whole=True)


def _records(path: Path, summary: Summary) -> Iterator[Measurement]:
    for number, text, reason in read_lines(path):
        try:
            if text is None:
                raise ValueError(reason)
            m = Measurement.from_record(parse_object(text))
            check(m)
        except _FAULTS as error:
            summary.reject(path, f"line {number}", _short(error))
            continue
        yield canonical(m)


COLUMNS = tuple(f.name for f in dataclasses.fields(Measurement) if f.name != "run")


def _rows(path: Path, summary: Summary) -> Iterator[Measurement]:
    names = ", ".join(f"m.{n}" for n in COLUMNS if n not in ("problem", "schedule"))
    with open_untrusted(path) as connection:
        problems = dict(connection.execute("SELECT id, key FROM problems"))
        schedules = dict(connection.execute("SELECT id, key FROM schedules"))
        cursor = connection.execute(f"SELECT m.problem, m.schedule, {names} FROM measurements m")
        for number, row in enumerate(cursor, 1):
            try:
                m = _from_row(problems.get(row[0]), schedules.get(row[1]), row[2:])
                check(m)
            except _FAULTS as error:
                summary.reject(path, f"row {number}", _short(error))
                continue
            yield canonical(m)


_NAMES = tuple(n for n in COLUMNS if n not in ("problem", "schedule"))


def _from_row(problem: object, schedule: object, row: tuple[Any, ...]) -> Measurement:
    if not isinstance(problem, str) or not isinstance(schedule, str):
        raise ValueError("its problem or schedule is missing")
    fields = dict(zip(_NAMES, row, strict=True))
    if not isinstance(fields["samples"], str):
        raise ValueError("its samples are not text")
    fields["samples"] = json.loads(fields["samples"]) if fields["samples"] != "[]" else []
    fields["verified"] = {0: False, 1: True}[fields["verified"]]
    return Measurement.from_fields(_problem(problem), _schedule(schedule), fields)


@functools.lru_cache(maxsize=1 << 14)
def _problem(key: str) -> Problem:
    problem = problem_of(key)
    if problem is None or problem.key != key:
        raise ArgumentError("problem", "the canonical key of a problem", key[:80])
    return problem


@functools.lru_cache(maxsize=1 << 16)
def _schedule(key: str) -> Schedule:
    schedule = Schedule.from_dict(parse_object(key))
    if schedule.key != key:
        raise ArgumentError("schedule", "the canonical key of a schedule", key[:80])
    return schedule


def check(m: Measurement) -> None:
    """Whether a row may enter a database: what `Measurement` cannot know by itself.

    Raises:
        ArgumentError, InvalidSchedule: what is wrong.
    """
    if m.verified and m.status != "ok":
        raise ArgumentError("verified", "false for a row that is not ok", m.status)
    if m.status == "ok":
        rule = _breaks(m.problem.config, m.problem.family, m.schedule, m.chip)
        if rule:
            raise InvalidSchedule("schedule", rule)


@functools.lru_cache(maxsize=1 << 16)
def _breaks(config: AttentionConfig, family: str, schedule: Schedule, chip: str) -> str:
    from metalgen.chips import get_chip

    try:
        check_schedule(config, schedule, get_chip(chip).limits, family)
    except MetalgenError as error:
        return str(error)
    return ""


def _short(error: Exception) -> str:
    text = "".join(c if c.isprintable() else "?" for c in str(error))
    return text[:200] or type(error).__name__


# Writing


def export(store: Store, **filters: Any) -> Iterator[str]:
    """Canonical lines of a store's rows, sorted; `filters` as those of `Store.measurements`."""
    rows = store.measurements(**filters)
    return iter(sorted(canonical(m).to_line() for m in rows))


class _Undo(Exception):
    """Ends a dry run."""


def merge(store: Store, sources: Iterable[Path], *, dry_run: bool = False) -> Summary:
    """Merge databases and record files into a store; each source is one transaction.

    A source that is refused leaves nothing behind; the others are merged. With `dry_run` nothing
    is kept, and the summary is that of the merge.
    """
    total = Summary()
    if dry_run:
        try:
            with store.writing():
                for path in sources:
                    _merge_one(store, path, total)
                raise _Undo
        except _Undo:
            return total
    for path in sources:
        with store.writing():
            _merge_one(store, path, total)
    return total


def _merge_one(store: Store, path: Path, total: Summary) -> None:
    part = Summary()
    incoming: dict[Key, Measurement] = {}
    for m in read(path, part):
        key = identity(m)
        known = incoming.get(key)
        incoming[key] = m if known is None else join(known, m)
    total.refused += part.refused
    total.rejected += part.rejected
    total.reasons += part.reasons
    if part.refused:
        return
    failed = {
        tuple(row[:4]): row[4]
        for row in store.db.execute(
            "SELECT config, family, schedule, template_hash, status FROM checks "
            "WHERE status <> 'ok'"
        )
    }
    cursor = store.db.conn.cursor()
    cursor.execute(
        "INSERT OR IGNORE INTO runs (id, started, chip, seed) VALUES ('merged', '', '', 0)"
    )
    columns = ", ".join(f"m.{n}" for n in _NAMES)
    where = " AND ".join(f"m.{n} = ?" for n in IDENTITY)
    find = f"SELECT {columns} FROM measurements m WHERE {where}"
    ids: dict[tuple[str, str], int] = {}

    def row_id(table: str, row: dict[str, Any]) -> int:
        place = (table, row["key"])
        if place not in ids:
            ids[place] = store.id_of(table, row)
        return ids[place]

    for m in incoming.values():
        status = failed.get(
            (m.problem.config.key, m.problem.family, m.schedule.key, m.template_hash)
        )
        if status and m.status == "ok":
            m = dataclasses.replace(m, status=status, verified=False)
        problem = row_id("problems", row_of(m.problem))
        schedule = row_id("schedules", {"key": m.schedule.key})
        where_values = (problem, schedule, *identity(m)[2:])
        found = cursor.execute(find, where_values).fetchone()
        if found is None:
            _write(cursor, "INSERT", m, where_values)
            total.new += 1
            continue
        try:
            here = canonical(_from_row(m.problem.key, m.schedule.key, found))
        except _FAULTS:
            here = m  # an unreadable row of our own is repaired
        joined = join(here, m)
        total.conflicts += (here.status == "ok") != (m.status == "ok")
        if joined == here:
            total.same += 1
        else:
            _write(cursor, "REPLACE", joined, where_values)
            total.pooled += 1


def _write(cursor: sqlite3.Cursor, how: str, m: Measurement, places: Key) -> None:
    values = {name: getattr(m, name) for name in _NAMES}
    values["samples"] = json.dumps(list(m.samples))
    values["verified"] = int(m.verified)
    values |= {"problem": places[0], "schedule": places[1], "run": "merged"}
    marks = ", ".join("?" * len(values))
    cursor.execute(
        f"{how} INTO measurements ({', '.join(values)}) VALUES ({marks})", list(values.values())
    )


@dataclass(frozen=True)
class Difference:
    """Rows of two sources: only in one, in both and equal, in both and different."""

    only_first: list[Measurement]
    only_second: list[Measurement]
    changed: list[tuple[Measurement, Measurement]]
    same: int


def diff(first: Path, second: Path, summary: Summary) -> Difference:
    """Compare two databases or record files."""
    a = {identity(m): m for m in read(first, summary)}
    b = {identity(m): m for m in read(second, summary)}
    both = sorted(a.keys() & b.keys())
    changed = [(a[key], b[key]) for key in both if a[key] != b[key]]
    return Difference(
        [a[key] for key in sorted(a.keys() - b.keys())],
        [b[key] for key in sorted(b.keys() - a.keys())],
        changed,
        len(both) - len(changed),
    )
