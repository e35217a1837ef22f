"""The SQLite store of tuning records: measurements, runs and pins; `checks` has its checks."""

from __future__ import annotations

import functools
import json
import uuid
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from metalgen.database.checks import KeepsChecks
from metalgen.database.columns import measurement_of, problem_of, row_of
from metalgen.database.errors import explained, printable
from metalgen.database.measurement import Measurement, check_fields, now
from metalgen.database.protocol import Run
from metalgen.database.rows import IDENTITY
from metalgen.database.untrusted import parse_object
from metalgen.errors import ArgumentError
from metalgen.families import Schedule
from metalgen.families.sizes import Problem


class Store(KeepsChecks):
    """An open tuning database. Every method either commits before it returns or changes nothing.

    Use `Store.open`; a store is a context manager and belongs to one thread. What a tuning run
    commits outlives its file: see `metalgen.database.file`.
    """

    # Runs

    def begin_run(self, chip: str, seed: int, notes: dict[str, Any] | None = None) -> str:
        """Record that a tuning run began; returns its id."""
        run = uuid.uuid4().hex
        self._begin_run(
            {
                "id": run,
                "started": now(),
                "chip": chip,
                "seed": seed,
                "notes": json.dumps(notes or {}, sort_keys=True),
            }
        )
        return run

    def _begin_run(self, row: dict[str, Any]) -> None:
        with self.writing():
            self.insert("runs", row, "ON CONFLICT (id) DO NOTHING")
        self.remember(functools.partial(self._begin_run, row))

    def end_run(self, run: str, outcome: str) -> None:
        """Record how a run ended: ``"finished"``, ``"interrupted"``, ``"budget"``, ``"failed"``."""
        with self.writing():
            self._notes(run)
            self.db.execute(
                "UPDATE runs SET ended = ?, outcome = ? WHERE id = ?", [now(), outcome, run]
            )
        self.remember(functools.partial(self.end_run, run, outcome))

    def note_run(self, run: str, name: str, value: Any) -> None:
        """Add to what is on record about a run; ``value`` is plain JSON."""
        with self.writing():
            notes = json.dumps(self._notes(run) | {name: value}, sort_keys=True)
            self.db.execute("UPDATE runs SET notes = ? WHERE id = ?", [notes, run])
        self.remember(functools.partial(self.note_run, run, name, value))

    def _notes(self, run: str) -> dict[str, Any]:
        row = self.db.execute("SELECT notes FROM runs WHERE id = ?", [run]).fetchone()
        if row is None:
            raise ArgumentError("run", "a run that was begun", run)
        try:
            return parse_object(row[0])
        except (TypeError, ValueError):  # someone edited the file
            return {}

    def runs(self) -> list[Run]:
        """Every run, in the order they began; one that someone spoiled is left out."""
        with explained(self.path):
            rows = self.db.execute(
                "SELECT id, chip, seed, started, ended, outcome, notes FROM runs ORDER BY rowid"
            ).fetchall()
        return [Run(*row) for row in rows if _is_run(row)]

    # Measurements

    def add_measurement(self, measurement: Measurement) -> bool:
        """Commit one measurement; False where the same one is there already, which is kept."""
        return self.add_measurements([measurement]) == 1

    def add_measurements(
        self, measurements: Iterable[Measurement], *, replace_predictions: Collection[str] = ()
    ) -> int:
        """Commit several measurements at once, all or none; returns how many were new.

        Args:
            measurements: each with its ``run`` begun before.
            replace_predictions: template hashes: first remove modelled rows of these, about the
                same problem and chip, that another version of the chip model made. Measured rows
                are never removed.
        """
        added, kept = 0, []
        with self.writing():
            stale: set[tuple[Any, ...]] = set()
            for m in measurements:
                kept.append(m)
                problem = self.id_of("problems", row_of(m.problem))
                if replace_predictions and m.provenance == "modelled":
                    stale.add((problem, m.chip, m.cores, m.policy))
                added += self._insert(m, problem)
            for *group, policy in stale:
                where = "provenance = 'modelled' AND problem = ? AND chip = ? AND cores = ? "
                where += f"AND template_hash IN ({', '.join('?' * len(replace_predictions))})"
                group += replace_predictions
                found = self.db.execute(
                    f"SELECT DISTINCT policy FROM measurements WHERE {where}", group
                ).fetchall()
                for (other,) in found:  # a choice of fewer schedules is no other version
                    if _model(other) != _model(policy):
                        self.db.execute(
                            f"DELETE FROM measurements WHERE {where} AND policy = ?",
                            [*group, other],
                        )
        again = functools.partial(self.add_measurements, replace_predictions=replace_predictions)
        self.remember(lambda: again(kept))
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
            error = max((e for _, e in checks if isinstance(e, float)), default=None)
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
        return self.insert("measurements", row, f"ON CONFLICT ({_IDENTITY}) DO NOTHING").rowcount

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

    # Pins

    def pin(self, problem: Problem, schedule: Schedule, note: str = "") -> None:
        """Make look-ups of a problem answer with this schedule, for A/B tests."""
        with self.writing():
            row = {
                "problem": self.id_of("problems", row_of(problem)),
                "schedule": self.id_of("schedules", {"key": schedule.key}),
                "note": note,
                "created": now(),
            }
            self.insert(
                "pins",
                row,
                "ON CONFLICT (problem) DO UPDATE SET schedule = excluded.schedule, "
                "note = excluded.note, created = excluded.created",
            )

    def unpin(self, problem: Problem) -> bool:
        """Undo `pin`; False if the problem was not pinned."""
        with self.writing():
            cursor = self.db.execute(
                "DELETE FROM pins WHERE problem = (SELECT id FROM problems WHERE key = ?)",
                [problem.key],
            )
        return cursor.rowcount > 0

    def prune(
        self,
        *,
        keep_templates: Collection[str] | None = None,
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

    def count_of_other_templates(self, present: Collection[str]) -> int:
        """How many measurements have a template hash that is none of these."""
        with explained(self.path):
            rows = self.db.execute(
                "SELECT template_hash, count(*) FROM measurements GROUP BY 1"
            ).fetchall()
        return sum(count for templates, count in rows if templates not in present)

    def health(self) -> dict[str, Any]:
        """The state of the file: rows by kind and chip, unreadable ones, and SQLite's own check."""
        with explained(self.path):
            integrity = self.db.execute("PRAGMA quick_check(1)").fetchone()[0]
            counts = self.db.execute(
                "SELECT provenance, status, count(*) FROM measurements GROUP BY 1, 2 ORDER BY 1, 2"
            ).fetchall()
            chips = self.db.execute(
                "SELECT chip, count(*) FROM measurements GROUP BY 1 ORDER BY 1"
            ).fetchall()
            tables = ("problems", "schedules", "measurements", "checks", "runs", "pins")
            sizes = {
                name: self.db.execute(f"SELECT count(*) FROM {name}").fetchone()[0]
                for name in tables
            }
        bad = sum(m is None for m in self._measurements(None, {}))
        return {
            "integrity": printable(integrity),
            "rows": sizes,
            "measurements": {printable(f"{p} {s}"): n for p, s, n in counts},
            "chips": {printable(chip): n for chip, n in chips},
            "unreadable_rows": bad,
        }


_IDENTITY = ", ".join(IDENTITY)


def _is_run(row: tuple[Any, ...]) -> bool:
    name, chip, seed, started, ended, outcome, notes = row
    texts = (name, chip, started, notes, *(x for x in (ended, outcome) if x is not None))
    return isinstance(seed, int) and all(isinstance(x, str) for x in texts)


def _model(policy: str) -> object:
    """The version of the chip model that a modelled row's policy names; if none, the policy."""
    try:
        return json.loads(policy)["model"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return policy
