"""Refuses code in which a vector's bits were silently read as another type.

clang takes `(int4)f4`, for a float4, as a reinterpretation of bits, where Metal converts values.
The source transformation rewrites every such cast that it can see; this check, on the code clang
emits before any optimisation, sees the rest: there, such a cast is a `bitcast` between vectors, and
nothing else makes one (`as_type` goes through memory).
"""

from __future__ import annotations

import re

_BITCAST = re.compile(
    r"= bitcast (<[^>]+>|\S+) \S+ to (<[^>]+>|\S+?),?(?: !dbg !(\d+))?$", re.MULTILINE
)
_LOCATION = r"^!{} = !DILocation\(line: (\d+)"


def find_reinterpretation(code: str) -> tuple[int, str] | None:
    """The first reinterpretation of a vector: its line (0 if unknown) and what it says; or None."""
    for match in _BITCAST.finditer(code):
        source, target, location = match.groups()
        if source == target or "<" not in source + target or "ptr" in (source, target):
            continue
        line = 0
        if location and (found := re.search(_LOCATION.format(location), code, re.MULTILINE)):
            line = int(found.group(1))
        return line, (
            f"a cast from a vector ({source}) to {target} that the simulator would take as a "
            "reinterpretation of bits; construct the vector by its type's own name instead, "
            "such as float4(x), or use as_type to reinterpret"
        )
    return None
