"""Repairs what only the compiler can see that Metal spells otherwise: where types decide.

C++ for OpenCL refuses a few expressions on vectors that Metal takes, and only a compiler's front
end knows the types of an expression. So clang is asked: its diagnostics give the exact ranges of
the operands, and the text there is wrapped in what both languages take.

- A vector with a scalar of higher rank, `half4 * float`: the scalar converts to the element's type
  (`mg::weak`, metal_types).
- A cast between half and bfloat.
- An object whose address space a const member function lost: `thread`, the only one that Metal lets
  a member function without an address space be called with (`mg::in_thread`).
- A list in braces for a vector, where it has too few elements or is a function's argument
  (`mg::braces`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import toolchain

FLAGS = (
    "-fsyntax-only -ferror-limit=0 -fdiagnostics-print-source-range-info -fno-caret-diagnostics"
).split()
_DIAGNOSTIC = re.compile(
    rb"^\S[^:\n]*:(\d+):(\d+):((?:\{\d+:\d+-\d+:\d+\})*):? (?:fatal )?(error|note): (.*)$",
    re.MULTILINE,
)
_RANGE = re.compile(rb"\{(\d+):(\d+)-(\d+):(\d+)\}")
_LINE_MARKER = re.compile(rb"^[ \t]*#(?:line)? *\d+[^\n]*", re.MULTILINE)
_TYPES = re.compile(rb"\('(.*?)'(?: \((.*?)\))? and '(.*?)'(?: \((.*?)\))?\)$")
_CAST = re.compile(rb"(C|functional)-style cast from .* to .* is not allowed")
_GENERIC_THIS = re.compile(
    rb"'this' object is in address space '__generic'"
    rb"|'this' argument (?:to member function '.*' )?has type '(?:const )?__generic"
)
_SWIZZLE = re.compile(rb"\.[xyzwrgba]{2,4}\s*$")
_OPENING = {b"(": b")", b"{": b"}", b"[": b"]"}


@dataclass(frozen=True)
class Diagnostic:
    """One message of clang about `text`: where it points, and the ranges it names, as offsets."""

    kind: str
    message: bytes
    at: int
    ranges: tuple[tuple[int, int], ...]


def without_line_markers(text: str) -> bytes:
    """`text` with its line markers blanked, so that a line number is one of the text."""
    return _LINE_MARKER.sub(b"", text.encode())


def diagnose(text: str, arguments: list[str], folder: Path) -> list[Diagnostic]:
    """What clang, called with `arguments`, says about `text`."""
    data = without_line_markers(text)
    (folder / "diagnosed.cl").write_bytes(data)
    done = toolchain.run([*arguments, *FLAGS, "diagnosed.cl"], folder)
    starts = [0]
    for line in data.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    # Offsets are those of the text with its markers.
    shifts, marked = [0], text.encode().split(b"\n")
    for line in marked:
        shifts.append(shifts[-1] + len(line) + 1)

    def offset(line: bytes, column: bytes) -> int:
        return shifts[int(line) - 1] + int(column) - 1 if int(line) <= len(marked) else -1

    return [
        Diagnostic(
            match[4].decode(),
            match[5],
            offset(match[1], match[2]),
            tuple((offset(r[1], r[2]), offset(r[3], r[4])) for r in _RANGE.finditer(match[3])),
        )
        for match in _DIAGNOSTIC.finditer(done.stderr.encode())
    ]


def repair(text: str, diagnostics: list[Diagnostic]) -> str | None:
    """`text` with what the diagnostics name repaired; None if there is nothing to repair."""
    data = text.encode()
    edits: dict[int, list[bytes]] = {}
    removed: set[int] = set()
    for wrap in set(_wraps(data, diagnostics)):
        first, last, before, after, braces = wrap
        edits.setdefault(first, []).append(before)
        edits.setdefault(last, []).insert(0, after)
        if braces:
            removed |= {first, last}
    if not edits:
        return None
    out, at = [], 0
    for place in sorted(edits):
        out += [data[at:place], *edits[place]]
        at = place + 1 if place in removed else place
    return b"".join([*out, data[at:]]).decode()


_Wrap = tuple[int, int, bytes, bytes, bool]
"""First and last offset, what goes before and after; whether it takes the place of braces."""


def _wraps(data: bytes, diagnostics: list[Diagnostic]) -> Iterator[_Wrap]:
    for at, each in enumerate(diagnostics):
        if each.kind != "error" or each.at < 0:
            continue
        if b"scalar operand type has greater rank" in each.message and len(each.ranges) == 2:
            yield from _weak(data, each)
        elif b"too few elements in vector initialization" in each.message:
            close = _closing(data, each.at)
            if data[each.at : each.at + 1] == b"{" and close is not None:
                yield each.at, close, b"mg::braces(", b")", True
        elif (cast := _CAST.match(each.message)) is not None:
            yield from _cast(data, each, cast[1] == b"C")
        elif _GENERIC_THIS.search(each.message) and each.ranges:
            yield from _in_thread(data, each)
        elif b"no matching" in each.message and b"call to" in each.message:
            notes = []
            for note in diagnostics[at + 1 :]:
                if note.kind == "error":
                    break
                notes.append(note.message)
            if any(b"cannot convert initializer list" in note for note in notes):
                yield from _lists(data, each)
            if any(_GENERIC_THIS.search(note) for note in notes) and each.ranges:
                yield from _in_thread(data, each)


def _weak(data: bytes, error: Diagnostic) -> Iterator[_Wrap]:
    types = _TYPES.search(error.message)
    if types is None:
        return
    vectors = [
        b"vec<" in kind or b"ext_vector_type" in kind or b"vector of" in kind
        for kind in ((types[1] or b"") + (types[2] or b""), types[3] + (types[4] or b""))
    ]
    if vectors == [True, False]:
        left, (first, last) = error.ranges
        between = data[left[1] : first].strip()
        if between.endswith(b"=") and _SWIZZLE.search(data[left[0] : left[1]]):
            target = data[left[0] : left[1]]
            yield first, last, b"mg::element<decltype(+" + target + b")>(", b")", False
            return
    elif vectors == [False, True]:
        first, last = error.ranges[0]
    else:
        return
    if not data[first:last].startswith(b"mg::weak("):
        yield first, last, b"mg::weak(", b")", False


def _cast(data: bytes, error: Diagnostic, c_style: bool) -> Iterator[_Wrap]:
    at = error.at
    if c_style:
        close = _closing(data, at)
        if close is not None:
            yield at, close, b"mg::caster<", b">{}->*", True
        return
    opening = data.find(b"(", at)
    if opening > 0 and not data[at:opening].startswith(b"mg::"):
        yield at, opening, b"mg::cast<", b">", False


def _in_thread(data: bytes, error: Diagnostic) -> Iterator[_Wrap]:
    """The object of a member function's call whose address space a const member function lost."""
    first, last = error.ranges[0]
    callee = data[first:last]
    member = re.search(
        rb"(\.|->)\s*(?:template\s+)?(?:operator\s*\S+|\w+)\s*(?:<.*)?$", callee, re.DOTALL
    )
    if member is None:
        yield first, first, b"mg::in_thread(*this).", b"", False
    elif b"mg::in_thread(" not in callee:
        end = first + member.start()
        if member[1] == b".":
            yield first, end, b"mg::in_thread(", b")", False
        else:
            yield first, end, b"(&mg::in_thread(*", b"))", False


def _lists(data: bytes, error: Diagnostic) -> Iterator[_Wrap]:
    """The arguments in braces of the call that `error` is about."""
    at = error.ranges[0][1] if error.ranges else error.at
    opening = data.find(b"(", at)
    close = _closing(data, opening)
    if opening < 0 or close is None:
        return
    at = opening + 1
    while at < close:
        mark = data[at : at + 1]
        if mark in _OPENING:
            end = _closing(data, at)
            if end is None:
                return
            if mark == b"{" and data[:at].rstrip()[-1:] in (b"(", b","):
                yield at, end, b"mg::braces(", b")", True
            at = end
        at += 1


def _closing(data: bytes, at: int) -> int | None:
    """The bracket that closes the one at `at`; None if none does."""
    closing = _OPENING.get(data[at : at + 1])
    if at < 0 or closing is None:
        return None
    depth = 0
    for match in re.compile(rb'[(){}\[\]]|"(?:[^"\\]|\\.)*"').finditer(data, at):
        if match[0] in _OPENING:
            depth += 1
        elif len(match[0]) == 1:
            depth -= 1
            if depth == 0:
                return match.start() if match[0] == closing else None
    return None
