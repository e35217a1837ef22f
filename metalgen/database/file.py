"""The file of a tuning database that is open for writing, in SQLite's write-ahead mode.

A run lasts hours, and its file may be removed or replaced meanwhile. SQLite does not notice: what
is committed then goes to a file that has no name any more, and is lost. `DatabaseFile` looks at
each commit and when it is closed. It remembers what it was told to remember, and where the file is
no longer the one that was opened, makes those changes again in the one that is there, or in a new
one, and says so in `notices`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from sqlite_utils import Database

from metalgen.database.connect import check_header, check_name, open_for_reading, set_up
from metalgen.database.errors import (
    DatabaseError,
    LockedDatabase,
    ReadOnlyDatabase,
    UnreadableDatabase,
    explain_sqlite,
    explained,
)
from metalgen.database.layout import user_database
from metalgen.database.schema import migrate
from metalgen.plurals import counted

BUSY_SECONDS = 30.0
"""How long a write waits for another process before the database counts as locked."""

Identity = tuple[int, int]
"""Device and inode of a file."""


class DatabaseFile:
    """An open database file, its transactions, and what has to be kept if the file goes away.

    Attributes:
        db: the connection; another one after the file was replaced.
        path: the file.
        notices: sentences about files that were removed or replaced while they were open.
    """

    def __init__(
        self, db: Database, path: Path, *, read_only: bool = False, busy: float = BUSY_SECONDS
    ) -> None:
        self.db = db
        self.path = path
        self.notices: list[str] = []
        self._busy = busy
        self._follows = not read_only
        self._wrote = False
        self._changes: list[Callable[[], object]] = []
        self._identity = _identity(path)
        self._log = _identity(_beside(path, "-wal"))

    @classmethod
    def open(
        cls, path: Path | str | None = None, *, read_only: bool = False, busy: float = BUSY_SECONDS
    ) -> Self:
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
            return cls(Database(connection, execute_plugins=False), path, read_only=True)
        return cls(_open_for_writing(path, busy), path, busy=busy)

    def close(self) -> None:
        """Close the file; the last process to do so folds the write-ahead log in.

        Raises:
            DatabaseError: the file was removed or replaced since the last commit, and what was
                written could not be written anew.
        """
        try:
            if self._wrote:
                self._follow()
        finally:
            self._follows = False
            self.db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        failed = exc[0] is not None
        with contextlib.suppress(*([DatabaseError] if failed else [])):
            self.close()  # what ended the run is heard about, not what came of it

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """A transaction that takes the write lock at once, so that it can wait for it."""
        self._follow()
        with explained(self.path):
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.db.execute("COMMIT")
                self._wrote = True
            except BaseException:
                self.db.rollback()
                raise

    def insert(self, table: str, row: dict[str, Any], ending: str = "") -> sqlite3.Cursor:
        """Insert a row, within a transaction; `ending` follows, such as ``ON CONFLICT ...``."""
        marks = ", ".join("?" for _ in row)
        return self.db.execute(
            f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks}) {ending}", list(row.values())
        )

    def id_of(self, table: str, row: dict[str, Any]) -> int:
        """The id of a problem or schedule, which is entered if it is new."""
        found = self.db.execute(f"SELECT id FROM {table} WHERE key = ?", [row["key"]]).fetchone()
        number = found[0] if found else self.insert(table, row).lastrowid
        assert isinstance(number, int)
        return number

    def remember(self, change: Callable[[], object]) -> None:
        """Note a change that was committed, to be made again if the file is removed or replaced.

        `change` commits it to this store, and remembers it again.
        """
        self._changes.append(change)

    def _follow(self) -> None:
        """Where the file is no longer the one that was opened, go on with the one that is there."""
        now = _identity(self.path)
        if not self._follows or (now == self._identity and not _is_empty(self.path)):
            return
        first = self.path
        happened = f"was {'replaced' if now else 'removed'} while it was in use"
        if self._wrote and not self._changes:
            self._follows = False
            raise DatabaseError(first, f"{happened}; what was written to it is lost: do it again")
        self._leave()
        try:
            self.db = _open_for_writing(first, self._busy)
        except DatabaseError:  # what is there now is not ours: it is left alone
            self.path = _free_name(first)
            self.db = _open_for_writing(self.path, self._busy)
        self._identity = _identity(self.path)
        self._log = _identity(_beside(self.path, "-wal"))
        changes, self._changes = self._changes, []
        try:
            for change in changes:
                change()
        except BaseException:
            self._changes = changes
            raise
        if changes:
            commits = f"{counted(len(changes), 'commit')} of this run"
            were = "was" if len(changes) == 1 else "were"
            place = "" if self.path == first else f" to {self.path}"
            self.notices.append(f"{first} {happened}; {commits} {were} written again{place}.")

    def _leave(self) -> None:
        """Close what was open, and remove its log, with which no other file may be read."""
        log = _beside(self.path, "-wal")
        # By its inode, because the log next to a new file may be that file's own.
        if _identity(self.path) is None or _identity(log) == self._log:
            for name in (log, _beside(self.path, "-shm")):
                with contextlib.suppress(OSError):
                    name.unlink()
        if _is_empty(self.path):
            with contextlib.suppress(OSError):
                self.path.unlink()
        self.db.close()


def _open_for_writing(path: Path, busy: float) -> Database:
    with explained(path):
        check_name(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnreadableDatabase(
                path, f"its folder cannot be made ({error.strerror})"
            ) from error
        if path.is_dir():
            raise UnreadableDatabase(path, "is a folder, not a file")
        if path.exists() and not path.is_file():
            raise UnreadableDatabase(path, "is not an ordinary file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ReadOnlyDatabase(path, "read-only; set METALGEN_DB to a file you can write")
        connection = sqlite3.connect(path, timeout=busy)
        try:
            set_up(connection)
            check_header(connection, path, may_migrate=True)
            _write_ahead(connection, busy)
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA foreign_keys = ON")
            db = Database(connection, execute_plugins=False)
            migrate(db)
        except BaseException:
            connection.close()
            raise
        return db


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


def _identity(path: Path) -> Identity | None:
    """What tells a file from another one of the same name; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_empty(path: Path) -> bool:
    """Whether a file has no bytes, which no database of ours has once it was opened."""
    try:
        return path.stat().st_size == 0
    except OSError:
        return False


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.name + end)


def _free_name(path: Path) -> Path:
    """A name that nothing has yet, next to a file: ``tuning-kept.db``, ``tuning-kept-2.db``."""
    for number in range(1, 1000):
        again = f"-{number}" if number > 1 else ""
        name = path.with_name(f"{path.stem}-kept{again}{path.suffix}")
        if not os.path.lexists(name):
            return name
    raise UnreadableDatabase(path, "was replaced by something else, and so were its copies")
