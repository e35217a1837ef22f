"""Writing a file whole or not at all, and never over someone's own."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from metalgen.errors import ArgumentError

HEAD = b"<!doctype html>"
"""How every page begins."""


def check_target(path: Path, *, new: bool = False) -> None:
    """Whether a file may be written: a new one or, unless it must be `new`, an earlier page.

    Raises:
        ArgumentError: a folder, a missing folder, or someone's file.
    """
    try:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ArgumentError("--output", "a file in a folder that exists", str(path))
        if path.exists():
            if new or not path.is_file():  # a pipe would be waited for
                raise ArgumentError("--output", "a new file", str(path))
            with path.open("rb") as file:
                head = file.read(len(HEAD)).lower()
            if head and head != HEAD:
                raise ArgumentError("--output", "a new file, or an earlier page", str(path))
    except OSError as error:
        raise ArgumentError("--output", f"a file to write ({error.strerror})", str(path)) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, all of it or nothing; raises `ArgumentError` where that cannot be."""
    with replacing(path) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file beside `path` that takes its place at the end, unless something was raised."""
    try:
        with tempfile.TemporaryDirectory(prefix=".metalgen-", dir=path.absolute().parent) as place:
            part = Path(place) / path.name
            yield part
            part.replace(path)
    except OSError as error:
        raise ArgumentError("--output", f"a file to write ({error.strerror})", str(path)) from error
