"""Which modules of metalgen a module stands on, by the imports that its source states."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

PACKAGE = Path(__file__).parent
UNINVOLVED = frozenset(
    f"metalgen.{name}" for name in ("arguments", "errors", "plurals", "resources", "_version")
)
"""Modules that say what is wrong with arguments, or where files are, and decide no result."""

_IMPORT = re.compile(r"^ *from (metalgen[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
_TEXT_OR_COMMENT = re.compile(r'"""(?:.|\n)*?"""|^ *#[^\n]*\n', re.MULTILINE)


@functools.cache
def modules_behind(start: str) -> tuple[str, ...]:
    """A module and those that it imports, directly or not, by name, sorted.

    Imports inside functions count, and so do those for type checking. `UNINVOLVED` ones do not.
    """
    found: set[str] = set()
    left = [start]
    while left:
        name = left.pop()
        if name in found or name in UNINVOLVED:
            continue
        found.add(name)
        for module, names in _IMPORT.findall(_path(name).read_text(encoding="utf-8")):
            members = (f"{module}.{word}" for word in re.findall(r"\w+", names))
            used = [member for member in members if _path(member).is_file()]
            left += used or [module]
    return tuple(sorted(found))


def code_digest(start: str) -> bytes:
    """A digest of the code of `modules_behind` a module: docstrings and comments do not count."""
    digest = hashlib.sha256()
    for name in modules_behind(start):
        text = _TEXT_OR_COMMENT.sub("", _path(name).read_text(encoding="utf-8"))
        digest.update(f"{name}\0{text}\0".encode())
    return digest.digest()


def _path(name: str) -> Path:
    """The file of a module, which need not exist."""
    path = PACKAGE.joinpath(*name.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
