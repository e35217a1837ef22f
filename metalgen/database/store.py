"""Writing measurements, checks and runs; sqlite-utils over SQLite in write-ahead mode."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from metalgen.database.columns import measurement_of, problem_of, row_of
from metalgen.database.connect import check_header, open_for_reading
from metalgen.database.errors import (
    DatabaseError,
    LockedDatabase,
    ReadOnlyDatabase,
    UnreadableDatabase,
    explain_sqlite,
)
from metalgen.database.layout import STATUSES, user_database
from metalgen.database.measurement import (
    Measurement,
    check_field,
    check_fields,
    finite,
    host,
    now,
)
from metalgen.database.protocol import Check, Run
from metalgen.database.schema import migrate
from metalgen.errors import ArgumentError
from metalgen.families import Schedule
from metalgen.problem.config import AttentionConfig
from metalgen.problem.sizes import Problem

BUSY_SECONDS = 30.0
"""How long a write waits for another process before the database counts as locked."""


class Store:
    """An open tuning database. Every method either commits before it returns or changes nothing.

    Use `Store.open`; a store is a context manager and belongs to one thread.
    """

    def __init__(self, db: Database, path: Path) -> None:
        self.db = db
        self.path = path

    @classmethod
    def open(
        cls, path: Path | str | None = None, *, read_only: bool = False, busy: float = BUSY_SECONDS
    ) -> Store:
        """Open the database, and create or migrate it unless `read_only`.

        Args:
            path: the file; None means `metalgen.database.layout.user_database`.
            read_only: never write, not even a new file.
            busy: seconds to wait for another process.

        Raises:
            DatabaseError: one of its subclasses names what is wrong; nothing was changed.
        """
        path = user_database() if path is None else Path(path)
        if read_only:
            connection = open_for_reading(path, timeout=busy)
            return cls(Database(connection, execute_plugins=False), path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnreadableDatabase(
                path, f"its folder cannot be made ({error.strerror})"
            ) from error
        if path.is_dir():
            raise UnreadableDatabase(path, "is a folder, not a file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ReadOnlyDatabase(path, "read-only; set METALGEN_DB to a file you can write")
        with explained(path):
            connection = sqlite3.connect(path, timeout=busy)
            try:
                connection.execute("PRAGMA trusted_schema = OFF")
                check_header(connection, path, may_migrate=True)
                _write_ahead(connection, busy)
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("PRAGMA foreign_keys = ON")
                db = Database(connection, execute_plugins=False)
                migrate(db)
            except BaseException:
                connection.close()
                raise
        return cls(db, path)

    def close(self) -> None:
        """Close the file; the last process to do so folds the write-ahead log in."""
        self.db.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # Runs

    def begin_run(self, chip: str, seed: int, notes: dict[str, Any] | None = None) -> str:
        """Record that a tuning run began; returns its id."""
        run = uuid.uuid4().hex
        with self.writing():
            self.db.table("runs").insert(
                {
                    "id": run,
                    "started": now(),
                    "chip": chip,
                    "seed": seed,
                    "notes": json.dumps(notes or {}, sort_keys=True),
                }
            )
        return run

    def end_run(self, run: str, outcome: str) -> None:
        """Record how a run ended: ``"finished"``, ``"interrupted"``, ``"budget"``, ``"failed"``."""
        with self.writing():
            self._notes(run)
            self.db.execute(
                "UPDATE runs SET ended = ?, outcome = ? WHERE id = ?", [now(), outcome, run]
            )

    def note_run(self, run: str, name: str, value: Any) -> None:
        """Add to what is on record about a run; ``value`` is plain JSON."""
        with self.writing():
            notes = json.loads(self._notes(run)) | {name: value}
            self.db.execute(
                "UPDATE runs SET notes = ? WHERE id = ?", [json.dumps(notes, sort_keys=True), run]
            )

    def _notes(self, run: str) -> str:
        row = self.db.execute("SELECT notes FROM runs WHERE id = ?", [run]).fetchone()
        if row is None:
            raise ArgumentError("run", "a run that was begun", run)
        return str(row[0])

    def runs(self) -> list[Run]:
        """Every run, in the order they began."""
        with explained(self.path):
            rows = self.db.execute(
                "SELECT id, chip, seed, started, ended, outcome, notes FROM runs ORDER BY rowid"
            ).fetchall()
        return [Run(*row) for row in rows]

    # Measurements

    def add_measurement(self, measurement: Measurement) -> bool:
        """Commit one measurement; False where the same one is there already, which is kept."""
        return self.add_measurements([measurement]) == 1

    def add_measurements(
        self, measurements: Iterable[Measurement], *, replace_predictions: bool = False
    ) -> int:
        """Commit several measurements at once, all or none; returns how many were new.

        Args:
            measurements: each with its ``run`` begun before.
            replace_predictions: first remove modelled rows of the same problem, templates and
                chip that another version of the chip model made. Measured rows are never removed.
        """
        added = 0
        with self.writing():
            stale: set[tuple[Any, ...]] = set()
            for m in measurements:
                problem = self.id_of("problems", row_of(m.problem))
                if replace_predictions and m.provenance == "modelled":
                    stale.add((problem, m.template_hash, m.chip, m.cores, m.policy))
                added += self._insert(m, problem)
            for *group, policy in stale:
                where = "provenance = 'modelled' AND problem = ? AND template_hash = ? "
                where += "AND chip = ? AND cores = ?"
                found = self.db.execute(
                    f"SELECT DISTINCT policy FROM measurements WHERE {where}", group
                ).fetchall()
                for (other,) in found:  # a choice of fewer schedules is no other version
                    if _model(other) != _model(policy):
                        self.db.execute(
                            f"DELETE FROM measurements WHERE {where} AND policy = ?",
                            [*group, other],
                        )
        return added

    def _insert(self, m: Measurement, problem: int) -> int:
        check_fields(m)
        checks = self._checks(
            m.problem.family, m.problem.config.key, m.schedule.key, m.template_hash
        )
        statuses = {status for status, _ in checks}
        verified = m.status == "ok" and (m.verified or bool(statuses)) and statuses <= {"ok"}
        error = m.error
        if verified and error is None:
            error = max((e for _, e in checks if e is not None), default=None)
        row = {
            "problem": problem,
            "schedule": self.id_of("schedules", {"key": m.schedule.key}),
            "template_hash": m.template_hash,
            "chip": m.chip,
            "cores": m.cores,
            "device": m.device,
            "provenance": m.provenance,
            "policy": m.policy,
            "phase": m.phase,
            "status": m.status,
            "verified": int(verified),
            "seconds": m.seconds,
            "spread": m.spread,
            "samples": json.dumps(list(m.samples)),
            "default_seconds": m.default_seconds,
            "mlx_seconds": m.mlx_seconds,
            "error": error,
            "detail": m.detail,
            "source_hash": m.source_hash,
            "os": m.os,
            "mlx_version": m.mlx_version,
            "metalgen_version": m.metalgen_version,
            "run": m.run,
            "created": m.created,
        }
        marks = ", ".join("?" for _ in row)
        cursor = self.db.execute(
            f"INSERT INTO measurements ({', '.join(row)}) VALUES ({marks}) "
            "ON CONFLICT (problem, schedule, template_hash, chip, cores, device, provenance, "
            "policy, phase) DO NOTHING",
            list(row.values()),
        )
        return cursor.rowcount

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
        """The measurements that fit every argument given, in the order they were committed.

        ``config`` is the key of an `AttentionConfig`.

        A row that does not hold what it should (someone edited the file) is left out; `health`
        counts those.
        """
        return [m for m in self._measurements(problem, locals()) if m is not None]

    def _measurements(
        self, problem: Problem | None, filters: dict[str, Any]
    ) -> Iterator[Measurement | None]:
        names = ("chip", "template_hash", "provenance", "policy", "phase", "verified")
        where = {f"m.{name}": filters[name] for name in names if filters.get(name) is not None}
        for name in ("config", "family"):
            if filters.get(name) is not None:
                where[f"p.{name}"] = filters[name]
        if problem is not None:
            where["p.key"] = problem.key
        condition = " AND ".join(f"{name} = ?" for name in where) or "1"
        with explained(self.path):
            rows = list(
                self.db.query(
                    "SELECT m.*, p.key AS problem_key, s.key AS schedule_key "
                    "FROM measurements m JOIN problems p ON p.id = m.problem "
                    f"JOIN schedules s ON s.id = m.schedule WHERE {condition} ORDER BY m.id",
                    list(where.values()),
                )
            )
        for row in rows:
            yield measurement_of(row)

    def problems(self, chip: str | None = None) -> list[Problem]:
        """Every problem that has a measurement (on `chip`), in the order of their keys."""
        with explained(self.path):
            rows = self.db.execute(
                "SELECT key FROM problems p WHERE EXISTS (SELECT 1 FROM measurements m "
                "WHERE m.problem = p.id AND m.chip = coalesce(?, m.chip)) ORDER BY key",
                [chip],
            ).fetchall()
        return [p for (key,) in rows if (p := problem_of(key)) is not None]

    # Checks

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
        """Commit the outcome of a check, and what follows for the measurements of that kernel.

        Passed: its rows become verified, unless the check failed on another device. Failed: its
        rows that were ``ok`` take the check's status, and cannot win. An earlier outcome on the
        same device is replaced. An error or tolerance that is not finite, as of a kernel that gives
        NaN, counts as none, for no record may hold one.

        Raises:
            ArgumentError: a status, device, template hash, detail or number that cannot be.
        """
        told = (("device", device), ("template_hash", template_hash), ("detail", detail))
        for name, value in told:
            check_field(name, value)
        if status not in STATUSES:
            raise ArgumentError("status", f"one of {', '.join(STATUSES)}", status)
        error, tolerance = finite("error", error), finite("tolerance", tolerance)
        with self.writing():
            self.db.table("checks").upsert(
                {
                    "family": family,
                    "config": config.key,
                    "schedule": schedule.key,
                    "template_hash": template_hash,
                    "source_hash": source_hash,
                    "device": device,
                    "status": status,
                    "error": error,
                    "tolerance": tolerance,
                    "shape": shape,
                    "detail": detail,
                    **host(),
                    "created": now(),
                },
                pk=("config", "family", "schedule", "template_hash", "device"),
            )
            where = (template_hash, schedule.key, config.key, family)
            checks = self._checks(family, config.key, schedule.key, template_hash)
            if status != "ok":
                self._fail(status, error, detail, where)
            elif all(found == "ok" for found, _ in checks):
                self.db.execute(
                    f"UPDATE measurements SET verified = 1, error = ? WHERE {_OK_ROWS}",
                    [error, *where],
                )

    def settle(self, family: str, config: str, schedule: str, template_hash: str) -> None:
        """Let rows of a kernel follow its checks, whichever came first; within a transaction."""
        where = (template_hash, schedule, config, family)
        checks = self.db.execute(
            "SELECT status, error, detail FROM checks WHERE template_hash = ? AND schedule = ? "
            "AND config = ? AND family = ? ORDER BY status = 'ok', created DESC",
            where,
        ).fetchall()
        if checks and checks[0][0] != "ok":
            status, error, detail = checks[0]
            self._fail(status, error, detail, where)
        elif checks:
            error = max((e for _, e, _ in checks if e is not None), default=None)
            self.db.execute(
                "UPDATE measurements SET verified = 1, error = coalesce(error, ?) "
                f"WHERE {_OK_ROWS}",
                [error, *where],
            )

    def _fail(
        self, status: str, error: float | None, detail: str, where: tuple[str, str, str, str]
    ) -> None:
        self.db.execute(
            "UPDATE measurements SET status = ?, verified = 0, error = ?, detail = ? "
            f"WHERE {_OK_ROWS}",
            [status, error, detail, *where],
        )

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
        with explained(self.path):
            row = next(
                self.db.query(
                    "SELECT * FROM checks WHERE config = ? AND family = ? AND schedule = ? AND "
                    "template_hash = ? AND device = coalesce(?, device) ORDER BY status = 'ok'",
                    [config.key, family, schedule.key, template_hash, device],
                ),
                None,
            )
        if row is None:
            return None
        names = ("device", "status", "error", "tolerance", "shape", "detail", "created")
        return Check(
            config, schedule, template_hash, family=family, **{name: row[name] for name in names}
        )

    def _checks(
        self, family: str, config: str, schedule: str, template_hash: str
    ) -> list[tuple[str, float | None]]:
        """Status and error of every check of a kernel, on whatever device."""
        return self.db.execute(
            "SELECT status, error FROM checks WHERE config = ? AND family = ? AND schedule = ? "
            "AND template_hash = ?",
            [config, family, schedule, template_hash],
        ).fetchall()

    # Pins

    def pin(self, problem: Problem, schedule: Schedule, note: str = "") -> None:
        """Make look-ups of a problem answer with this schedule, for A/B tests."""
        with self.writing():
            self.db.table("pins").upsert(
                {
                    "problem": self.id_of("problems", row_of(problem)),
                    "schedule": self.id_of("schedules", {"key": schedule.key}),
                    "note": note,
                    "created": now(),
                },
                pk="problem",
            )

    def unpin(self, problem: Problem) -> None:
        """Undo `pin`."""
        with self.writing():
            self.db.execute(
                "DELETE FROM pins WHERE problem = (SELECT id FROM problems WHERE key = ?)",
                [problem.key],
            )

    def prune(
        self,
        *,
        keep_templates: set[str] | None = None,
        provenance: str | None = None,
        chip: str | None = None,
        dry_run: bool = False,
    ) -> int:
        """Remove measurements that fit every argument given; returns how many.

        Args:
            keep_templates: only rows of other template hashes than these.
            provenance, chip: only rows of these.
            dry_run: remove none.
        """
        where, values = ["1"], []
        if keep_templates is not None:
            where.append(f"template_hash NOT IN ({', '.join('?' * len(keep_templates))})")
            values += sorted(keep_templates)
        for name, value in (("provenance", provenance), ("chip", chip)):
            if value is not None:
                where.append(f"{name} = ?")
                values.append(value)
        condition = " AND ".join(where)
        with self.writing():
            count = self.db.execute(
                f"SELECT count(*) FROM measurements WHERE {condition}", values
            ).fetchone()[0]
            if not dry_run:
                self.db.execute(f"DELETE FROM measurements WHERE {condition}", values)
        return int(count)

    def count_of_other_templates(self, present: set[str]) -> int:
        """How many measurements have a template hash that is none of these."""
        with explained(self.path):
            rows = self.db.execute(
                "SELECT template_hash, count(*) FROM measurements GROUP BY 1"
            ).fetchall()
        return sum(count for templates, count in rows if templates not in present)

    def health(self) -> dict[str, Any]:
        """What `metalgen doctor` says: rows by kind, unreadable rows, and SQLite's own check."""
        with explained(self.path):
            integrity = self.db.execute("PRAGMA quick_check(1)").fetchone()[0]
            counts = self.db.execute(
                "SELECT provenance, status, count(*) FROM measurements GROUP BY 1, 2 ORDER BY 1, 2"
            ).fetchall()
            tables = ("problems", "schedules", "measurements", "checks", "runs", "pins")
            sizes = {
                name: self.db.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in tables
            }
        bad = sum(m is None for m in self._measurements(None, {}))
        return {
            "integrity": integrity,
            "rows": sizes,
            "measurements": {f"{p} {s}": n for p, s, n in counts},
            "unreadable_rows": bad,
        }

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that takes the write lock at once, so that it can wait for it."""
        with explained(self.path):
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
            except BaseException:
                self.db.rollback()
                raise

    def id_of(self, table: str, row: dict[str, Any]) -> int:
        """The id of a problem or schedule, which is entered where it is new."""
        found = self.db.execute(f"SELECT id FROM {table} WHERE key = ?", [row["key"]]).fetchone()
        if found:
            return int(found[0])
        return int(self.db.table(table).insert(row).last_pk)  # type: ignore[arg-type]


_OK_ROWS = (
    "status = 'ok' AND template_hash = ? AND schedule = (SELECT id FROM schedules WHERE key = ?) "
    "AND problem IN (SELECT id FROM problems WHERE config = ? AND family = ?)"
)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a `DatabaseError` that says what is wrong."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise DatabaseError(path, f"a row was refused ({error})") from error
    except sqlite3.Error as error:
        raise explain_sqlite(path, error) from error


def _write_ahead(connection: sqlite3.Connection, busy: float) -> None:
    """Switch to write-ahead logging; SQLite does not wait by itself while others open the file."""
    deadline = time.monotonic() + busy
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            locked = isinstance(explain_sqlite("", error), LockedDatabase)
            if not locked or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _model(policy: str) -> object:
    """The version of the chip model that a modelled row's policy names; if none, the policy."""
    try:
        return json.loads(policy)["model"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return policy
