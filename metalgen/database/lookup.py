"""Finding the schedule of a problem: the run-time path, with the standard library alone.

Places, best first; a measured row anywhere outranks every modelled one:

1. a pin of the user's
2. this chip: the user's database, then the shipped records
3. the same chip with another core count, nearest first
4. other chips of the same generation
5. a neighbouring bucket of sizes, nearest first, on the chips of 2 to 4

What comes after (the generation's default, the template's default) needs no database. Only rows
that were checked against the reference, and that the current templates made, may answer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalgen.config import AttentionConfig
from metalgen.database.connect import open_for_reading
from metalgen.database.errors import DatabaseError, MissingDatabase, explained
from metalgen.database.layout import CHAINED, MAX_TEXT, PROVENANCES, STATUSES, WARM, user_database
from metalgen.database.measurement import Measurement, host
from metalgen.database.records import shipped_buckets
from metalgen.errors import MetalgenError
from metalgen.plurals import counted
from metalgen.problem import Problem
from metalgen.schedule import APPLE, Limits, Schedule, check_schedule

if TYPE_CHECKING:
    from metalgen.chips import Chip

NEAREST_BUCKETS = 8
"""Neighbouring buckets that are tried."""
ROWS_TRIED = 16
"""Rows that are read before a place counts as a miss because its rows are bad."""
_MISSING = ": no verified "
"""Between a place and what it lacks."""


@dataclass(frozen=True)
class Hit:
    """A schedule that was found, and how good an answer it is.

    Args:
        schedule: valid for the config on this chip.
        provenance: ``"measured"``, ``"modelled"``, or ``"pinned"``.
        place: where it was found, such as ``"user database, this chip"``; an inexact one says so.
        chip: the chip that the row is about.
        exact: this very chip and bucket, not stale, and by the standard policy's cold cache.
        stale: measured with another MLX, or another major version of the operating system.
        seconds, default_seconds, mlx_seconds: the row's time, and in the same run the default
            schedule's and MLX's own attention's.
        verified: the kernel passed its check against the float64 reference.
        error: relative error in that check.
        path: what was tried before, and why each better place missed.
    """

    schedule: Schedule
    provenance: str
    place: str
    chip: str
    exact: bool
    stale: bool = False
    seconds: float | None = None
    default_seconds: float | None = None
    mlx_seconds: float | None = None
    verified: bool = False
    error: float | None = None
    path: list[str] = field(default_factory=list, compare=False)

    @property
    def beats_mlx(self) -> bool:
        """Measured on this very chip, under this MLX, as faster than MLX's own attention."""
        return (
            self.exact
            and self.provenance == "measured"
            and self.seconds is not None
            and self.mlx_seconds is not None
            and self.seconds < self.mlx_seconds
        )


def brief(path: Sequence[str]) -> list[str]:
    """The steps of a path; places one after the other that lack the same are one step."""
    steps: list[str] = []
    for missing, group in itertools.groupby(path, lambda step: step.partition(_MISSING)[2]):
        if missing:
            places = ", ".join(step.partition(_MISSING)[0] for step in group)
            steps.append(f"no verified {missing}: {places}")
        else:
            steps += group
    return steps


def lookup(
    problem: Problem,
    chip: Chip | None,
    template_hash: str,
    *,
    database: Path | None = None,
    shipped: Path | None = None,
    limits: Limits | None = None,
    neighbours: Sequence[str] | None = None,
    trace: list[str] | None = None,
) -> Hit | None:
    """The best schedule on record for a problem, or None.

    Never raises for what a database or a record file holds: that is a miss, and said in the path.

    Args:
        problem: config and sizes.
        chip: the chip to run on; None (unknown) finds pins only.
        template_hash: hash of the current templates; rows of others do not count.
        database: the user's database; None means `user_database`.
        shipped: folder of the shipped records; None means the installed ones.
        limits: what a threadgroup may use; None means the chip's.
        neighbours: names of chips to borrow from, best first; None asks `metalgen.chips`.
        trace: a list that the path is appended to, also when nothing is found.
    """
    path: list[str] = [] if trace is None else trace
    if limits is None:
        limits = chip.limits if chip else APPLE
    with _reader(database, path) as connection:
        search = _Search(problem, template_hash, limits, connection, shipped, path)
        hit = search.pinned()
        if hit:
            return hit
        if chip is None:
            path.append("no chip is known here: no record can be about it")
            return None
        if neighbours is None:
            from metalgen import chips

            neighbours = chips.neighbours(chip)
        return search.ranked(chip.name, neighbours)


