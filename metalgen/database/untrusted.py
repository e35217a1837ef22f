"""Reading databases and record files that came from elsewhere.

Such a file is hostile until shown otherwise. A database is opened read-only and immutable, under
small limits, must have exactly the tables and indices that metalgen makes (so no views,
triggers, virtual tables, generated columns or checks of its own), must pass SQLite's own check,
and is then read through an authorizer that allows nothing but selecting columns of those tables.
A record file is read line by line. Nothing that either holds is executed, and what is wrong is
named.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from metalgen.database.connect import check_name
from metalgen.database.errors import (
    DatabaseError,
    ForeignDatabase,
    MissingDatabase,
    NewerDatabase,
    OlderDatabase,
    UnreadableDatabase,
    explained,
    printable,
)
from metalgen.database.layout import APPLICATION_ID, OLDEST_READ, SCHEMA_VERSION

MAGIC = b"SQLite format 3\0"
MAX_DATABASE_BYTES = 1 << 30
MAX_RECORDS_BYTES = 1 << 28
MAX_LINE_BYTES = 1 << 21
MAX_SECONDS = 60.0
"""How long one statement on a database from elsewhere may run."""
LIMITS = {
    sqlite3.SQLITE_LIMIT_LENGTH: 1 << 21,
    sqlite3.SQLITE_LIMIT_SQL_LENGTH: 1 << 16,
    sqlite3.SQLITE_LIMIT_COLUMN: 64,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 32,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 2,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 8,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 64,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 64,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 1,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}
OPTIONAL = frozenset({"_sqlite_migrations", "sqlite_sequence", "sqlite_stat1"})
"""Tables beside ours that sqlite-utils and SQLite make; they are not read."""


def is_database(path: Path) -> bool:
    """Whether a file begins as an SQLite database does; raises `DatabaseError` if unreadable."""
    return _head(path)[: len(MAGIC)] == MAGIC


@contextlib.contextmanager
def open_untrusted(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection to a database from elsewhere, on which only our columns can be selected.

    Raises:
        DatabaseError: with the first thing that is wrong with it, also while it is read.
    """
    with explained(path):
        version = _check_head(path)
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(path.absolute()))}?mode=ro&immutable=1", uri=True
        )
        with contextlib.closing(connection):
            for limit, value in LIMITS.items():
                connection.setlimit(limit, value)
            for pragma in ("trusted_schema = OFF", "query_only = ON", "cell_size_check = ON"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("PRAGMA mmap_size = 0")
            deadline = [time.monotonic() + MAX_SECONDS]
            connection.set_progress_handler(lambda: time.monotonic() > deadline[0], 100_000)
            _check_schema(connection, path, version)
            faults = connection.execute("PRAGMA quick_check(1)").fetchone()
            if faults != ("ok",):
                words = printable(faults[0] if faults else "", 120)
                raise UnreadableDatabase(path, f"damaged ({words})")
            connection.set_authorizer(_authorize)
            deadline[0] = time.monotonic() + MAX_SECONDS
            yield connection


def _authorize(action: int, first: str | None, second: str | None, *_: object) -> int:
    if action == sqlite3.SQLITE_SELECT:
        return sqlite3.SQLITE_OK
    if action == sqlite3.SQLITE_READ and (first or "") in _tables():
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _head(path: Path) -> bytes:
    with explained(path):
        check_name(path)
        if path.is_dir():
            raise UnreadableDatabase(path, "is a folder, not a file")
        if not path.is_file():
            raise MissingDatabase(path, "does not exist, or is no ordinary file")
        with path.open("rb") as file:
            return file.read(100)


def _check_head(path: Path) -> int:
    """The version of its schema."""
    head = _head(path)
    size = path.stat().st_size
    if head[: len(MAGIC)] != MAGIC or len(head) < 100:
        raise ForeignDatabase(path, "not an SQLite database")
    if size > MAX_DATABASE_BYTES:
        raise UnreadableDatabase(
            path, f"has {size} bytes, and at most {MAX_DATABASE_BYTES} are read"
        )
    if int.from_bytes(head[68:72]) != APPLICATION_ID:
        raise ForeignDatabase(path, "not a metalgen database")
    version = _version(head)
    if version > SCHEMA_VERSION:
        raise NewerDatabase(path, f"written by a later metalgen (schema {version})")
    if version < OLDEST_READ:
        raise OlderDatabase(path, f"has schema {version}, not {SCHEMA_VERSION}; export it there")
    log = path.with_name(path.name + "-wal")
    if log.exists() and log.stat().st_size:
        raise UnreadableDatabase(
            path, "is in use (it has a write-ahead log); export it as JSON lines instead"
        )
    return version


def schema_version(path: Path) -> int:
    """The version of a database's schema, by its header."""
    return _version(_head(path))


def _version(head: bytes) -> int:
    return int.from_bytes(head[60:64])


def _check_schema(connection: sqlite3.Connection, path: Path, version: int) -> None:
    expected = _schema(version)
    found: dict[str, tuple[str, str, str | None]] = {}
    rows = connection.execute("SELECT name, type, tbl_name, sql FROM sqlite_master LIMIT 100")
    for name, kind, table, sql in rows:
        if not all(isinstance(value, str) for value in (name, kind, table)):
            raise UnreadableDatabase(path, "damaged (its schema is not text)")
        if name in OPTIONAL and kind == "table" and not str(sql).upper().startswith("CREATE VIRT"):
            continue
        if name.startswith("sqlite_autoindex_") and kind == "index" and sql is None:
            continue
        found[name] = (kind, table, sql)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise UnreadableDatabase(path, f"lacks the {expected[name][0]} {name}")
        if name not in expected:
            kind = printable(found[name][0], 120)
            raise ForeignDatabase(path, f"has a {kind} that is not ours: {printable(name, 120)}")
        if found[name] != expected[name]:
            raise ForeignDatabase(
                path, f"its {expected[name][0]} {name} is not as metalgen made it"
            )


@functools.cache
def _schema(version: int) -> dict[str, tuple[str, str, str | None]]:
    """Name, type, table and SQL of everything in a new database of ours of a schema."""
    from sqlite_utils import Database

    from metalgen.database.schema import migrate

    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        migrate(Database(connection, execute_plugins=False), version)
        rows = connection.execute("SELECT name, type, tbl_name, sql FROM sqlite_master").fetchall()
    return {
        name: (kind, table, sql)
        for name, kind, table, sql in rows
        if name not in OPTIONAL and not name.startswith("sqlite_autoindex_")
    }


@functools.cache
def _tables() -> frozenset[str]:
    return frozenset(
        name for name, (kind, _, _) in _schema(SCHEMA_VERSION).items() if kind == "table"
    )


def read_lines(path: Path) -> Iterator[tuple[int, str | None, str]]:
    """The lines of a record file: number, text, and why there is no text.

    Raises:
        DatabaseError: the file cannot be read, or is too large.
    """
    _head(path)
    with explained(path):
        size = path.stat().st_size
    if size > MAX_RECORDS_BYTES:
        raise DatabaseError(path, f"has {size} bytes, and at most {MAX_RECORDS_BYTES} are read")
    with explained(path), path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                yield number, None, f"a line of more than {MAX_LINE_BYTES} bytes"
                return  # where the next one begins is anyone's guess
            try:
                text = line.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                yield number, None, "not UTF-8"
                continue
            if text:
                yield number, text, ""


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object without repeated names, NaN or infinities; raises `ValueError` otherwise."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a name occurs twice")
        return found

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
