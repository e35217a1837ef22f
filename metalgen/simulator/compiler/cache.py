"""The compile cache: files named by the hash of what they were made from, written atomically."""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

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


def replace(path: Path, data: bytes) -> None:
    """Writes `path` at once: a reader finds the old file, or the whole new one.

    Raises ``CacheError`` where nothing can be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    except OSError as error:
        raise _unusable(path.parent, error) from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
