"""Merging rows into a store: gathered by measurement, joined once, written in large batches."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from metalgen.database.columns import problem_of, row_of
from metalgen.database.layout import known_status
from metalgen.database.rows import (
    COLUMNS,
    FAULTS,
    GRAVITY,
    IDENTITY,
    Key,
    Reader,
    Row,
    Tables,
    join_rows,
)
from metalgen.database.store import Store
from metalgen.database.summary import Summary
from metalgen.problem.config import AttentionConfig

GATHERED = 300_000
"""Rows that are gathered before they are written; a row takes about a kilobyte."""
FEW = 500
"""Problems or schedules that are looked up one by one."""
BATCH = 5_000
"""Rows that are handed to SQLite at once."""
RUN = "merged"
"""The run of rows that came from elsewhere."""


class Merger:
    """Gathers rows of several sources, and writes what they come to.

    Args:
        store: where to.
        summary: what is added to by `finish`.
        transaction: what each write goes into; a dry run is inside one already.
    """

    def __init__(
        self,
        store: Store,
        summary: Summary,
        transaction: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.store = store
        self.summary = summary
        self.transaction = transaction or store.writing
        self._reader = Reader()
        self._gathered: dict[Key, list[Row]] = {}
        self._count = 0
        self._outcomes: dict[Key, str] = {}
        self._conflicts: set[Key] = set()

    def add_file(self, path: Path) -> None:
        """Gather the rows of a database or record file; nothing of one that is refused."""
        part = Summary()
        rows = list(self._reader.read(path, part))
        self.summary.refused += part.refused
        self.summary.rejected += part.rejected
        self.summary.reasons += part.reasons
        if not part.refused:
            self.add(rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Gather rows of one source, all of which are written at once or not at all."""
        for row in rows:
            sides = self._gathered.get(row.key)
            if sides is None:
                self._gathered[row.key] = [row]
            else:
                sides.append(row)
            self._count += 1
        if self._count >= GATHERED:
            self._write()

    def finish(self) -> None:
        """Write what is left, and count."""
        if self._gathered:
            self._write()
        counts = Counter(self._outcomes.values())
        self.summary.new += counts["new"]
        self.summary.pooled += counts["pooled"]
        self.summary.same += counts["same"]
        self.summary.conflicts += len(self._conflicts)

    def _write(self) -> None:
        with self.transaction():
            failed = self._failed_checks()
            rows = [self._checked(join_rows(sides), failed) for sides in self._gathered.values()]
            self._enter(rows)
        self._gathered.clear()
        self._count = 0

    def _failed_checks(self) -> dict[tuple[str, str, str, str], str]:
        """The gravest status of each kernel that failed a check, on whatever device."""
        failed: dict[tuple[str, str, str, str], str] = {}
        for *kernel, status in self.store.db.execute(
            "SELECT config, family, schedule, template_hash, status FROM checks "
            "WHERE status <> 'ok'"
        ):
            place = tuple(kernel)
            failed[place] = max(failed.get(place, "ok"), known_status(status), key=GRAVITY.index)
        return failed

    def _checked(self, row: Row, failed: dict[tuple[str, str, str, str], str]) -> Row:
        """The row, not ok where its kernel failed a check here."""
        if len(sides := self._gathered[row.key]) > 1 and len({s.status == "ok" for s in sides}) > 1:
            self._conflicts.add(row.key)
        if not failed or row.status != "ok":
            return row
        problem = json.loads(row.key[0])
        config = AttentionConfig.from_dict(problem["config"]).key
        status = failed.get((config, problem["family"], row.key[1], row.key[2]))
        return row._replace(status=status, verified=False) if status else row

    def _enter(self, rows: list[Row]) -> None:
        cursor = self.store.db.conn.cursor()
        cursor.execute(
            "INSERT OR IGNORE INTO runs (id, started, chip, seed) VALUES (?, '', '', 0)", [RUN]
        )
        problems = self._ids("problems", (row.key[0] for row in rows))
        schedules = self._ids("schedules", (row.key[1] for row in rows))
        empty = cursor.execute("SELECT 1 FROM measurements LIMIT 1").fetchone() is None
        tables = Tables(
            {number: key for key, number in problems.items()},
            {number: key for key, number in schedules.items()},
        )
        # In the order of the index, whose pages are then written one after the other.
        ordered = sorted(
            (problems[row.key[0]], schedules[row.key[1]], n) for n, row in enumerate(rows)
        )
        new: list[tuple[Any, ...]] = []
        changed: list[tuple[Any, ...]] = []
        for problem, schedule, n in ordered:
            row = rows[n]
            place = (problem, schedule, *row.key[2:])
            found = None if empty else cursor.execute(_FIND, place).fetchone()
            if found is None:
                new.append((*place, *_values(row), RUN))
                self._outcomes[row.key] = "new"
            else:
                joined = self._join(row, found[1:], tables)
                if joined is None:
                    self._outcomes.setdefault(row.key, "same")
                else:
                    changed.append((*_values(joined), RUN, found[0]))
                    if self._outcomes.get(row.key) != "new":
                        self._outcomes[row.key] = "pooled"
            if len(new) >= BATCH:
                cursor.executemany(_INSERT, new)
                new.clear()
            if len(changed) >= BATCH:
                cursor.executemany(_UPDATE, changed)
                changed.clear()
        cursor.executemany(_INSERT, new)
        cursor.executemany(_UPDATE, changed)

    def _join(self, row: Row, found: tuple[Any, ...], tables: Tables) -> Row | None:
        """What a row and the one that is there make; None where that is the one that is there."""
        try:
            here = self._reader.row(found, tables)
        except FAULTS:
            return row  # an unreadable row of our own is repaired
        if (here.status == "ok") != (row.status == "ok"):
            self._conflicts.add(row.key)
        joined = join_rows([here, row])
        return None if joined == here else joined

    def _ids(self, table: str, keys: Iterable[str]) -> dict[str, int]:
        """The ids of problems or schedules, which are entered where they are new."""
        wanted = dict.fromkeys(keys)
        known: dict[str, int] = {}
        if len(wanted) > FEW:
            known = dict(self.store.db.execute(f"SELECT key, id FROM {table}").fetchall())
        for key in wanted:
            if key in known:
                continue
            row: dict[str, Any] = {"key": key}
            if table == "problems":
                problem = problem_of(key)
                assert problem is not None  # it was read from a good row
                row = row_of(problem)
            known[key] = self.store.id_of(table, row)
        return known


