"""docs/api.md names all that metalgen offers, and says the truth of it."""

from __future__ import annotations

import builtins
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import metalgen
from metalgen.problem.config import field_names

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
CALLS = re.findall(r"`(\w+)\(([^`]*)\)`", PAGE)


def test_every_public_name_and_every_field_is_there() -> None:
    assert [n for n in metalgen.__all__ if not re.search(rf"`{n}\b", PAGE)] == []
    assert [name for name in field_names() if f"`{name}`" not in PAGE] == []


@pytest.mark.parametrize("owner", [metalgen.KVCache, metalgen.PagedKVCache, metalgen.Kernel])
def test_every_method_is_there(owner: type) -> None:
    public = [name for name in vars(owner) if not name.startswith("_")]
    assert [name for name in public if not re.search(rf"`{name}\b", PAGE)] == []


@pytest.mark.parametrize(("name", "arguments"), [c for c in CALLS if hasattr(metalgen, c[0])])
def test_a_call_has_the_arguments_that_the_page_gives(name: str, arguments: str) -> None:
    known: Any = inspect.signature(getattr(metalgen, name)).parameters
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {n for n, p in known.items() if p.default is p.empty and p.kind not in many}
    given = dict(re.findall(r"(?<![*.\w])(\w+)(=?)", arguments))
    assert set(given) <= set(known)
    assert {n for n, mark in given.items() if not mark} <= required
    assert required <= set(given) or arguments == "..."
    assert not {n for n, mark in given.items() if mark} & required


@pytest.mark.parametrize(
    ("name", "base"), re.findall(r"^\| `(\w+)` \| `(\w+Error)` \|", PAGE, re.MULTILINE)
)
def test_an_error_is_what_the_page_says(name: str, base: str) -> None:
    error = getattr(metalgen, name)
    assert issubclass(error, metalgen.MetalgenError)
    assert issubclass(error, getattr(builtins, base))
