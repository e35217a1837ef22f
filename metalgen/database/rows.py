"""Rows as they travel between databases: validated plain values, and how several are joined.

Two rows are the same measurement when all of `IDENTITY` agrees. A million of them must be read and
joined in a minute, so they are tuples, and a value is proved good once: a row goes the long way,
through `Measurement` and `check`, unless each of its parts was part of a row that came that way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from metalgen.database.columns import problem_of
from metalgen.database.errors import DatabaseError, printable
from metalgen.database.layout import STATUSES
from metalgen.database.measurement import Measurement
from metalgen.database.schedules import chip_limits, schedule_on
from metalgen.database.summary import Summary
from metalgen.database.untrusted import (
    is_database,
    open_untrusted,
    parse_object,
    read_lines,
    schema_version,
)
from metalgen.errors import ArgumentError, InvalidSchedule, MetalgenError
from metalgen.families import Limits, Schedule, check_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

IDENTITY = (
    *("problem", "schedule", "template_hash", "chip", "cores", "device"),
    *("provenance", "policy", "phase"),
)
GRAVITY = ("pruned", "ok", "timeout", "runtime", "compile", "invalid", "wrong")
assert sorted(GRAVITY) == sorted(STATUSES)
Key = tuple[Any, ...]
FAULTS = (MetalgenError, ValueError, TypeError, KeyError, OverflowError, RecursionError)
"""What a bad row or line may raise while it is read."""
USUAL_SAMPLES = 10_000
"""A row with more goes the long way, where their number is checked."""
REMEMBERED = 1 << 17
"""Good values of a kind that are remembered before all are forgotten."""


class Row(NamedTuple):
    """A measurement that passed every check: its identity, and the columns that are joined.

    ``key`` holds the values of `IDENTITY`, a problem and a schedule by their keys; ``samples``
    ascend.
    """

    key: Key
    status: str
    detail: str
    verified: bool
    os: str
    mlx_version: str
    metalgen_version: str
    created: str
    source_hash: str
    seconds: float | None
    spread: float | None
    default_seconds: float | None
    mlx_seconds: float | None
    error: float | None
    samples: tuple[float, ...]


COLUMNS = (*IDENTITY, *Row._fields[1:])
"""The columns of `measurements` in the order of a row's values: all but ``id`` and ``run``."""
_NUMBERS = slice(COLUMNS.index("seconds"), COLUMNS.index("samples"))
_HEAD = slice(2, COLUMNS.index("created"))  # texts of which few combinations occur
_CORES, _VERIFIED = COLUMNS.index("cores"), COLUMNS.index("verified")
_CREATED, _SOURCE = COLUMNS.index("created"), COLUMNS.index("source_hash")
_IS_SOURCE = re.compile("([0-9a-f]{16})?").fullmatch
_PROBLEM = ("batch_heads", "config", "family", "kv_len", "q_len")
_DEFAULTS = {
    **dict.fromkeys(COLUMNS),
    **{f.name: f.default for f in dataclasses.fields(Measurement) if f.name in COLUMNS},
}
"""What a record says by leaving a column out; what it must have has no default, and no match."""
_RECORD = frozenset({*COLUMNS, *_PROBLEM}) - {"problem"}


def row_of_measurement(m: Measurement) -> Row:
    """The row of a measurement, without its run."""
    texts = (
        *(m.status, m.detail, m.verified, m.os, m.mlx_version, m.metalgen_version, m.created),
        m.source_hash,
    )
    numbers = [None if (x := getattr(m, n)) is None else float(x) for n in COLUMNS[_NUMBERS]]
    key = (
        *(m.problem.key, m.schedule.key, m.template_hash, m.chip, m.cores, m.device),
        *(m.provenance, m.policy, m.phase),
    )
    return Row._make((key, *texts, *numbers, tuple(sorted(float(x) for x in m.samples))))


