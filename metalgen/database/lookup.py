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
import heapq
import json
import math
import sqlite3
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalgen.database.connect import open_for_reading
from metalgen.database.errors import DatabaseError, MissingDatabase, explained, printable
from metalgen.database.hit import MISSING, Hit
from metalgen.database.layout import MAX_TEXT, PROVENANCES, STATUSES, user_database
from metalgen.database.measurement import Measurement
from metalgen.database.records import shipped_buckets
from metalgen.database.winners import Rank, Standing, ranks
from metalgen.errors import MetalgenError
from metalgen.families import APPLE, Limits, Schedule, check_schedule, decode_schedule
from metalgen.families.sizes import MAX_BATCH_HEADS, MAX_LENGTH, Problem
from metalgen.plurals import counted
from metalgen.problem.config import AttentionConfig

if TYPE_CHECKING:
    from metalgen.chips import Chip

MOST_BUCKETS = 64
"""Neighbouring buckets that are tried."""
MOST_PROBLEMS = 1 << 14
"""Problems of one config that are read: more than there are combinations of sizes."""
MOST_ROWS = 1 << 16
"""Rows of one place that are read, the quickest first."""
ROWS_TRIED = 16
"""Rows that are tried before a place counts as a miss because its schedules cannot run."""


def lookup(
    problem: Problem,
    chip: Chip | None,
    templates: Set[str],
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
        templates: the present template hashes of the problem's family, one for each kind; rows of
            others do not count.
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
        search = _Search(problem, templates, limits, connection, shipped, path)
        hit = search.pinned()
        if hit:
            return hit
        if chip is None:
            path.append("chip unknown: no tuning records apply")
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
    """How the check of a kernel ended (a failed one before a passed one), or None without one.

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
        templates: Set[str],
        limits: Limits,
        connection: sqlite3.Connection | None,
        shipped: Path | None,
        path: list[str],
    ) -> None:
        self.problem = problem
        self.templates = templates
        self.of_templates = f"IN ({', '.join('?' * len(templates))})"
        self.limits = limits
        self.connection = connection
        self.shipped = shipped
        self.path = path
        self.ids: dict[str, int] = {}
        self._learn_ids("key = ?", [problem.key])
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
        near: dict[str, list[tuple[str, Problem]]] | None = None
        for provenance in PROVENANCES:
            for label, names in groups:
                for name in names:
                    exact = name == chip
                    place = label if exact else f"{label} ({name})"
                    hit = self._at(self.problem, name, provenance, place, exact)
                    if hit:
                        return hit
                if names:
                    self.path.append(f"{label}{MISSING}{provenance} row")
            if near is None:
                near = self._near([chip, *same, *others])
            for name, bucket in near[provenance]:
                sizes = f"BH={bucket.batch_heads} Lq={bucket.q_len} Lk={bucket.kv_len}"
                place = f"neighbouring bucket ({name}, {sizes})"
                hit = self._at(bucket, name, provenance, place, False)
                if hit:
                    return hit
            self.path.append(f"neighbouring buckets{MISSING}{provenance} row")
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
        here = [self.ids[problem.key], *sorted(self.templates), provenance, chip]
        rows = []
        for key, seconds, default, mlx, error, *texts in self._rows(
            "SELECT s.key, m.seconds, m.default_seconds, m.mlx_seconds, m.error, m.policy, "
            "m.phase, m.detail, m.mlx_version, m.os "
            "FROM measurements m JOIN schedules s ON s.id = m.schedule "
            f"WHERE m.problem = ? AND m.template_hash {self.of_templates} "
            "AND m.provenance = ? AND m.chip = ? "
            "AND m.verified = 1 ORDER BY m.seconds LIMIT ?",
            [*here, MOST_ROWS],
        ):
            if not _is_time(seconds):
                self.path.append(f"user database, {place}: a row with a bad time was passed over")
                continue
            policy, phase, detail, version, system = map(str, texts)
            default, mlx, error = (x if _is_time(x) else None for x in (default, mlx, error))
            standing = Standing(
                *(provenance, policy, phase, detail, seconds, default, str(key)),
                *(version, system),
            )
            rows.append((standing, mlx, error))
        least = None
        if provenance == "modelled" and len(rows) > 1:
            # Of all rows, checked or not: a check must not change which predictions are near.
            found = self._rows(
                "SELECT min(seconds) FROM measurements WHERE problem = ? AND template_hash "
                f"{self.of_templates} AND provenance = ? AND chip = ?",
                here,
            )
            least = found[0][0] if found and _is_time(found[0][0]) else None
        ranked = zip(ranks(problem, [row[0] for row in rows], least), rows, strict=True)
        for _, (standing, mlx, error) in heapq.nsmallest(ROWS_TRIED, ranked, key=_rank):
            schedule = self._valid(standing.schedule, f"user database, {place}")
            if schedule:
                return self._hit(
                    schedule, standing, mlx, error, f"user database, {place}", chip, exact
                )
        return None

    def _shipped_row(
        self, problem: Problem, chip: str, provenance: str, place: str, exact: bool
    ) -> Hit | None:
        for m in self._shipped(chip).get(problem.key, ()):  # the best first
            if m.provenance != provenance:
                continue
            schedule = self._valid(m.schedule.key, f"shipped records, {place}")
            if schedule:
                words = f"shipped records, {place}"
                found = (Standing.of(m), m.mlx_seconds, m.error)
                return self._hit(schedule, *found, words, chip, exact)
        return None

    def _hit(
        self,
        schedule: Schedule,
        standing: Standing,
        mlx_seconds: float | None,
        error: float | None,
        place: str,
        chip: str,
        exact: bool,
    ) -> Hit:
        stale, warm = standing.stale, standing.warm
        place += ", stale" * stale + ", measured with a warm cache" * warm
        return Hit(
            schedule,
            standing.provenance,
            place,
            chip,
            exact and not stale and not warm,
            stale,
            standing.seconds,
            standing.default_seconds,
            mlx_seconds,
            True,
            error,
            self.path,
        )

    def _shipped(self, chip: str) -> dict[str, list[Measurement]]:
        if chip not in self.records:
            self.records[chip] = shipped_buckets(self.problem, chip, self.templates, self.shipped)
        return self.records[chip]

    def _near(self, chips: Sequence[str]) -> dict[str, list[tuple[str, Problem]]]:
        """By provenance, chips and other sizes of the config that have a row that may answer.

        In the order of the chips, the nearest sizes first.
        """
        config, family = self.problem.config, self.problem.family
        self._learn_ids("config = ? AND family = ?", [config.key, family])
        found: set[tuple[str, str, tuple[int, int, int]]] = {
            (provenance, chip, (heads, queries, keys))
            for provenance, chip, heads, queries, keys in self._rows(
                "SELECT m.provenance, m.chip, p.batch_heads, p.q_len, p.kv_len FROM problems p "
                "JOIN measurements m ON m.problem = p.id WHERE p.config = ? AND p.family = ? AND "
                f"m.template_hash {self.of_templates} AND "
                f"m.chip IN ({', '.join('?' * len(chips))}) "
                "AND m.verified = 1 GROUP BY m.provenance, m.chip, p.id",
                [config.key, family, *sorted(self.templates), *chips],
            )
            if all(map(_is_size, (heads, queries, keys), MOST))
        }
        for chip in chips:
            for records in self._shipped(chip).values():
                p = records[0].problem
                sizes = (p.batch_heads, p.q_len, p.kv_len)
                found |= {(m.provenance, chip, sizes) for m in records}
        here = (self.problem.batch_heads, self.problem.q_len, self.problem.kv_len)
        near: dict[str, list[tuple[str, Problem]]] = {name: [] for name in PROVENANCES}
        order = {chip: n for n, chip in enumerate(chips)}
        for provenance, chip, sizes in sorted(
            found, key=lambda each: (order[each[1]], _distance(each[2], here), each[2])
        ):
            if sizes != here and len(near[provenance]) < MOST_BUCKETS:
                near[provenance].append((chip, Problem(config, *sizes, family=family)))
        return near

    def _learn_ids(self, where: str, values: list[Any]) -> None:
        """The ids of problems in the user's database, by their keys."""
        rows = self._rows(
            f"SELECT key, id FROM problems WHERE {where} LIMIT ?", [*values, MOST_PROBLEMS]
        )
        self.ids |= {key: n for key, n in rows if isinstance(key, str) and isinstance(n, int)}

    def _say_why(self, chip: str, missed: bool) -> None:
        """Name the rows of this problem and chip that may not answer."""
        if self.problem.key not in self.ids:
            return
        place = [self.ids[self.problem.key], chip, *sorted(self.templates)]
        begin = "user database, this chip: "
        rows = "FROM measurements WHERE problem = ? AND chip = ? AND template_hash"
        for (count,) in self._rows(f"SELECT count(*) {rows} NOT {self.of_templates}", place):
            if count:
                self.path.append(
                    f"{begin}{counted(count, 'row')} from other template versions, ignored; "
                    "`metalgen db refresh` keeps those whose kernel source is unchanged"
                )
        if missed:
            for status, count in self._rows(
                f"SELECT status, count(*) {rows} {self.of_templates} GROUP BY 1", place
            ):
                rows_found = counted(count, "row")
                self.path.append(
                    f"{begin}{rows_found} not eligible (status {printable(status)}, not verified)"
                )

    def _valid(self, key: object, place: str) -> Schedule | None:
        """The schedule of a row, typed and valid here; or None, and why."""
        try:
            if not isinstance(key, str) or len(key) > MAX_TEXT:
                raise ValueError("its schedule is not a text")
            fields, family = json.loads(key), self.problem.family
            schedule = decode_schedule(fields, family, self.limits.language)
            check_schedule(self.problem.config, schedule, self.limits)
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


def _is_time(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and value > 0


MOST = (MAX_BATCH_HEADS, MAX_LENGTH, MAX_LENGTH)
"""The largest sizes of a problem: batch times heads, queries, keys."""


def _is_size(value: object, most: int) -> bool:
    return isinstance(value, int) and 0 < value <= most


def _rank(ranked: tuple[Rank, Any]) -> Rank:
    return ranked[0]
