"""Opening a tuning database with the standard library, and telling what is wrong with it."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path
from urllib.parse import quote

from metalgen.database.errors import (
    ForeignDatabase,
    MissingDatabase,
    NewerDatabase,
    OlderDatabase,
    UnreadableDatabase,
    explained,
    printable,
)
from metalgen.database.layout import APPLICATION_ID, OLDEST_READ, SCHEMA_VERSION


def open_for_reading(path: Path, *, timeout: float = 0.05) -> sqlite3.Connection:
    """A connection that can only read, checked to be a metalgen database that we can read.

    Where no writer has left a write-ahead log, the file is opened as immutable: no locks, no
    shared memory, and a folder that may not be written is no obstacle.

    Args:
        path: the database file.
        timeout: seconds to wait for a lock.

    Raises:
        DatabaseError: missing, unreadable, locked, foreign, of too early or a later schema.
    """
    try:
        return _opened(path, timeout)
    except ForeignDatabase:  # or one that another process made between two looks: look once more
        return _opened(path, timeout)


def _opened(path: Path, timeout: float) -> sqlite3.Connection:
    with explained(path):
        check_name(path)
        if path.is_dir():
            raise UnreadableDatabase(path, "is a folder, not a file")
        if not path.is_file():
            raise MissingDatabase(path, "does not exist yet")
        mode = "mode=ro" if _log_bytes(path) else "mode=ro&immutable=1"
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(path.absolute()))}?{mode}", uri=True, timeout=timeout
        )
        try:
            set_up(connection)
            connection.execute("PRAGMA query_only = ON")
            check_header(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


def check_name(path: Path) -> None:
    """Raise `UnreadableDatabase` for a name that no file can have."""
    if "\0" in str(path):
        raise UnreadableDatabase(printable(path), "no file can have this name")


def set_up(connection: sqlite3.Connection) -> None:
    """Trust nothing in the file: no functions in its schema, and texts that need not be UTF-8.

    Bytes that are not UTF-8 become lone surrogates. These are not printable, so the row that holds
    them is left out, and the others are read.
    """
    connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
    connection.execute("PRAGMA trusted_schema = OFF")


def _log_bytes(path: Path) -> int:
    """Bytes of the write-ahead log; a writer that closes removes it, at any moment."""
    try:
        return path.with_name(path.name + "-wal").stat().st_size
    except FileNotFoundError:
        return 0


def check_header(connection: sqlite3.Connection, path: Path, *, may_migrate: bool = False) -> None:
    """Check that the file is ours and of a schema that we know.

    An empty file, and with `may_migrate` an earlier schema, passes as one to be written to.

    Raises:
        ForeignDatabase, NewerDatabase, OlderDatabase: see there.
        MissingDatabase: the file is empty and may not be written.
        sqlite3.Error: the file cannot be read.
    """
    connection.execute("BEGIN")  # one state of the file, whoever else is making it
    try:
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        empty = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    finally:
        connection.rollback()
    if application != APPLICATION_ID:
        if empty and application == 0 and version == 0:
            if may_migrate:
                return
            raise MissingDatabase(path, "is empty as yet")  # another process is making it
        raise ForeignDatabase(
            path, "not a metalgen database; it is left alone, set METALGEN_DB to another file"
        )
    if version > SCHEMA_VERSION:
        raise NewerDatabase(
            path,
            f"written by a later metalgen (schema {version}, this one knows {SCHEMA_VERSION}); "
            "update metalgen, or set METALGEN_DB to another file",
        )
    if version < OLDEST_READ and not may_migrate:
        raise OlderDatabase(
            path,
            f"has schema {version}, not {SCHEMA_VERSION}; `metalgen tune` brings it up to date",
        )