def checked(
    config: AttentionConfig,
    schedule: Schedule,
    template_hash: str,
    *,
    database: Path | None = None,
    device: str | None = None,
    family: str = "forward",
) -> str | None:
    """How the check of a kernel ended (a failed one before a passed one), or None if none is known.

    An unreadable database knows none.
    """
    row = _first(
        database,
        "SELECT status FROM checks WHERE config = ? AND family = ? AND schedule = ? AND "
        "template_hash = ? AND device = coalesce(?, device) ORDER BY status = 'ok'",
        [config.key, family, schedule.key, template_hash, device],
    )
    return row[0] if row and row[0] in STATUSES else None


def last_chip(database: Path | None = None) -> str | None:
    """Name of the chip that was tuned last into a database; None where that cannot be known."""
    row = _first(database, "SELECT chip FROM runs ORDER BY started DESC, rowid DESC LIMIT 1", [])
    return row[0] if row and isinstance(row[0], str) else None


def _first(database: Path | None, sql: str, values: list[Any]) -> tuple[Any, ...] | None:
    """The first row of a query; None if there is none, or no database that can be read."""
    with _reader(database, []) as connection:
        if connection is None:
            return None
        try:
            with explained(""):
                row: tuple[Any, ...] | None = connection.execute(sql, values).fetchone()
        except DatabaseError:
            return None
        return row


@contextlib.contextmanager
def _reader(database: Path | None, path: list[str]) -> Iterator[sqlite3.Connection | None]:
    try:
        connection = open_for_reading(database or user_database())
    except MissingDatabase:
        path.append("user database: none yet")
        yield None
        return
    except DatabaseError as error:
        path.append(f"user database not used: {error}")
        yield None
        return
    try:
        yield connection
    finally:
        connection.close()


