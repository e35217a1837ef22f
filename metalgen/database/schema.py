"""The tables of a tuning database, as migrations: never edit one that was released, add another."""

from __future__ import annotations

from sqlite_utils import Database, Migrations

from metalgen.database.layout import (
    APPLICATION_ID,
    PHASES,
    PROVENANCES,
    SCHEMA_VERSION,
    STATUSES,
)

migrations = Migrations("metalgen")

FIRST_STATUSES = ("ok", "invalid", "compile", "runtime", "timeout", "wrong")
"""Those of schemas 1 and 2."""


def _one_of(names: tuple[str, ...]) -> str:
    return "(" + ", ".join(f"'{name}'" for name in names) + ")"


@migrations()
def m001_problems_schedules_measurements_checks_runs_pins(db: Database) -> None:
    """The first schema.

    ``measurements`` has one row a measurement whatever its outcome; its unique index is what
    makes two measurements the same. Winners are never stored: the index ``winners`` finds them
    among the verified rows.
    """
    strict = "STRICT" if db.supports_strict else ""
    statements = f"""
    CREATE TABLE problems (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE,
        family TEXT NOT NULL,
        config TEXT NOT NULL,
        batch_heads INTEGER NOT NULL,
        q_len INTEGER NOT NULL,
        kv_len INTEGER NOT NULL
    ) {strict};
    CREATE INDEX problems_config ON problems (config, family);
    CREATE TABLE schedules (
        id INTEGER PRIMARY KEY,
        key TEXT NOT NULL UNIQUE
    ) {strict};
    CREATE TABLE runs (
        id TEXT PRIMARY KEY,
        started TEXT NOT NULL,
        ended TEXT,
        outcome TEXT,
        chip TEXT NOT NULL,
        seed INTEGER NOT NULL,
        notes TEXT NOT NULL DEFAULT '{{}}'
    ) {strict};
    CREATE TABLE measurements (
        id INTEGER PRIMARY KEY,
        problem INTEGER NOT NULL REFERENCES problems (id),
        schedule INTEGER NOT NULL REFERENCES schedules (id),
        template_hash TEXT NOT NULL,
        chip TEXT NOT NULL,
        cores INTEGER NOT NULL,
        device TEXT NOT NULL,
        provenance TEXT NOT NULL CHECK (provenance IN {_one_of(PROVENANCES)}),
        policy TEXT NOT NULL,
        phase TEXT NOT NULL CHECK (phase IN {_one_of(PHASES)}),
        status TEXT NOT NULL CHECK (status IN {_one_of(FIRST_STATUSES)}),
        verified INTEGER NOT NULL DEFAULT 0,
        seconds REAL,
        spread REAL,
        samples TEXT NOT NULL DEFAULT '[]',
        default_seconds REAL,
        mlx_seconds REAL,
        error REAL,
        detail TEXT NOT NULL DEFAULT '',
        os TEXT NOT NULL,
        mlx_version TEXT NOT NULL,
        metalgen_version TEXT NOT NULL,
        run TEXT NOT NULL REFERENCES runs (id),
        created TEXT NOT NULL,
        CHECK (status <> 'ok' OR seconds > 0),
        CHECK (verified = 0 OR (verified = 1 AND status = 'ok'))
    ) {strict};
    CREATE UNIQUE INDEX measurements_identity ON measurements
        (problem, schedule, template_hash, chip, cores, device, provenance, policy, phase);
    CREATE INDEX winners ON measurements
        (problem, template_hash, provenance, chip, phase, seconds) WHERE verified = 1;
    CREATE TABLE checks (
        id INTEGER PRIMARY KEY,
        family TEXT NOT NULL,
        config TEXT NOT NULL,
        schedule TEXT NOT NULL,
        template_hash TEXT NOT NULL,
        device TEXT NOT NULL,
        status TEXT NOT NULL CHECK (status IN {_one_of(FIRST_STATUSES)}),
        error REAL,
        tolerance REAL,
        shape TEXT NOT NULL DEFAULT '',
        detail TEXT NOT NULL DEFAULT '',
        os TEXT NOT NULL,
        mlx_version TEXT NOT NULL,
        metalgen_version TEXT NOT NULL,
        created TEXT NOT NULL
    ) {strict};
    CREATE UNIQUE INDEX checks_identity ON checks
        (config, family, schedule, template_hash, device);
    CREATE TABLE pins (
        problem INTEGER PRIMARY KEY REFERENCES problems (id),
        schedule INTEGER NOT NULL REFERENCES schedules (id),
        note TEXT NOT NULL DEFAULT '',
        created TEXT NOT NULL
    ) {strict};
    """
    for statement in statements.split(";"):
        if statement.strip():
            db.execute(statement)


@migrations()
def m002_source_hash(db: Database) -> None:
    """What a row's kernel is, beside the templates that made it; empty where nobody knows."""
    for table in ("measurements", "checks"):
        db.execute(f"ALTER TABLE {table} ADD COLUMN source_hash TEXT NOT NULL DEFAULT ''")


@migrations()
def m003_pruned(db: Database) -> None:
    """Rows may be pruned. SQLite changes a table's conditions only by making it anew."""
    for table in ("measurements", "checks"):
        declared = [
            sql
            for (sql,) in db.execute(
                "SELECT sql FROM sqlite_master WHERE tbl_name = ? AND sql IS NOT NULL "
                "ORDER BY type = 'index'",
                [table],
            )
        ]
        db.execute(f"ALTER TABLE {table} RENAME TO earlier")
        db.execute(declared[0].replace(_one_of(FIRST_STATUSES), _one_of(STATUSES)))
        db.execute(f"INSERT INTO {table} SELECT * FROM earlier")
        db.execute("DROP TABLE earlier")
        for sql in declared[1:]:
            db.execute(sql)


_LATER = {1: "m002_source_hash", 2: "m003_pruned"}
"""The migration that follows each earlier schema."""


def migrate(db: Database, version: int = SCHEMA_VERSION) -> None:
    """Bring an open database to a schema, in one transaction that excludes others.

    Two processes that open a new database at once migrate it once.
    """
    db.execute("BEGIN IMMEDIATE")
    try:
        if db.execute("PRAGMA user_version").fetchone()[0] < version:
            migrations.apply(db, stop_before=_LATER.get(version))
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {version}")
        db.execute("COMMIT")
    except BaseException:
        db.rollback()
        raise
