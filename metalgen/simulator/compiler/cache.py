"""The compile cache: files named by the hash of what they were made from.

A file is written whole, synced, and then moved to its name, and a note with its digest says so. A
reader takes a file only with a note that fits it: whatever else is there (after a crash, a full
disk, a flipped bit) is as good as nothing, and made anew.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import CacheError
from . import toolchain


def directory() -> Path:
    """Where compiled kernels are kept: $METALGEN_CACHE, or the user's cache directory.

    Raises ``CacheError`` where that cannot be made.
    """
    chosen = os.environ.get("METALGEN_CACHE")
    if chosen:
        base = Path(chosen)
    else:
        import platformdirs

        base = Path(platformdirs.user_cache_dir("metalgen"))
    path = base / "simulator"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(path, error) from None
    return path


def _unusable(path: Path, error: OSError) -> CacheError:
    return CacheError(
        f"compile cache {path}: {error.strerror}; set METALGEN_CACHE to a folder that you may write"
    )


def digest(parts: Iterable[str | bytes]) -> str:
    """A hash of `parts`, in order; the border between two parts counts."""
    state = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)
    return state.hexdigest()[:40]


@functools.lru_cache(maxsize=1)
def own_sources() -> str:
    """A hash of the simulator's own headers, runtime and compiler front."""
    files: list[Path] = []
    for folder in (toolchain.INCLUDE, toolchain.RUNTIME, Path(__file__).parent):
        files += [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix != ".pyc"]
    return digest(part for p in files for part in (p.name, p.read_bytes()))


def _file_digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def keep(made: Path, path: Path) -> str:
    """Moves the file `made` to `path`, at once and lasting; returns its digest.

    Raises ``CacheError`` where nothing can be written.
    """
    try:
        with made.open("rb") as stream:
            os.fsync(stream.fileno())
        digest_ = _file_digest(made)
        os.replace(made, path)
        status = path.stat()
        _known[str(path)] = (digest_, status.st_size, status.st_ctime_ns)
    except OSError as error:
        raise _unusable(path.parent, error) from None
    return digest_


_known: dict[str, tuple[str, int, int]] = {}  # of each file found whole: digest, size, time


def is_whole(path: Path, digest_: str) -> bool:
    """Whether `path` is there, and holds what had this digest when it was kept."""
    try:
        status = path.stat()
        known = (digest_, status.st_size, status.st_ctime_ns)
        if _known.get(str(path)) != known:
            if _file_digest(path) != digest_:
                return False
            _known[str(path)] = known
    except OSError:
        return False
    return True


def is_unchanged(path: Path) -> bool:
    """Whether a file is there, and still whole if it was found so in this process."""
    known = _known.get(str(path))
    return path.exists() if known is None else is_whole(path, known[0])


def touch(path: Path) -> None:
    """Marks a file as used now."""
    with contextlib.suppress(OSError):  # another user's file
        status, known = path.stat(), _known.get(str(path))
        os.utime(path)
        if known is not None and known[1:] == (status.st_size, status.st_ctime_ns):
            _known[str(path)] = (known[0], status.st_size, path.stat().st_ctime_ns)


def write_note(path: Path, note: object) -> None:
    """Writes what JSON can say to `path`, after its digest, at once: a reader finds all or nothing.

    Raises ``CacheError`` where nothing can be written.
    """
    body = json.dumps(note).encode()
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    except OSError as error:
        raise _unusable(path.parent, error) from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(digest([body]).encode() + b"\n" + body)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_note(path: Path) -> Any:
    """What `write_note` wrote to `path`; None where that is missing or damaged."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        return json.loads(body) if head == digest([body]).encode() else None
    except (OSError, ValueError):
        return None