class _Search:
    """One look-up: the open database, the shipped records, and the path so far."""

    def __init__(
        self,
        problem: Problem,
        template_hash: str,
        limits: Limits,
        connection: sqlite3.Connection | None,
        shipped: Path | None,
        path: list[str],
    ) -> None:
        self.problem = problem
        self.template_hash = template_hash
        self.limits = limits
        self.connection = connection
        self.shipped = shipped
        self.path = path
        self.ids, self.sizes = self._problems()
        self.records: dict[str, dict[str, list[Measurement]]] = {}

    def pinned(self) -> Hit | None:
        """The user's pin of this problem."""
        if self.problem.key not in self.ids:
            return None
        rows = self._rows(
            "SELECT s.key FROM pins JOIN schedules s ON s.id = pins.schedule "
            "WHERE pins.problem = ?",
            [self.ids[self.problem.key]],
        )
        for (key,) in rows:
            schedule = self._valid(key, "pin")
            if schedule:
                return Hit(schedule, "pinned", "pin", "", exact=True, path=self.path)
        return None

    def ranked(self, chip: str, neighbours: Sequence[str]) -> Hit | None:
        """The first hit in the order of places; where it is not the first place, also why."""
        hit = self._ranked(chip, neighbours)
        if hit is None or hit.provenance != "measured" or "this chip" not in hit.place:
            self._say_why(chip, missed=hit is None)
        return hit

    def _ranked(self, chip: str, neighbours: Sequence[str]) -> Hit | None:
        base = chip.partition("-")[0].lower()
        same = [n for n in neighbours if n != chip and n.partition("-")[0].lower() == base]
        others = [n for n in neighbours if n != chip and n not in same]
        groups = [
            ("this chip", [chip]),
            ("same chip with another core count", same),
            ("same generation", others),
        ]
        near: list[Problem] | None = None
        for provenance in PROVENANCES:
            for label, names in groups:
                for name in names:
                    exact = name == chip
                    place = label if exact else f"{label} ({name})"
                    hit = self._at(self.problem, name, provenance, place, exact)
                    if hit:
                        return hit
                if names:
                    self.path.append(f"{label}{_MISSING}{provenance} row")
            if near is None:
                near = self._near_buckets([chip, *same, *others])
            for name in [chip, *same, *others]:
                known = self._known(near, name, provenance)
                for bucket in near:
                    if bucket.key not in known:
                        continue
                    sizes = f"BH={bucket.batch_heads} Lq={bucket.q_len} Lk={bucket.kv_len}"
                    place = f"neighbouring bucket ({name}, {sizes})"
                    hit = self._at(bucket, name, provenance, place, False)
                    if hit:
                        return hit
            self.path.append(f"neighbouring buckets{_MISSING}{provenance} row")
        return None

    def _at(
        self, problem: Problem, chip: str, provenance: str, place: str, exact: bool
    ) -> Hit | None:
        hit = self._user_row(problem, chip, provenance, place, exact)
        return hit or self._shipped_row(problem, chip, provenance, place, exact)

    def _user_row(
        self, problem: Problem, chip: str, provenance: str, place: str, exact: bool
    ) -> Hit | None:
        if problem.key not in self.ids:
            return None
        rows = self._rows(
            "SELECT s.key, m.seconds, m.default_seconds, m.mlx_seconds, m.error, m.mlx_version, "
            "m.os, instr(m.policy, ?) > 0 AS warm "
            "FROM measurements m JOIN schedules s ON s.id = m.schedule "
            "WHERE m.problem = ? AND m.template_hash = ? AND m.provenance = ? AND m.chip = ? "
            f"AND m.verified = 1 ORDER BY {_STALE}, warm, instr(m.policy, ?) = 0, m.phase, "
            "m.detail <> '', m.seconds, s.key LIMIT ?",
            [
                *(WARM, self.ids[problem.key], self.template_hash, provenance, chip),
                *(*_software(), CHAINED, ROWS_TRIED),
            ],
        )
        for key, seconds, default, mlx, error, version, system, warm in rows:
            schedule = self._valid(key, f"user database, {place}")
            if schedule is None:
                continue
            if not _is_time(seconds):
                self.path.append(f"user database, {place}: a row with a bad time was passed over")
                continue
            stale = provenance == "measured" and _is_stale(version, system)
            return Hit(
                schedule,
                provenance,
                f"user database, {place}" + _labels(stale, bool(warm)),
                chip,
                exact and not stale and not warm,
                stale,
                seconds,
                default if _is_time(default) else None,
                mlx if _is_time(mlx) else None,
                True,
                error if _is_time(error) else None,
                self.path,
            )
        return None

    def _shipped_row(
        self, problem: Problem, chip: str, provenance: str, place: str, exact: bool
    ) -> Hit | None:
        found = self._shipped(chip).get(problem.key, ())
        rows = [
            (provenance == "measured" and _is_stale(m.mlx_version, m.os), m)
            for m in found
            if m.provenance == provenance
        ]
        for stale, m in sorted(rows, key=lambda each: each[0]):  # as ranked otherwise
            schedule = self._valid(m.schedule.key, f"shipped records, {place}")
            if schedule:
                return Hit(
                    schedule,
                    provenance,
                    f"shipped records, {place}" + _labels(stale, m.warm),
                    chip,
                    exact and not stale and not m.warm,
                    stale,
                    m.seconds,
                    m.default_seconds,
                    m.mlx_seconds,
                    True,
                    m.error,
                    self.path,
                )
        return None

    def _shipped(self, chip: str) -> dict[str, list[Measurement]]:
        if chip not in self.records:
            self.records[chip] = shipped_buckets(
                self.problem, chip, self.template_hash, self.shipped
            )
        return self.records[chip]

    def _near_buckets(self, chips: Sequence[str]) -> list[Problem]:
        """Other buckets of the same config that anything is known about, nearest first."""
        found = set(self.sizes)
        for chip in chips:
            for records in self._shipped(chip).values():
                p = records[0].problem
                found.add((p.batch_heads, p.q_len, p.kv_len))
        here = (self.problem.batch_heads, self.problem.q_len, self.problem.kv_len)
        found.discard(here)
        near = sorted(found, key=lambda sizes: (_distance(sizes, here), sizes))[:NEAREST_BUCKETS]
        return [Problem(self.problem.config, *sizes, family=self.problem.family) for sizes in near]

    def _known(self, problems: list[Problem], chip: str, provenance: str) -> set[str]:
        """Keys of the problems that have a row which might answer: one query instead of many."""
        ids = [self.ids[p.key] for p in problems if p.key in self.ids]
        rows = self._rows(
            f"SELECT key FROM problems p WHERE id IN ({', '.join('?' * len(ids))}) AND EXISTS "
            "(SELECT 1 FROM measurements m WHERE m.problem = p.id AND m.template_hash = ? "
            "AND m.provenance = ? AND m.chip = ? AND m.verified = 1)",
            [*ids, self.template_hash, provenance, chip],
        )
        return {key for (key,) in rows} | set(self._shipped(chip))

    def _problems(self) -> tuple[dict[str, int], list[tuple[int, int, int]]]:
        """Every known problem of this config: row ids by key, and their sizes."""
        rows = self._rows(
            "SELECT key, id, batch_heads, q_len, kv_len FROM problems "
            "WHERE config = ? AND family = ? LIMIT 1000",
            [self.problem.config.key, self.problem.family],
        )
        ids, sizes = {}, []
        for key, row, heads, queries, keys in rows:
            if isinstance(key, str) and isinstance(row, int):
                ids[key] = row
            if all(isinstance(n, int) and 0 < n <= 1 << 20 for n in (heads, queries, keys)):
                sizes.append((heads, queries, keys))
        return ids, sizes

    def _say_why(self, chip: str, missed: bool) -> None:
        """Whether rows are there that may not answer."""
        if self.problem.key not in self.ids:
            return
        place = [self.ids[self.problem.key], chip, self.template_hash]
        begin = "user database, this chip: "
        rows = "FROM measurements WHERE problem = ? AND chip = ? AND template_hash"
        for (count,) in self._rows(f"SELECT count(*) {rows} <> ?", place):
            if count:
                self.path.append(
                    f"{begin}{counted(count, 'row')} of other templates that may not win; "
                    "`metalgen db refresh` keeps those whose kernel is still the same"
                )
        if missed:
            for status, count in self._rows(
                f"SELECT status, count(*) {rows} = ? GROUP BY 1", place
            ):
                reason = f"{status}, not verified"
                self.path.append(f"{begin}{counted(count, 'row')} that may not win ({reason})")

    def _valid(self, key: object, place: str) -> Schedule | None:
        """The schedule of a row, typed and valid here; or None, and why."""
        try:
            if not isinstance(key, str) or len(key) > MAX_TEXT:
                raise ValueError("its schedule is not a text")
            schedule = Schedule.from_dict(json.loads(key))
            check_schedule(self.problem.config, schedule, self.limits, self.problem.family)
        except (MetalgenError, ValueError, RecursionError) as error:
            self.path.append(f"{place}: a row was passed over ({error})")
            return None
        return schedule

    def _rows(self, sql: str, values: list[Any]) -> list[tuple[Any, ...]]:
        if self.connection is None:
            return []
        try:
            with explained(""):
                return self.connection.execute(sql, values).fetchall()
        except DatabaseError as error:
            self.path.append(f"user database not used: {error.reason}")
            self.connection = None
            return []


def _distance(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    return sum(abs(math.log2(x / y)) for x, y in zip(a, b, strict=True))


def _labels(stale: bool, warm: bool) -> str:
    """What keeps a row from being an exact answer, for its place."""
    return ", stale" * stale + ", measured with a warm cache" * warm


def _is_time(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


_STALE = (
    "m.provenance = 'measured' AND "
    "(m.mlx_version <> ? OR substr(m.os, 1, instr(m.os || '.', '.') - 1) <> ?)"
)
"""Whether a row was measured by other software than `_software`."""


def _software() -> tuple[str, str]:
    """This MLX, and the major version of this operating system."""
    here = host()
    return here["mlx_version"], here["os"].partition(".")[0]


def _is_stale(mlx_version: object, system: object) -> bool:
    return (mlx_version, str(system).partition(".")[0]) != _software()
