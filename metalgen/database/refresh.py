"""Keeping rows whose kernel is the same although templates were edited.

A row counts only under the present template hash, which any edit of a template changes. A row that
knows its source hash may be kept: where the present templates still make a kernel of that digest,
it is the one that was measured, and the row takes the present template hash. Nothing is removed.

Rendering is the caller's: what the present templates make of kernels is an argument (`Templates`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from metalgen.database import exchange
from metalgen.database.columns import problem_of
from metalgen.database.errors import DatabaseError, explained
from metalgen.database.layout import known_status
from metalgen.database.measurement import Measurement
from metalgen.database.merging import Merger
from metalgen.database.rows import COLUMNS, FAULTS, GRAVITY, IDENTITY, Reader, Tables
from metalgen.database.store import Store
from metalgen.database.summary import Summary
from metalgen.errors import MetalgenError
from metalgen.families.sizes import Problem
from metalgen.languages import LANGUAGES, METAL


@dataclass
class Refreshed:
    """What a refresh came to.

    Args:
        current: rows of the present templates, among them those that were `filled`.
        filled: rows of the present templates that had no source hash, and have one now.
        kept: rows of other templates whose kernel is the same: they have the present hash now.
        joined: rows fewer than before, because kept ones were joined with the same measurement.
        changed: rows of other templates whose kernel is another now, or none at all.
        unknown: rows of other templates without a source hash.
        checks: checks of other templates that were kept.
    """

    current: int = 0
    filled: int = 0
    kept: int = 0
    joined: int = 0
    changed: int = 0
    unknown: int = 0
    checks: int = 0

    @property
    def rows(self) -> int:
        """How many rows there were."""
        return self.current + self.kept + self.changed + self.unknown

    def to_dict(self) -> dict[str, int]:
        """All counts as plain values."""
        return {"rows": self.rows} | dataclasses.asdict(self)


class Templates(Protocol):
    """What the present templates make of kernels, such as a `metalgen.source.digests.Present`."""

    @property
    def template_hashes(self) -> Collection[str]:
        """The present hashes of all families and kinds."""

    def template_hash(self, family: str, schedule: str, language: str) -> str:
        """The present hash of a kernel's family and kind, by the schedule's key; empty: no kind."""

    def source_hash(self, family: str, config: str, schedule: str, language: str) -> str | None:
        """The source hash of a kernel, by the keys of its config and schedule; None: no kernel."""


def _hashes_of(
    present: Templates,
    known: tuple[str, str],
    family: str,
    config: str,
    schedule: str,
    language: str,
) -> tuple[str, tuple[str, str]]:
    """What to do with a row of some template and source hash, and the hashes that it has then.

    The first is the name of a counter of `Refreshed`.
    """
    templates, source = known
    now = present.template_hash(family, schedule, language)
    if templates == now and source:
        return "current", known
    if templates != now and not source:
        return "unknown", known
    found = present.source_hash(family, config, schedule, language)
    if templates == now:
        return ("filled", (now, found)) if found else ("current", known)
    return ("kept", (now, source)) if now and found == source else ("changed", known)


def _language_of(chip: str) -> str:
    from metalgen.chips import get_chip

    try:
        return get_chip(chip).limits.language
    except MetalgenError:
        return METAL.name


def refresh_rows(
    rows: Iterable[Measurement], present: Templates
) -> tuple[list[Measurement], Refreshed]:
    """Rows as they are under the present templates, those of one measurement joined."""
    counts = Refreshed()
    found: dict[exchange.Key, Measurement] = {}
    for m in rows:
        verdict, (templates, source) = _hashes_of(
            present,
            (m.template_hash, m.source_hash),
            *(m.problem.family, m.problem.config.key, m.schedule.key, _language_of(m.chip)),
        )
        _count(counts, verdict)
        new = dataclasses.replace(m, template_hash=templates, source_hash=source)
        key = exchange.identity(new)
        found[key] = exchange.join(found[key], new) if key in found else new
    counts.joined = counts.rows - len(found)
    return list(found.values()), counts


def refreshed_records(path: Path, present: Templates) -> tuple[str, Refreshed]:
    """The text of a record file under the present templates, in canonical form.

    Raises:
        DatabaseError: the file cannot be read, or holds anything but good records.
    """
    summary = Summary()
    rows, counts = refresh_rows(exchange.read(path, summary), present)
    if summary.reasons:
        _, place, reason = summary.reasons[0]
        raise DatabaseError(path, reason if summary.refused else f"{place}: {reason}")
    return "".join(line + "\n" for line in sorted({m.to_line() for m in rows})), counts


class _Undo(Exception):
    """Ends a dry run."""


def refresh_store(
    store: Store,
    present: Templates,
    *,
    problems: Collection[Problem] | None = None,
    chip: str | None = None,
    dry_run: bool = False,
) -> Refreshed:
    """Refresh a database's rows and checks, all or none.

    Kernels are rendered before the database is locked; a row that changed meanwhile is left alone.

    Args:
        store: the database.
        present: what the present templates make of kernels.
        problems: only rows of these, and checks of their configs; None: all.
        chip: only rows of this chip.
        dry_run: change nothing, and say what would be.
    """
    counts = Refreshed()
    with explained(store.path):
        rows = _changes(_measurements(store, problems, chip, counts, present), present, counts)
        checks = _changes(_checks(store, problems), present)
    if not rows and not checks:
        return counts
    with contextlib.suppress(_Undo), store.writing():
        _move_rows(store, rows, counts)
        for change in checks:
            counts.checks += _move_check(store, change)
        moved = (change for change in (*rows, *checks) if change.verdict == "kept")
        for kernel in sorted({(*change.row[2:5], change.hashes[0]) for change in moved}):
            store.settle(*kernel)
        if dry_run:
            raise _Undo
    return counts


class _Stored(NamedTuple):
    """A row or check: its id, template and source hash, and the keys of what its kernel is."""

    id: int
    hashes: tuple[str, str]
    family: str
    config: str
    schedule: str
    language: str


class _Change(NamedTuple):
    """What becomes of a row: the name of a counter of `Refreshed`, and new hashes."""

    row: _Stored
    verdict: str
    hashes: tuple[str, str]


def _measurements(
    store: Store,
    problems: Collection[Problem] | None,
    chip: str | None,
    counts: Refreshed,
    present: Templates,
) -> Iterator[_Stored]:
    """Rows that may have to be changed; the others are counted."""
    where, values = "chip = coalesce(?, chip)", [chip]
    if problems is not None:
        where += " AND problem IN (SELECT id FROM problems WHERE key IN (SELECT value FROM "
        where += "json_each(?)))"
        values.append(json.dumps([problem.key for problem in problems]))
    hashes = sorted(present.template_hashes)
    done = f"template_hash IN ({', '.join('?' * len(hashes))}) AND source_hash <> ''"
    values += hashes
    counts.current += store.db.execute(
        f"SELECT count(*) FROM measurements WHERE {where} AND {done}", values
    ).fetchone()[0]
    keys, known = dict(_keys(store, "problems")), dict[int, Problem | None]()
    schedules = dict(_keys(store, "schedules"))
    for number, templates, source, problem, schedule, name in store.db.execute(
        "SELECT id, template_hash, source_hash, problem, schedule, chip FROM measurements "
        f"WHERE {where} AND NOT ({done}) ORDER BY id",
        values,
    ).fetchall():
        if problem not in known:
            known[problem] = problem_of(keys.get(problem, ""))
        asked = known[problem]
        if asked is None:
            counts.unknown += 1  # someone edited the file
            continue
        kernel = (asked.family, asked.config.key, schedules.get(schedule, ""), _language_of(name))
        yield _Stored(number, (templates, source), *kernel)


def _keys(store: Store, table: str) -> list[tuple[int, str]]:
    return store.db.execute(f"SELECT id, key FROM {table}").fetchall()


def _checks(store: Store, problems: Collection[Problem] | None) -> Iterator[_Stored]:
    wanted = None if problems is None else {(p.family, p.config.key) for p in problems}
    for number, templates, source, family, config, schedule, device in store.db.execute(
        "SELECT id, template_hash, source_hash, family, config, schedule, device FROM checks "
        "ORDER BY id"
    ).fetchall():
        if wanted is None or (family, config) in wanted:
            # A GPU's device has the name of its language; the simulator executes Metal.
            language = device if device in LANGUAGES else METAL.name
            yield _Stored(number, (templates, source), family, config, schedule, language)


def _changes(
    rows: Iterable[_Stored], present: Templates, counts: Refreshed | None = None
) -> list[_Change]:
    found = []
    for row in rows:
        verdict, hashes = _hashes_of(present, row.hashes, *row[2:])
        if counts is not None:
            _count(counts, verdict)
        if hashes != row.hashes:
            found.append(_Change(row, verdict, hashes))
    return found


def _count(counts: Refreshed, verdict: str) -> None:
    setattr(counts, verdict, getattr(counts, verdict) + 1)
    counts.current += verdict == "filled"


_SEEN = "id = ? AND template_hash = ? AND source_hash = ?"
_SAME = " AND ".join(f"b.{name} = a.{name}" for name in IDENTITY if name != "template_hash")
_THERE = (
    f"SELECT b.id FROM measurements a JOIN measurements b ON {_SAME} AND b.template_hash = ? "
    "WHERE a.id = ? AND b.id <> a.id"
)


def _move_rows(store: Store, changes: Iterable[_Change], counts: Refreshed) -> None:
    """Give rows their hashes; one whose place is taken is joined with the row that is there."""
    reader, rows = Reader(), []
    tables = Tables(dict(_keys(store, "problems")), dict(_keys(store, "schedules")))
    for change in changes:
        number, seen = change.row.id, [change.row.id, *change.row.hashes]
        if not store.db.execute(_THERE, [change.hashes[0], number]).fetchone():
            store.db.execute(
                f"UPDATE measurements SET template_hash = ?, source_hash = ? WHERE {_SEEN}",
                [*change.hashes, *seen],
            )
            continue
        values = store.db.execute(
            f"SELECT {', '.join(COLUMNS)} FROM measurements WHERE {_SEEN}", seen
        ).fetchone()
        try:
            row = reader.row(values, tables)
        except FAULTS:  # it is gone, or someone edited the file
            continue
        key = dict(zip(IDENTITY, row.key, strict=True)) | {"template_hash": change.hashes[0]}
        rows.append(row._replace(key=tuple(key.values()), source_hash=change.hashes[1]))
        store.db.execute("DELETE FROM measurements WHERE id = ?", [number])
        counts.joined += 1
    merger = Merger(store, Summary(), contextlib.nullcontext)
    merger.add(rows)
    merger.finish()


def _move_check(store: Store, change: _Change) -> bool:
    """Give a check its hashes; of two on one device the graver stays, then the later."""
    there = store.db.execute(
        "SELECT b.id, b.status, b.created, a.status, a.created FROM checks a JOIN checks b "
        "ON (b.config, b.family, b.schedule, b.device) = (a.config, a.family, a.schedule, a.device)"
        " AND b.template_hash = ? WHERE a.id = ? AND b.id <> a.id",
        [change.hashes[0], change.row.id],
    ).fetchone()
    number = change.row.id
    if there is not None:
        other, status, created, own, own_created = there
        ranks = [GRAVITY.index(known_status(each)) for each in (own, status)]
        wins = (ranks[0], str(own_created)) > (ranks[1], str(created))
        store.db.execute("DELETE FROM checks WHERE id = ?", [other if wins else number])
    store.db.execute(
        f"UPDATE checks SET template_hash = ?, source_hash = ? WHERE {_SEEN}",
        [*change.hashes, number, *change.row.hashes],
    )
    return change.verdict == "kept"
