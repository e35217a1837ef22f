"""Where workers meet: Optuna's storages, by the text that names one.

``postgresql://USER@HOST/DATABASE`` for several machines, ``journal:FILE`` for the processes of one.
A password is never shown: it is cut from every text that leaves this module.
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import unquote

from metalgen.errors import ArgumentError, MetalgenError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage

EXPECTED = "postgresql://USER@HOST/DATABASE, or journal:FILE for the processes of one host"
CONNECT_SECONDS = 10
"""How long a server may take to answer."""
ATTEMPTS = 5
"""Tries to make the tables, which several workers may do at once."""


class StorageError(MetalgenError):
    """A shared storage that cannot be used, or that holds something else than expected.

    Args:
        storage: its URL, masked.
        reason: what is wrong, in one line.
    """

    def __init__(self, storage: str, reason: str) -> None:
        self.storage = storage
        self.reason = reason
        super().__init__(f"storage {storage}: {reason}")


_PASSWORDS = (
    re.compile(r"(?<=://)(?P<before>[^:@/?#]*:)(?P<secret>.*)(?=@)", re.DOTALL),
    # Where the host was forgotten: what follows the colon is no port.
    re.compile(r"(?<=://)(?P<before>[^:@/?#]*:)(?P<secret>(?!\d*(?:[/?#]|$))[^@/?#]*)(?=[/?#]|$)"),
    re.compile(r"(?P<before>password=)(?P<secret>[^&#]*)", re.IGNORECASE),
)


def masked(url: str) -> str:
    """A URL without its password."""
    for pattern in _PASSWORDS:
        url = pattern.sub(r"\g<before>***", url)
    return "".join(c if c.isprintable() else "?" for c in url)


def _secrets(url: str) -> list[str]:
    found = (match["secret"] for pattern in _PASSWORDS for match in pattern.finditer(url))
    return [text for secret in found for text in (secret, unquote(secret)) if text]


def check_url(url: str) -> None:
    """Raise `ArgumentError` for a text that names no kind of storage that workers can share."""
    if not re.match(r"postgres(ql)?(\+psycopg)?://.|journal:.", url, flags=re.DOTALL):
        raise ArgumentError("storage", EXPECTED, masked(url))


def open_storage(url: str) -> BaseStorage:
    """Optuna's storage of a URL; a database's tables or a journal's file are made if need be.

    Raises:
        ArgumentError: no such kind of storage.
        StorageError: it cannot be reached or read, or a package is missing.
    """
    import optuna

    check_url(url)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return _open_journal(url) if url.startswith("journal:") else _open_postgresql(url)


def _open_journal(url: str) -> BaseStorage:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    path = Path(url.removeprefix("journal:").removeprefix("//")).expanduser()
    if path.is_dir():
        raise StorageError(url, "is a folder, not a file")
    with explained(url), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lock = FileLock(path.with_name(path.name + ".lock"))
        return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))  # type: ignore[arg-type]


def _open_postgresql(url: str) -> BaseStorage:
    try:
        import psycopg  # noqa: F401
        import sqlalchemy.exc
    except ImportError as error:
        raise StorageError(
            masked(url), f"needs the package {error.name}: install metalgen[distributed]"
        ) from None
    from optuna.storages import RDBStorage, get_storage

    address = re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", url)
    for attempt in range(1, ATTEMPTS + 1):
        with explained(url), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                database = RDBStorage(
                    address,
                    engine_kwargs={
                        "pool_pre_ping": True,  # a connection that broke meanwhile is renewed
                        "connect_args": {"connect_timeout": CONNECT_SECONDS},
                    },
                )
                return get_storage(database)
            except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
                if attempt == ATTEMPTS:
                    raise
        time.sleep(0.2 * attempt)  # another worker was making the tables
    raise AssertionError("unreachable")


def close_storage(storage: BaseStorage) -> None:
    """Close the connections of a storage, whatever state it is in."""
    with contextlib.suppress(Exception):
        storage.remove_session()
        engine = getattr(getattr(storage, "_backend", None), "engine", None)
        if engine is not None:
            engine.dispose()


@contextlib.contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a storage's libraries raise into a `StorageError` of one line, without secrets."""
    try:
        yield
    except (MetalgenError, AssertionError, TypeError):
        raise
    except Exception as error:
        if not _is_storage_error(error):
            raise
        while error.__cause__ is not None and isinstance(error.__cause__, Exception):
            error = error.__cause__  # what Optuna says of a failed commit is a guess
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        for secret in _secrets(url):
            reason = reason.replace(secret, "***")
        # No cause: a traceback would show the URL with its password.
        raise StorageError(masked(url), masked(reason)[:300]) from None


def _is_storage_error(error: Exception) -> bool:
    import sqlalchemy.exc
    from optuna.exceptions import OptunaError, UpdateFinishedTrialError

    kinds = (OptunaError, sqlalchemy.exc.SQLAlchemyError, OSError, LookupError)
    others = (ValueError, RuntimeError)  # what Optuna raises for tables of another version
    return isinstance(error, kinds + others) and not isinstance(error, UpdateFinishedTrialError)


class FileLock:
    """The lock of a journal file, which the system takes back from a process that was killed.

    Optuna's own locks are files that a killed process leaves behind, and that others break after
    half a minute. With this one a line that was torn when the machine went down is cut off, too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._threads = threading.Lock()
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        """Wait for the lock."""
        import fcntl

        self._threads.acquire()
        try:
            self._file = self.path.open("ab")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            self._mend(self.path.with_name(self.path.name.removesuffix(".lock")))
        except BaseException:
            self.release()
            raise
        return True

    def release(self) -> None:
        """Let the next one write."""
        if self._file is not None:
            self._file.close()
            self._file = None
        self._threads.release()

    @staticmethod
    def _mend(journal: Path) -> None:
        with journal.open("rb+") as file:
            end = file.seek(0, 2)
            if end == 0:
                return
            file.seek(end - 1)
            if file.read(1) == b"\n":
                return
            start = max(0, end - (1 << 20))
            file.seek(start)
            file.truncate(start + file.read().rfind(b"\n") + 1)
