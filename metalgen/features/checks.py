"""Checks of the fields of a config: each returns a value's canonical form, or raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from metalgen.arguments import as_integer, check_integer
from metalgen.errors import ArgumentError
from metalgen.features.fields import Fields

Check = Callable[[str, Any, Fields], Any]
"""``check(name, value, config)``: the canonical value of a field; raises `ArgumentError`."""


def switch(name: str, value: Any, config: Fields) -> bool:
    """True or False, and nothing that merely equals them."""
    if not isinstance(value, bool):
        raise ArgumentError(name, "True or False", value)
    return value


def integer(low: int, high: int) -> Check:
    """The check of an integer from `low` to `high`, or None."""

    def check(name: str, value: Any, config: Fields) -> int | None:
        return None if value is None else check_integer(name, value, low, high)

    return check


def one_of(name: str, value: object, choices: tuple[object, ...]) -> Any:
    """The choice that a value is; 1 is not True."""
    number = as_integer(value)
    found = value if number is None else number
    if not any(type(found) is type(choice) and found == choice for choice in choices):
        raise ArgumentError(name, f"one of {', '.join(map(str, choices))}", value)
    return found
