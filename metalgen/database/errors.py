"""What can be wrong with a tuning database: one exception per cause, each a single clear line.

`explained` is the one place where a failure of SQLite, or of Python while it reads or writes a
file, becomes such an exception. Whatever touches a database file runs inside it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from metalgen.errors import MetalgenError


class DatabaseError(MetalgenError):
    """A tuning database that cannot be used; ``path`` says which, ``reason`` why."""

    def __init__(self, path: Path | str, reason: str) -> None:
        self.path = Path(path)
        self.reason = reason
        super().__init__(f"tuning database {path}: {reason}")

    def __reduce__(self) -> tuple[type, tuple[Path, str]]:
        return type(self), (self.path, self.reason)


class MissingDatabase(DatabaseError):
    """There is no file yet; it comes into being with the first measurement."""


class UnreadableDatabase(DatabaseError):
    """The file cannot be opened, or is damaged."""


class LockedDatabase(DatabaseError):
    """Another process holds the database and did not let go in time."""


class ReadOnlyDatabase(DatabaseError):
    """The file or its folder may not be written."""


class ForeignDatabase(DatabaseError):
    """The file is not a metalgen database, and is left alone."""


class NewerDatabase(DatabaseError):
    """The file was written by a later metalgen, whose schema this one does not know."""


class OlderDatabase(DatabaseError):
    """The file has an earlier schema; the next command that writes to it brings it up to date."""


class FullDisk(DatabaseError):
    """There is no room for another row; what was committed before is safe."""


DAMAGED = "damaged ({}); move it away to start a new one"


@contextlib.contextmanager
def explained(path: Path | str) -> Iterator[None]:
    """Raise `DatabaseError` for every failure of SQLite, or of Python on its behalf, on a file.

    Python has failures of its own on a damaged file: SQLite quotes names from it in its messages,
    and a name that is not UTF-8 raises `UnicodeDecodeError` instead of the error that it is about.
    Errors with a message of ours pass.
    """
    try:
        yield
    except MetalgenError:
        raise
    except sqlite3.IntegrityError as error:
        raise DatabaseError(path, f"a row was refused ({printable(error)})") from error
    except sqlite3.Error as error:
        raise explain_sqlite(path, error) from error
    except (UnicodeError, OverflowError) as error:
        raise UnreadableDatabase(path, DAMAGED.format(printable(error))) from error
    except MemoryError as error:
        raise UnreadableDatabase(path, "needs more memory than there is to be read") from error
    except OSError as error:
        reason = error.strerror or printable(error)
        raise UnreadableDatabase(path, f"cannot be opened ({reason})") from error


def explain_sqlite(path: Path | str, error: sqlite3.Error) -> DatabaseError:
    """The typed error for what SQLite reported (by its primary result code)."""
    code = getattr(error, "sqlite_errorcode", None)
    said = printable(error)
    if code is None:  # raised by the sqlite3 module itself, such as for a closed database
        return UnreadableDatabase(path, f"unreadable ({said})")
    primary = code & 0xFF
    if primary in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return LockedDatabase(path, "locked by another process; try again when it has finished")
    if primary in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
        return ReadOnlyDatabase(path, "read-only; set METALGEN_DB to a file that can be written")
    if primary == sqlite3.SQLITE_FULL:
        return FullDisk(path, "the disk is full; what was measured before is kept")
    if primary == sqlite3.SQLITE_NOTADB:
        return ForeignDatabase(path, "not an SQLite database; set METALGEN_DB to another file")
    if primary == sqlite3.SQLITE_CORRUPT:
        return UnreadableDatabase(path, DAMAGED.format(said))
    if primary == sqlite3.SQLITE_CANTOPEN:
        return UnreadableDatabase(path, "cannot be opened; check that it is a file you may read")
    return UnreadableDatabase(path, f"unreadable ({said})")


def printable(text: object, most: int = 200) -> str:
    """Text from a file or an error, in at most so many characters that a terminal only shows."""
    return "".join(c if c.isprintable() else "?" for c in str(text))[:most]
