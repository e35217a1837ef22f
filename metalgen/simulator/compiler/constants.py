"""Function constants: their declarations in the source, and the values that a launch gives them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .attributes import attribute_end
from .errors import TransformError
from .integers import evaluate
from .tokens import Tokens

_RANGES = {
    name: range(-(1 << bits - 1) if signed else 0, 1 << (bits - 1 if signed else bits))
    for names, bits, signed in (
        (("char", "int8_t"), 8, True),
        (("uchar", "uint8_t"), 8, False),
        (("short", "int16_t"), 16, True),
        (("ushort", "uint16_t"), 16, False),
        (("int", "int32_t"), 32, True),
        (("uint", "uint32_t"), 32, False),
        (("long", "int64_t"), 64, True),
        (("ulong", "uint64_t", "size_t"), 64, False),
    )
    for name in names
}
_NOT_A_TYPE = frozenset("const constant constexpr static metal ::".split())


def function_constants(
    tokens: Tokens, constants: Mapping[str | int, object], names: Callable[[], Mapping[str, int]]
) -> dict[str, int]:
    """Gives function constants their values in the text; returns the index of each by name.

    `names`: the integers that the source names, for indices that are expressions. Raises
    TransformError for an index that is not known, a value that its type cannot hold, and a key of
    `constants` that the source does not have.
    """
    found: dict[str, int] = {}
    for at in tokens.positions("function_constant"):
        if tokens.word(at - 2) == "[":
            start = at - 2
            end = attribute_end(tokens, start)
            if end is None or tokens.word(end + 1) != ";":
                continue  # of a kernel's parameter
            name = tokens.word(start - 1)
            found[name] = _index(tokens, at, name, names)
            kind = _type_before(tokens, start - 1)
            given = constants.get(name, constants.get(found[name]))
            tokens.blank(start, end)
            if given is None:
                tokens.append(end, "= {}")
            else:
                tokens.append(end, f"= {_checked(name, kind, given)}")
    for at in tokens.positions("is_function_constant_defined"):
        if tokens.word(at + 1) == "(":
            close = tokens.close(at + 1)
            name = tokens.word(close - 1)
            given = name in constants or found.get(name, -1) in constants
            tokens.blank(at, close)
            tokens.set(at, "true" if given else "false")
    _refuse_unknown(found, constants)
    return found


def _index(tokens: Tokens, at: int, name: str, names: Callable[[], Mapping[str, int]]) -> int:
    words = tokens.words[at + 2 : tokens.close(at + 1)]
    value = evaluate(words, {})
    if value is None:
        value = evaluate(words, names())
    if value is None:
        raise TransformError(
            f"function constant {name!r}: the index {' '.join(words)!r} is no integer expression "
            "that the simulator can evaluate",
            tokens.place(at)[1],
        )
    return value


def _type_before(tokens: Tokens, at: int) -> str:
    words: list[str] = []
    at -= 1
    while at >= 0 and tokens.word(at) not in (";", "}", "{", ""):
        if tokens.word(at) not in _NOT_A_TYPE:
            words.insert(0, tokens.word(at))
        at -= 1
    return " ".join(words)


def _checked(name: str, kind: str, value: Any) -> str:
    """`value` as C++ for a constant of the type `kind`."""
    plain = value.item() if getattr(value, "ndim", None) == 0 else value
    if kind == "bool" and (not isinstance(plain, (int, float)) or plain not in (0, 1)):
        raise TransformError(f"constants[{name!r}]: expected a bool, but got {value!r}")
    if kind in _RANGES:
        whole = isinstance(plain, int) or (isinstance(plain, float) and plain.is_integer())
        if not whole or int(plain) not in _RANGES[kind]:
            raise TransformError(f"constants[{name!r}]: expected {kind}, but got {value!r}")
        plain = int(plain)
    return literal(plain)


def _refuse_unknown(found: Mapping[str, int], constants: Mapping[str | int, object]) -> None:
    for key in constants:
        if key in found or key in found.values():
            continue
        listed = [f"{name} ({index})" for name, index in sorted(found.items(), key=lambda x: x[1])]
        known = ", ".join(listed[:12]) + (", ..." if len(listed) > 12 else "")
        raise TransformError(
            f"constants: the source has no function constant {key!r}; it has {known or 'none'}"
        )


def literal(value: object) -> str:
    """A function constant's value as C++."""
    if getattr(value, "ndim", None) == 0:  # of NumPy, or an array without axes
        value = value.item()  # type: ignore[attr-defined]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        if value != value:
            return '__builtin_nanf("")'
        if value in (float("inf"), float("-inf")):
            return ("-" if value < 0 else "") + "__builtin_inff()"
        return f"(float){value!r}f" if re.search(r"[.e]", repr(value)) else f"{value!r}.0f"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "{" + ", ".join(literal(each) for each in value) + "}"
    return f"{value}"