_FIND = f"SELECT id, {', '.join(COLUMNS)} FROM measurements WHERE " + " AND ".join(
    f"{name} = ?" for name in IDENTITY
)
_INSERT = (
    f"INSERT INTO measurements ({', '.join(COLUMNS)}, run) "
    f"VALUES ({', '.join('?' * (len(COLUMNS) + 1))})"
)
_JOINED = (*COLUMNS[len(IDENTITY) :], "run")
_UPDATE = f"UPDATE measurements SET {', '.join(f'{name} = ?' for name in _JOINED)} WHERE id = ?"


def _values(row: Row) -> tuple[Any, ...]:
    samples = f"[{', '.join(map(repr, row.samples))}]"
    return (*row[1:-1], samples)


class _Undo(Exception):
    """Ends a dry run."""


def merge(store: Store, sources: Iterable[Path], *, dry_run: bool = False) -> Summary:
    """Merge databases and record files into a store.

    A source that is refused leaves nothing behind; the others are merged, each wholly. With
    `dry_run` nothing is kept, and the summary is that of the merge.
    """
    total = Summary()
    if not dry_run:
        _merge(Merger(store, total), sources)
        return total
    with contextlib.suppress(_Undo), store.writing():
        _merge(Merger(store, total, contextlib.nullcontext), sources)
        raise _Undo
    return total


def _merge(merger: Merger, sources: Iterable[Path]) -> None:
    with _uncollected():
        for path in sources:
            merger.add_file(path)
        merger.finish()


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No search for cycles among millions of tuples that have none: a tenth of a merge's time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def merge_rows(store: Store, rows: Iterable[Row]) -> Summary:
    """Merge rows that were read and checked already, all at once."""
    rows = list(rows)
    merger = Merger(store, Summary())
    merger.add(rows)
    merger.finish()
    store.remember(functools.partial(merge_rows, store, rows))
    return merger.summary
