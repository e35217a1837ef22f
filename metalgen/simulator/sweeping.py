"""The bound of the compile cache: what was used longest ago goes first.

A file's time of change says when it was last used. Sweeping holds the cache's lock alone, using an
entry holds it together with others: what is swept is in nobody's hands, whatever other processes
do. How much was added since the last sweep is the length of a file, so that many short processes
keep the bound as well as a long one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from metalgen.errors import ArgumentError
from metalgen.simulator.compiler import build, cache, toolchain
from metalgen.simulator.errors import CacheError

if TYPE_CHECKING:
    from metalgen.simulator.compiler import CompiledKernel

VARIABLE = "METALGEN_CACHE_LIMIT"
"""Environment variable: MiB that compiled kernels may take together."""
LIMIT = 2048
"""MiB, where that is not set."""
LEFT = 0.75
"""Share of the limit that a sweep leaves."""
SHARE = 1 / 16
"""Share of the limit that may be added between two sweeps."""
SAFE_SECONDS = 600.0
"""What was used since then stays, whatever the limit: its user may not have loaded it yet."""
OLD_SECONDS = 86400.0
"""What other sources' kernels need (headers, runtime), and what killed processes left, stays so
long."""
ATTEMPTS = 3
"""Times that a kernel is compiled, should others remove it at once."""
PATIENCE = 5.0
"""Seconds that an entry's user waits for a sweep; one that takes longer was stopped, not killed."""
LOCK, ADDED = "sweep.lock", "sweep.added"


@dataclass
class _Entry:
    """The files of one kernel, or one folder that a compilation left."""

    used: float = 0.0
    size: int = 0
    files: list[Path] = field(default_factory=list)


def limit() -> int:
    """Bytes that the cache may take.

    Raises:
        ArgumentError: METALGEN_CACHE_LIMIT is not a whole number from 1.
    """
    text = os.environ.get(VARIABLE, "")
    if not text:
        return LIMIT << 20
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentError(VARIABLE, "a whole number of MiB, 1 or more", text)
    return int(text) << 20


def kept(compile_it: Callable[[], CompiledKernel]) -> CompiledKernel:
    """What `compile_it` finds or makes, safe from sweeps for a while; sweeps where that is due.

    Raises:
        CacheError: what is made cannot be written.
    """
    most, begun = limit(), time.time()
    for _ in range(ATTEMPTS):
        with _named():
            compiled = compile_it()
        with contextlib.suppress(OSError):
            status = compiled.path.stat()
            if status.st_mtime >= begun and _count(status.st_size) > most * SHARE:
                sweep(most)
        if use(compiled.path):
            break
    return compiled


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """Say of an error in the cache's folder which folder that is."""
    try:
        yield
    except OSError as error:
        folder = cache.directory()
        if isinstance(error, CacheError) or not str(error.filename).startswith(str(folder)):
            raise
        raise cache._unusable(folder, error) from None


def use(path: Path) -> bool:
    """Mark an entry as used now; whether it is there, and so will be for `SAFE_SECONDS`."""
    with _lock(path.parent, exclusive=False):
        if not cache.is_unchanged(path):
            return False
        cache.touch(path)
        return True


def sweep(most: int) -> bool:
    """Remove what was used longest ago until three quarters of `most` bytes are left.

    Returns whether it did: not while another process sweeps, or where the cache cannot be written.
    """
    folder = cache.directory()
    with _lock(folder, exclusive=True) as held:
        if not held:
            return False
        now = time.time()
        entries = _entries(folder, now)
        total = sum(entry.size for entry in entries)
        for entry in sorted(entries, key=lambda e: e.used):
            abandoned = entry.files[0].is_dir()
            if total <= most * LEFT and not abandoned:
                continue
            if now - entry.used <= SAFE_SECONDS:
                continue
            for file in sorted(entry.files, key=lambda f: f.suffix != ".json"):  # the note first
                _remove(file)
            total -= entry.size
        with contextlib.suppress(OSError):
            (folder / ADDED).write_bytes(b"")
    return True


def _entries(folder: Path, now: float) -> list[_Entry]:
    """What may go, by its name up to the first dot."""
    own = {build._key(mode, toolchain.machine_flags()) for mode in build.MODES}
    found: dict[str, _Entry] = {}
    for file in os.scandir(folder):
        try:
            status = file.stat(follow_symlinks=False)
        except OSError:  # gone meanwhile
            continue
        stem = file.name.partition(".")[0]
        needed = stem.startswith(("headers-", "runtime-"))
        lasting = needed or file.is_dir(follow_symlinks=False)
        if file.name in (LOCK, ADDED) or stem.rpartition("-")[2] in own:
            continue
        if lasting and now - status.st_mtime <= OLD_SECONDS:
            continue
        entry = found.setdefault(stem, _Entry())
        entry.used = max(entry.used, status.st_mtime)
        entry.size += status.st_blocks * 512
        entry.files.append(Path(file.path))
    return list(found.values())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink()


def _count(size: int) -> float:
    """Note that so many bytes were added; all that were since the last sweep, if one is known."""
    path = cache.directory() / ADDED
    known = path.exists()
    with path.open("ab") as file:
        file.write(b"." * max(1, size >> 10))
        return file.tell() * 1024 if known else float("inf")


def _take(file: int, how: int, patience: float) -> None:
    """Take a lock within so many seconds. Raises OSError where another keeps it for longer."""
    import fcntl

    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() >= until:
                raise
        time.sleep(0.005)


@contextlib.contextmanager
def _lock(folder: Path, *, exclusive: bool) -> Iterator[bool]:
    """Hold the lock of a cache; alone only if nobody else has it, which is what is yielded."""
    import fcntl

    try:
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # a cache that can only be read is swept by nobody
        yield False
        return
    try:
        try:
            _take(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, 0 if exclusive else PATIENCE)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(file)
