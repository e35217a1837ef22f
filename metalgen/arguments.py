"""Numbers that users pass, of Python, NumPy or another library, as Python's own.

What is kept has one spelling, so keys, hashes and JSON do not depend on where a number came from.
"""

from __future__ import annotations

import operator
from numbers import Real

import mlx.core as mx

from metalgen.errors import ArgumentError


def as_integer(value: object) -> int | None:
    """The integer that a value is, by its ``__index__``, or None where it is none.

    Neither a bool, nor an MLX array: to look into one waits for the GPU, so that is for the user.
    """
    if type(value) is int:
        return value
    if isinstance(value, (bool, mx.array)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def as_number(value: object) -> float | None:
    """The float that a real number is, infinite and nan too, or None where it is none.

    What `as_integer` takes is a number, too, and so is an array of NumPy's without axes.
    """
    if type(value) is float:
        return value
    number: object = as_integer(value)
    if number is None:
        number = value
    if getattr(number, "ndim", None) == 0 and not isinstance(number, mx.array):
        number = number.item()  # type: ignore[attr-defined]
    if isinstance(number, bool) or not isinstance(number, Real):
        return None
    try:
        return float(number)
    except OverflowError:  # of an integer or a fraction
        return None


def check_integer(name: str, value: object, low: int, high: int) -> int:
    """The integer that a value is; raises `ArgumentError` unless it is from `low` to `high`."""
    number = as_integer(value)
    if number is None or not low <= number <= high:
        raise ArgumentError(name, f"an integer from {low} to {high}", value)
    return number


def check_positive(name: str, value: object) -> int:
    """The integer that a value is; raises `ArgumentError` unless it is 1 or more."""
    number = as_integer(value)
    if number is None or number < 1:
        raise ArgumentError(name, "a positive integer", value)
    return number