def measurement_of_row(row: Row) -> Measurement:
    """The measurement of a row."""
    fields = dict(zip(COLUMNS[2:], (*row.key[2:], *row[1:]), strict=True))
    return Measurement(
        _problem(row.key[0]),
        _schedule(row.key[1], _problem(row.key[0]).family, fields["chip"]),
        **fields,
    )


# Joining


def join_rows(rows: Sequence[Row]) -> Row:
    """All of several rows of the same measurement, at least one.

    Samples are pooled (each as often as in the row that has it most often) and the median is
    taken anew; of the times of MLX and of the default schedule the best counts; the gravest status
    wins; texts and dates are those of the latest; of source hashes, which are equal unless one is
    missing or a template hash was fooled, the greatest is kept. Commutative, associative and
    idempotent.
    """
    if len(rows) > 1:
        rows = list(dict.fromkeys(rows))
    if len(rows) == 1:
        return rows[0]
    grave = max(rows, key=lambda r: (_RANK[r.status], r.detail))
    late = max(rows, key=lambda r: (r.created, r.os, r.mlx_version, r.metalgen_version))
    samples = _pool([r.samples for r in rows])
    return Row(
        grave.key,
        grave.status,
        grave.detail,
        grave.status == "ok" and any(r.verified for r in rows),
        late.os,
        late.mlx_version,
        late.metalgen_version,
        late.created,
        max(r.source_hash for r in rows),
        statistics.median(samples) if samples else _most([r.seconds for r in rows]),
        _spread(samples) if samples else _most([r.spread for r in rows]),
        _least([r.default_seconds for r in rows]),
        _least([r.mlx_seconds for r in rows]),
        _most([r.error for r in rows]),
        samples,
    )


_RANK = {status: rank for rank, status in enumerate(GRAVITY)}


def _pool(sides: list[tuple[float, ...]]) -> tuple[float, ...]:
    if all(len(set(side)) == len(side) for side in sides):
        return tuple(sorted(set().union(*sides)))
    counts: Counter[float] = Counter()
    for side in sides:
        counts |= Counter(side)
    return tuple(sorted(counts.elements()))


def _spread(samples: tuple[float, ...]) -> float:
    if len(samples) < 2:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return high - low


def _most(values: list[float | None]) -> float | None:
    return max((x for x in values if x is not None), default=None)


def _least(values: list[float | None]) -> float | None:
    return min((x for x in values if x is not None), default=None)


# Reading


