"""The source transformation: Metal's spelling into C++ for OpenCL, over preprocessed tokens.

Metal and C++ for OpenCL agree on address spaces, vectors and swizzles. What they spell differently
is rewritten here, rule by rule, and every line stays where it was:

- attributes go; kernels become plain functions, and their parameters are noted; functions that the
  simulator does not execute go;
- explicit instantiations of kernels go, and are noted;
- `threadgroup T x[n];` becomes a reference into the threadgroup's memory;
- vector constructors and casts become calls that convert values (clang would reinterpret bits);
- member functions get the address space of their object that Metal gives them, and `thread` goes
  where C++ for OpenCL wants none (spaces.py);
- a function is a template's argument by reference, not by pointer;
- literals of bfloat become casts, and unsuffixed ones of float get their suffix;
- function constants get their values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from .attributes import remove_attributes
from .constants import function_constants, literal
from .declarations import Declarations
from .errors import TransformError
from .kernels import Declared
from .literals import literals
from .spaces import constant_is_const, merge_constant, this_in_thread, unqualified_thread
from .threadgroup import threadgroup_variables
from .tokens import Tokens
from .vectors import SCALARS, vectors

__all__ = ["DEFAULT", "SCALARS", "Options", "TransformError", "Transformed", "literal", "transform"]


@dataclass(frozen=True)
class Options:
    """Rewritings that few sources need, or that some must do without.

    `thorough`: a cast to a template's type parameter is rewritten too; the type is seldom a vector,
    and the rewritten form takes longer to compile. `merged`: constant memory becomes a part of
    device memory, for C++ for OpenCL cannot copy a whole structure out of constant memory.
    `generic_this`: member functions without an address space take an object in any.
    """

    thorough: bool = False
    merged: bool = False
    generic_this: bool = False


@dataclass
class Transformed(Declared):
    """C++ for OpenCL, line by line the Metal it came from, and what was noted on the way."""

    text: str = ""
    function_constants: dict[str, int] = field(default_factory=dict)


DEFAULT = Options()


def transform(
    text: str,
    constants: Mapping[str | int, object] | None = None,
    options: Options = DEFAULT,
) -> Transformed:
    """Rewrites preprocessed Metal `text`; `constants` gives function constants by name or index.

    Raises TransformError for a malformed kernel declaration, and for `constants` that the source
    does not have or whose values do not fit.
    """
    tokens = Tokens(text)
    declarations = Declarations(tokens)
    indices = function_constants(tokens, constants or {}, declarations.integers)
    found = declarations.read()
    remove_attributes(tokens)
    unqualified_thread(tokens)
    if not options.generic_this:
        this_in_thread(tokens)
    threadgroup_variables(tokens)
    vectors(tokens, options.thorough)
    literals(tokens)
    _functions_by_reference(tokens)
    _coherence(tokens)
    _pragmas(tokens)
    if options.merged:
        merge_constant(tokens)
    else:
        constant_is_const(tokens)
    return Transformed(found.kernels, found.instantiations, found.refused, tokens.text(), indices)


def _functions_by_reference(tokens: Tokens) -> None:
    """`(*F)(` to `(&F)(` in template parameters: clang deduces no address space for a pointer.

    The same for the names of such types; a template's parameter is all that Metal has for them.
    """
    for at in tokens.positions("template", "typedef", "using"):
        if tokens.word(at) == "template" and tokens.word(at + 1) == "<":
            end = tokens.close_angle(at + 1) or 0
        elif tokens.word(at) == "typedef" or (
            tokens.word(at) == "using" and tokens.word(at + 2) == "="
        ):
            end = tokens.statement_end(at)
        else:
            continue
        for i in range(at + 2, end):
            if tokens.word(i) == "*" and tokens.word(i - 1) == "(":
                close = i + 1 + tokens.is_name(i + 1)
                if tokens.word(close) == ")" and tokens.word(close + 1) == "(":
                    tokens.set(i, "&")


def _coherence(tokens: Tokens) -> None:
    """Removes `coherent` and `coherent(scope)` from types: memory is coherent here."""
    for at in tokens.positions("coherent"):
        end = tokens.close(at + 1) if tokens.word(at + 1) == "(" else at
        if tokens.word(end + 1) in ("device", "const", "volatile"):
            tokens.blank(at, end)


_UNROLL = re.compile(r"([ \t]*#[ \t]*pragma[ \t]+(?:clang[ \t]+loop[ \t]+)?unroll)\b(.*)")


def _pragmas(tokens: Tokens) -> None:
    """Removes hints to unroll with an argument that is no number: macros in it are not resolved."""
    for i, text in enumerate(tokens.texts):
        match = _UNROLL.match(text) if "#" in text else None
        if match and re.search(r"[A-Za-z_]\w*", match[2]) and not _is_hint(match[2]):
            tokens.texts[i] = ""


def _is_hint(argument: str) -> bool:
    return re.fullmatch(r"[ \t]*\([ \t]*(full|enable|disable)[ \t]*\)[ \t]*", argument) is not None
