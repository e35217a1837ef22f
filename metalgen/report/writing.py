"""Writing a file whole or not at all, and never over someone's own."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from metalgen.errors import ArgumentError


@dataclass(frozen=True)
class Kind:
    """A kind of file: how each begins, what it is called, and the argument that names one."""

    head: bytes
    words: str
    argument: str = "--output"


PAGE = Kind(b"<!doctype html>", "page")
RECORDS = Kind(b'{"batch_heads":', "file of records", "FILE")  # in canonical form


def check_target(path: Path, kind: Kind = PAGE, *, new: bool = False) -> None:
    """Whether a file may be written: a new one or, unless it must be `new`, an earlier one.

    Raises:
        ArgumentError: a folder, a missing folder, someone's file, or none at all, as a device.
    """
    name = kind.argument
    if str(path) == "-":
        raise ArgumentError(name, "the name of a file, not standard output", "-")
    try:
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ArgumentError(name, "a file in a folder that exists", str(path))
        if path.exists():
            if new or not path.is_file():  # a pipe would be waited for
                raise ArgumentError(name, "a new file", str(path))
            with path.open("rb") as file:
                head = file.read(len(kind.head)).lower()
            if head and head != kind.head:
                raise ArgumentError(name, f"a new file, or an earlier {kind.words}", str(path))
    except OSError as error:
        raise ArgumentError(name, f"a file to write ({error.strerror})", str(path)) from error


def write_whole(path: Path, data: bytes, kind: Kind = PAGE) -> None:
    """Write a file, all of it or nothing; raises `ArgumentError` where that cannot be."""
    with replacing(path, kind) as part:
        part.write_bytes(data)


@contextlib.contextmanager
def replacing(path: Path, kind: Kind = PAGE) -> Iterator[Path]:
    """A new file beside `path` that takes its place at the end, unless something was raised."""
    try:
        with tempfile.TemporaryDirectory(prefix=".metalgen-", dir=path.absolute().parent) as place:
            part = Path(place) / path.name
            yield part
            part.replace(path)
    except OSError as error:
        expected = f"a file to write ({error.strerror})"
        raise ArgumentError(kind.argument, expected, str(path)) from error