class Reader:
    """Reads files from elsewhere, and remembers which values were found to be good."""

    def __init__(self) -> None:
        self._heads: dict[tuple[Any, ...], tuple[Key, tuple[Any, ...]]] = {}
        self._dates: set[str] = set()
        self._legal: set[tuple[str, str, str]] = set()
        self._problems: dict[str, tuple[str, str]] = {}  # by key: key; family and config
        self._schedules: dict[str, str] = {}  # by key: the same text

    def read(self, path: Path, summary: Summary) -> Iterator[Row]:
        """The rows of a database or record file; what is wrong goes to `summary`."""
        try:
            if is_database(path):
                yield from self._database(path, summary)
            else:
                yield from self._records(path, summary)
        except DatabaseError as error:
            summary.reject(path, "file", error.reason, whole=True)

    def _records(self, path: Path, summary: Summary) -> Iterator[Row]:
        for number, text, reason in read_lines(path):
            try:
                if text is None:
                    raise ValueError(reason)
                row = self._record(parse_object(text))
            except FAULTS as error:
                summary.reject(path, f"line {number}", short(error))
                continue
            yield row

    def _database(self, path: Path, summary: Summary) -> Iterator[Row]:
        with open_untrusted(path) as connection:
            tables = Tables(
                dict(connection.execute("SELECT id, key FROM problems")),
                dict(connection.execute("SELECT id, key FROM schedules")),
            )
            columns = ", ".join(COLUMNS)
            if schema_version(path) == 1:
                columns = columns.replace("source_hash", "''")
            cursor = connection.execute(f"SELECT {columns} FROM measurements")
            for number, values in enumerate(cursor, 1):
                try:
                    row = self.row(values, tables)
                except FAULTS as error:
                    summary.reject(path, f"row {number}", short(error))
                    continue
                yield row

    def row(self, values: tuple[Any, ...], tables: Tables) -> Row:
        """The row of the values of `COLUMNS`; raises one of `FAULTS` where something is wrong."""
        problem = tables.good_problems.get(values[0]) or self._problem(values[0], tables)
        schedule = tables.good_schedules.get(values[1]) or self._schedule(values[1], tables)
        if problem is not None and schedule is not None and type(values[_VERIFIED]) is int:
            row = self._short_way(problem, schedule, values, _scanned(values[-1]))
            if row is not None:
                return row
        return self._row(values, tables)

    def _short_way(
        self, problem: tuple[str, str], schedule: str, values: tuple[Any, ...], samples: Any
    ) -> Row | None:
        """The row of values that were found good before, and of good numbers; None otherwise."""
        head = self._heads.get(values[_HEAD])
        numbers = values[_NUMBERS]
        if (
            head is None
            or values[_CREATED] not in self._dates
            or type(values[_SOURCE]) is not str
            or not _IS_SOURCE(values[_SOURCE])
            # 1 == 1.0 == True, so what is remembered says nothing about a number's type.
            or type(values[_CORES]) is not int
        ):
            return None
        for x in numbers:
            if x is not None and not (type(x) is float and 0.0 <= x < math.inf):
                return None
        identity, rest = head
        if rest[0] == "ok":
            place = (problem[1], schedule, identity[1])
            if not numbers[0] or (place not in self._legal and not self._may_be(place)):
                return None
        if type(samples) is not list:
            return None
        if samples:
            if len(samples) > USUAL_SAMPLES or set(map(type, samples)) != {float}:
                return None
            samples.sort()
            if samples[0] < 0.0 or not math.isfinite(sum(samples)):
                return None
        key = (problem[0], schedule, *identity)
        texts = values[_CREATED], values[_SOURCE]
        return Row._make((key, *rest, *texts, *numbers, tuple(samples)))

    def _record(self, record: dict[str, Any]) -> Row:
        """The row of a record; raises one of `FAULTS` where something is wrong."""
        problem = self._problems.get(_canonical({name: record.get(name) for name in _PROBLEM}))
        schedule = self._schedules.get(_canonical(record.get("schedule")))
        if (
            problem is not None
            and schedule is not None
            and record.keys() <= _RECORD
            and type(record.get("verified", False)) is bool
        ):
            values = tuple(record.get(name, default) for name, default in _DEFAULTS.items())
            with contextlib.suppress(TypeError):  # values that cannot be looked up
                row = self._short_way(problem, schedule, values, record.get("samples", []))
                if row is not None:
                    return row
        m = Measurement.from_record(record)
        check(m)
        return self._learned(m)

    def _problem(self, number: Any, tables: Tables) -> tuple[str, str] | None:
        key = tables.problems.get(number)
        known = self._problems.get(key) if type(key) is str else None
        if known is not None:
            tables.good_problems[number] = known
        return known

    def _schedule(self, number: Any, tables: Tables) -> str | None:
        key = tables.schedules.get(number)
        known = self._schedules.get(key) if type(key) is str else None
        if known is not None:
            tables.good_schedules[number] = known
        return known

    def _may_be(self, place: tuple[str, str, str]) -> bool:
        config, schedule, chip = place
        family, _, key = config.partition(" ")
        legal = not _fault(_config(key), _schedule(schedule, family, chip), chip)
        if legal:
            self._remember(self._legal, place)
        return legal

    def _row(self, values: tuple[Any, ...], tables: Tables) -> Row:
        """The long way."""
        problem, schedule = tables.problems.get(values[0]), tables.schedules.get(values[1])
        if not isinstance(problem, str) or not isinstance(schedule, str):
            raise ValueError("its problem or schedule is missing")
        fields = dict(zip(COLUMNS[2:], values[2:], strict=True))
        if not isinstance(fields["samples"], str):
            raise ValueError("its samples are not text")
        fields["samples"] = json.loads(fields["samples"])
        fields["verified"] = {0: False, 1: True}[fields["verified"]]
        m = Measurement.from_fields(
            _problem(problem), _schedule(schedule, _problem(problem).family, fields["chip"]), fields
        )
        check(m)
        return self._learned(m)

    def _learned(self, m: Measurement) -> Row:
        """The row of a measurement that passed every check, whose parts are good from now on."""
        row = row_of_measurement(m)
        problem, schedule = row.key[:2]
        for known in (self._problems, self._schedules, self._heads):
            if len(known) > REMEMBERED:
                known.clear()
        config = f"{m.problem.family} {m.problem.config.key}"
        self._problems.setdefault(problem, (problem, config))
        self._schedules.setdefault(schedule, schedule)
        rest = tuple(row[1 : Row._fields.index("created")])
        self._heads[row.key[2:] + rest] = row.key[2:], rest
        self._remember(self._dates, row.created)
        return row

    def _remember(self, known: set[Any], value: object) -> None:
        if len(known) > REMEMBERED:
            known.clear()
        known.add(value)


