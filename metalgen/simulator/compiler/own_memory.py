"""Takes the checks off accesses to a thread's own variables, as far as optimisation shows them.

A reference without an address space may refer to any memory, so the instrumented code asks the
runtime about each access through one (mg_read_any and its kin). Once functions are inlined, most
turn out to go to the thread's own variables, of which the runtime counts and checks nothing: the
call only returns the address, but keeps the variable from becoming a register. Only constant
offsets count; an index that is computed may be out of bounds.
"""

from __future__ import annotations

import re

_LARGEST = 1 << 15
"""Bytes from a variable's start up to which an offset is taken; stacks are larger."""
_DEFINITION = re.compile(r"^  (%[\w.]+) = (.*)$")
_OFFSET = re.compile(r"getelementptr (?:inbounds |nuw |nusw )*i8, ptr (%[\w.]+), i64 (\d+)(?:,|$)")
_CHECK = re.compile(
    r"(?:tail )?call ptr @mg_(?:read|write)_(?:any|range)\(ptr (?:[\w()]+ )*(%[\w.]+), .*$"
)


def without_own(code: str) -> str:
    """`code`, optimised, without those checks."""
    own: set[str] = set()
    out = []
    for line in code.split("\n"):
        if line.startswith("define "):
            own = set()
        match = _DEFINITION.match(line) if line.startswith("  %") else None
        if match is not None:
            name, what = match.groups()
            if what.startswith("alloca "):
                own.add(name)
            elif (offset := _OFFSET.match(what)) is not None:
                if offset[1] in own and int(offset[2]) < _LARGEST:
                    own.add(name)
            elif (check := _CHECK.match(what)) is not None and check[1] in own:
                own.add(name)
                line = f"  {name} = getelementptr i8, ptr {check[1]}, i64 0"
        out.append(line)
    return "\n".join(out)
