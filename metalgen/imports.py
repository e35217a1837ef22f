"""Which modules a module stands on, by the imports that its source states."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = __name__.partition(".")[0]
UNINVOLVED = frozenset(
    f"{ROOT}.{name}" for name in ("arguments", "errors", "plurals", "resources", "_version")
)
"""Modules that say what is wrong with arguments, or where files are, and decide no result."""

_IMPORT = re.compile(
    r"^ *(?:from ([\w.]+) import (\([^)]*\)|[^\n]*)|import (\w[\w.]*))", re.MULTILINE
)
_TEXT_OR_COMMENT = re.compile(r'"""(?:.|\n)*?"""|^ *#[^\n]*\n', re.MULTILINE)


class _Module(NamedTuple):
    """A module's code, without docstrings and comments, and what it imports from where."""

    code: str
    imports: tuple[tuple[str, tuple[str, ...]], ...]
    is_package: bool


def modules_behind(
    starts: Collection[str],
    registries: Collection[str] = (),
    entries: Collection[str] = (),
) -> tuple[str, ...]:
    """Modules and those that they import, directly or not, by name, sorted.

    Imports inside functions count, and so do those for type checking. What a package's
    ``__init__`` passes on is looked for where it is defined. Of metalgen, and of the packages that
    the starts belong to; `UNINVOLVED` modules do not count.

    Args:
        starts: names of modules.
        registries: modules that import entries only to list them.
        entries: modules that a registry's import does not reach; another import may, and each may
            be a start.
    """
    packages = frozenset({ROOT, *(name.partition(".")[0] for name in starts)})
    found: set[str] = set()
    left = [*starts]
    while left:
        name = left.pop()
        if name in found or name in UNINVOLVED or name.partition(".")[0] not in packages:
            continue
        module = _read(name)
        if module is None:
            continue
        found.add(name)
        used = (each for source, names in module.imports for each in _defining(source, names))
        left += (each for each in used if name not in registries or each not in entries)
    return tuple(sorted(found))


def code_digest(names: Collection[str]) -> bytes:
    """A digest of the code of modules: docstrings and comments do not count.

    A module without a file, such as a notebook's, counts by its name.
    """
    digest = hashlib.sha256()
    for name in names:
        module = _read(name)
        digest.update(f"{name}\0{module.code if module else ''}\0".encode())
    return digest.digest()


def _defining(source: str, names: tuple[str, ...]) -> Iterator[str]:
    """The modules that define what is imported from a module, which may only pass it on."""
    if not names:
        yield source
    for name in names:
        member = f"{source}.{name}"
        if _path(member) is not None:
            yield member
            continue
        module = _read(source)
        inner = module.imports if module and module.is_package else ()
        origin = next((other for other, passed_on in inner if name in passed_on), None)
        if origin is None or origin == source:
            yield source
        else:
            yield from _defining(origin, (name,))


@functools.cache
def _read(name: str) -> _Module | None:
    path = _path(name)
    if path is None:
        return None
    text = path.read_text(encoding="utf-8")
    is_package = path.name == "__init__.py"
    imports = []
    for source, names, plain in _IMPORT.findall(text):
        bound = re.sub(r"#[^\n]*|\bas +\w+", "", names)
        words = tuple(re.findall(r"\w+", bound))
        if (plain or source) != ROOT or words:  # the package itself is read name by name
            imports.append((plain or _absolute(source, name, is_package), words))
    return _Module(_TEXT_OR_COMMENT.sub("", text), tuple(imports), is_package)


def _absolute(source: str, name: str, is_package: bool) -> str:
    """The name of a module that another one names, perhaps by dots."""
    inner = source.lstrip(".")
    above = len(source) - len(inner) - is_package
    if source == inner:
        return source
    parts = name.split(".")
    return ".".join([*parts[: len(parts) - above], *([inner] if inner else [])])


@functools.cache
def _path(name: str) -> Path | None:
    """The file of a module; None if it has none, or there is no such module."""
    root, _, rest = name.partition(".")
    top = sys.modules.get(root)
    folder = getattr(top, "__path__", None)
    if folder is None:
        file = getattr(top, "__file__", None) if not rest else None
        return Path(file) if file else None
    path = Path(next(iter(folder))).joinpath(*rest.split(".")) if rest else Path(next(iter(folder)))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return path if path.is_file() else None
