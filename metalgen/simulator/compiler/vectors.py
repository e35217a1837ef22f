"""Vectors: constructors and casts convert values, where clang would reinterpret their bits."""

from __future__ import annotations

import re

from .tokens import Tokens

SCALARS = frozenset(
    """bool char uchar short ushort int uint long ulong half float bfloat size_t ptrdiff_t
    int8_t uint8_t int16_t uint16_t int32_t uint32_t int64_t uint64_t""".split()
)
_VECTOR = re.compile(r"(bool|u?char|u?short|u?int|u?long|half|float|bfloat)[234]$")
_BFLOATS = frozenset(("bfloat", "bfloat16_t"))
# After one of these, `(T)x` is a cast and `T(x)` a construction.
_BEFORE_EXPRESSION = frozenset(
    "( , = + - * / % < > ? : ! ~ & | ^ && || == != <= << [ { } ; += -= *= /= "
    "%= &= |= ^= <<= return case else do".split()
)


def mapped(text: str) -> str:
    return re.sub(r"\bvec\b(?= <)", "mapped_vec", text)


def vectors(tokens: Tokens, thorough: bool) -> None:
    aliases = _vector_aliases(tokens)
    if thorough:
        aliases |= {
            tokens.word(i + 1)
            for i in tokens.positions("typename", "class")
            if tokens.word(i + 2) in (",", ">", "=")
        }
    typedef_until = -1
    wanted = {word for word in {*tokens.words} if _VECTOR.match(word)}
    wanted |= {"typedef", "using", "metal", "vec", "static_cast"} | aliases | _BFLOATS
    for at in tokens.positions(*wanted):
        word = tokens.word(at)
        if word in ("typedef", "using") and tokens.word(at - 1) != ">":
            typedef_until = at
            while tokens.word(typedef_until) not in (";", "{", ""):
                typedef_until += 1
        if word == "vec" and tokens.word(at + 1) == "<":
            element = tokens.word(at + 2)
            if element == "bool" or (at < typedef_until and element not in SCALARS):
                tokens.set(at, "mapped_vec")
        end = _vector_type(tokens, at)
        if end is None and word in aliases and tokens.is_name(at):
            end = at
        if end is not None:
            _vector_expression(tokens, at, end)
        elif word == "static_cast" and tokens.word(at + 1) == "<":
            last = (tokens.close_angle(at + 1) or at + 2) - 1
            if not {"*", "&"} & set(tokens.words[at + 2 : last + 1]):
                tokens.set(at, "mg::cast")
        elif (
            word in _BFLOATS
            and tokens.word(at + 1) == "("
            and (tokens.word(at - 1) in _BEFORE_EXPRESSION)
        ):
            tokens.set(at, f"mg::cast<{word}>")


def _vector_aliases(tokens: Tokens) -> set[str]:
    """Names that `using name = V;` or `typedef V name;` give to a vector type V."""
    found: set[str] = set()
    for at in tokens.positions("using", "typedef"):
        if tokens.word(at) == "using" and tokens.word(at + 2) == "=":
            first = at + 4 if tokens.word(at + 3) == "typename" else at + 3
            end = _vector_type(tokens, first)
            if end is not None and tokens.word(end + 1) == ";":
                found.add(tokens.word(at + 1))
        elif tokens.word(at) == "typedef":
            end = _vector_type(tokens, at + 1)
            if end is not None and tokens.word(end + 2) == ";":
                found.add(tokens.word(end + 1))
    return found


def _vector_type(tokens: Tokens, at: int) -> int | None:
    """The last position of the vector type that starts at `at`, or None."""
    if not tokens.is_name(at) or tokens.word(at - 1) in (".", "->"):
        return None
    start = at
    if tokens.word(at) == "metal" and tokens.word(at + 1) == "::":
        at += 2
    elif tokens.word(at - 1) == "::":
        return None
    word = tokens.word(at)
    if word == "vec" and tokens.word(at + 1) == "<":
        return tokens.close_angle(at + 1)
    return at if _VECTOR.match(word) and start <= at else None


def _vector_expression(tokens: Tokens, at: int, end: int) -> None:
    """Rewrites `V(...)`, `(V)x` and `V x(...);`, where at..end spells the vector type V."""
    before, after = tokens.word(at - 1), tokens.word(end + 1)
    spelled = "".join(tokens.texts[tokens.code[i]] + " " for i in range(at, end + 1)).strip()
    if after == "(" and before in _BEFORE_EXPRESSION | {"*"}:
        if before == ">" and tokens.word(at - 2) in SCALARS:
            return
        tokens.blank(at, end)
        tokens.set(at, f"mg::make<{spelled}>")
    elif tokens.is_name(end + 1) and tokens.word(end + 2) == "(":
        close = tokens.close(end + 2)
        if tokens.word(close + 1) == ";" and _are_values(tokens, end + 3, close - 1):
            tokens.prepend(end + 2, f" = mg::make<{spelled}>")
    elif before == "(" and after == ")" and tokens.word(at - 2) in _BEFORE_EXPRESSION:
        operand = end + 2
        if tokens.kinds[operand] in ("name", "number") or tokens.word(operand) in "(-!~*&+":
            tokens.blank(at - 1, end + 1)
            if (
                tokens.word(operand) == "("
                and len(list(tokens.split(operand + 1, tokens.close(operand) - 1))) > 1
            ):
                tokens.set(at - 1, f"mg::make<{spelled}>")
            else:
                tokens.set(at - 1, f"mg::caster<{spelled}>{{}}->*")


def _are_values(tokens: Tokens, first: int, last: int) -> bool:
    """Whether first..last, between parentheses, are values (and not a function's parameters)."""
    if first > last:
        return False
    for start, end in tokens.split(first, last):
        if start == end and (tokens.word(start) in SCALARS or _VECTOR.match(tokens.word(start))):
            return False
        if any(tokens.is_name(i) and tokens.is_name(i + 1) for i in range(start, end)):
            return False
    return True