class Tables:
    """The problems and schedules of one database by their ids: as found, and those found good."""

    def __init__(self, problems: dict[Any, Any], schedules: dict[Any, Any]) -> None:
        self.problems = problems
        self.schedules = schedules
        self.good_problems: dict[Any, tuple[str, str]] = {}  # key; family and config
        self.good_schedules: dict[Any, str] = {}


_decode = json.JSONDecoder().raw_decode
"""What `json.loads` does at last, without its preparations, which take as long."""


def _scanned(text: object) -> Any:
    """The value of a text that is JSON and nothing else; None otherwise."""
    if type(text) is not str:
        return None
    if text == "[]":
        return []
    try:
        value, end = _decode(text)
    except (ValueError, RecursionError):
        return None
    return value if end == len(text) else None


def _canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


@functools.lru_cache(maxsize=1 << 14)
def _problem(key: str) -> Problem:
    problem = problem_of(key)
    if problem is None or problem.key != key:
        raise ArgumentError("problem", "the canonical key of a problem", key[:80])
    return problem


@functools.lru_cache(maxsize=1 << 16)
def _schedule(key: str, family: str, chip: Any) -> Schedule:
    schedule = schedule_on(chip, family, parse_object(key))
    if schedule.key != key:
        raise ArgumentError("schedule", "the canonical key of a schedule", key[:80])
    return schedule


@functools.lru_cache(maxsize=1 << 12)
def _config(key: str) -> AttentionConfig:
    return AttentionConfig.from_dict(json.loads(key))


def check(m: Measurement) -> None:
    """Whether a row may enter a database: what `Measurement` cannot know by itself.

    Raises:
        ArgumentError, InvalidSchedule: what is wrong.
    """
    if m.verified and m.status != "ok":
        raise ArgumentError("verified", "false for a row that is not ok", m.status)
    if m.status == "ok":
        fault = _fault(m.problem.config, m.schedule, m.chip)
        if fault:
            raise InvalidSchedule("schedule", fault)


def _fault(config: AttentionConfig, schedule: Schedule, chip: str) -> str:
    try:
        return _breaks(config, schedule, chip_limits(chip))
    except MetalgenError as error:
        return str(error)


@functools.lru_cache(maxsize=1 << 16)
def _breaks(config: AttentionConfig, schedule: Schedule, limits: Limits) -> str:
    """Which rule a schedule breaks; empty where none."""
    try:
        check_schedule(config, schedule, limits)
    except MetalgenError as error:
        return str(error)
    return ""


def short(error: Exception) -> str:
    """What an error says, in at most 200 printable characters."""
    return printable(error) or type(error).__name__
