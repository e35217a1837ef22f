"""Integer constant expressions, evaluated: indices of buffers and of function constants."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence

from .tokens import Tokens

_LITERAL = re.compile(r"(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)[uUlL]*$")
_BINARY: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: lambda a, b: abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1),
    ast.Mod: lambda a, b: abs(a) % abs(b) * (1 if a >= 0 else -1),
    ast.LShift: operator.lshift,
    ast.RShift: operator.rshift,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
}
_UNARY: dict[type, Callable[[int], int]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: operator.invert,
}
_OPERATORS = frozenset("+ - * / % << >> > & | ^ ~ ( )".split())
_CASTS = frozenset("int uint long ulong short ushort char uchar size_t".split())
_LARGEST = 1 << 64


def evaluate(words: Sequence[str], names: Mapping[str, int]) -> int | None:
    """The value of an integer expression, given as its tokens; None if it is none that is known.

    It takes literals, `names` (also qualified ones, by their last part), arithmetic, shifts and
    bitwise operators, and casts between integer types, whose ranges are not looked at.
    """
    parts: list[str] = []
    for at, word in enumerate(words):
        literal = _LITERAL.match(word)
        if literal:
            parts.append(str(int(literal[1], 0 if literal[1][:2].lower() in ("0x", "0b") else 10)))
        elif word == "/":
            parts.append("//")
        elif word in _OPERATORS:
            parts.append(word)
        elif word == "::" or words[at + 1 : at + 2] == ["::"] or word in _CASTS:
            continue
        elif word in names:
            parts.append(str(names[word]))
        else:
            return None
    text = " ".join(parts).replace("> >", ">>").replace("( )", "")
    try:
        return _value(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        left, right = _value(node.left), _value(node.right)
        if isinstance(node.op, (ast.LShift, ast.RShift)) and not 0 <= right < 64:
            raise ValueError
        value = _BINARY[type(node.op)](left, right)
        if abs(value) < _LARGEST:
            return value
    raise ValueError


def named_integers(tokens: Tokens) -> dict[str, int]:
    """The integers that the source names: enumerators, and constants with a value of integers."""
    found: dict[str, int] = {}
    for at in tokens.positions("enum", "="):
        if tokens.word(at) == "enum":
            _enumerators(tokens, at, found)
        elif tokens.is_name(at - 1):
            start = at - 1
            while start > 0 and tokens.word(start - 1) not in (";", "{", "}", ")", "(", ","):
                start -= 1
            if not {"const", "constexpr", "constant"} & set(tokens.words[start:at]):
                continue
            end = at + 1
            while end < len(tokens) and tokens.word(end) not in (";", ",", "{"):
                end += 1
            value = evaluate(tokens.words[at + 1 : end], found)
            if value is not None:
                found[tokens.word(at - 1)] = value
    return found


def _enumerators(tokens: Tokens, at: int, found: dict[str, int]) -> None:
    while tokens.word(at) not in ("{", ";", ")", ""):
        at += 1
    if tokens.word(at) != "{":
        return
    following: int | None = 0
    for first, last in tokens.split(at + 1, tokens.close(at) - 1):
        if tokens.word(first + 1) == "=":
            following = evaluate(tokens.words[first + 2 : last + 1], found)
        if following is not None:
            found[tokens.word(first)] = following
            following += 1
