"""Literals: of bfloat, which C++ for OpenCL lacks, and of float, which are not double in Metal."""

from __future__ import annotations

import re

from .tokens import Tokens

_BFLOAT = re.compile(r"([\d.]+(?:[eE][+-]?\d+)?)(bf|BF)$")
_UNSUFFIXED = re.compile(
    r"(?:\d+\.\d*|\.\d+)(?:[eE][+-]?\d+)?$|\d+[eE][+-]?\d+$|0[xX][\da-fA-F.]+[pP][+-]?\d+$"
)


def literals(tokens: Tokens) -> None:
    """Writes literals of bfloat as casts, and gives literals without a suffix that of float.

    clang makes a float of `0.5` where doubles are off, but a double of it when it instantiates a
    template.
    """
    for at, kind in enumerate(tokens.kinds):
        if kind != "number":
            continue
        word = tokens.word(at)
        if match := _BFLOAT.match(word):
            digits = match[1]
            whole = digits if "." in digits or "e" in digits.lower() else digits + ".0"
            tokens.set(at, f"((bfloat){whole}f)")
        elif _UNSUFFIXED.match(word):
            tokens.append(at, "f")
