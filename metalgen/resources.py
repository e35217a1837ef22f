"""Where metalgen's data files are, however it is installed; standard library only.

A wheel carries ``templates/`` and ``tuning_db/`` inside the package. A checkout, and an editable
install of one, has them beside the package, at the top of the repository.
"""

from __future__ import annotations

import functools
from pathlib import Path

from metalgen.errors import MetalgenError


class MissingResource(MetalgenError, FileNotFoundError):
    """A folder of data files that every installation has is not there."""


def templates_dir() -> Path:
    """The folder of the Jinja templates; raises `MissingResource` if this install has none."""
    return _find("templates")


_added: list[Path] = []


def add_templates(root: Path) -> None:
    """Look for templates in a folder of another package too, after metalgen's own.

    It is laid out as metalgen's: a kind from outside has its files in ``kinds/NAME/``.
    """
    _added.append(root)


def remove_templates(root: Path) -> None:
    """Take back a folder that `add_templates` added."""
    _added.remove(root)


def template_roots() -> tuple[Path, ...]:
    """The folders in which templates are looked for, in this order."""
    return (templates_dir(), *_added)


def tuning_db_dir() -> Path:
    """The folder of the shipped tuning records; raises `MissingResource` likewise."""
    return _find("tuning_db")


@functools.cache
def _find(name: str) -> Path:
    package = Path(__file__).resolve().parent
    # Inside the package first: what lies beside an installed one belongs to someone else.
    places = [package / name]
    if (package.parent / "pyproject.toml").is_file():
        places.append(package.parent / name)
    for place in places:
        if place.is_dir():
            return place
    raise MissingResource(
        f"{name}: expected a folder at {' or '.join(map(str, places))}, but found none; "
        "this installation of metalgen is incomplete, reinstall it"
    )
