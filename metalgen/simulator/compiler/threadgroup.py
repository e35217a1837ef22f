"""Variables in threadgroup memory: references into the memory that the runtime gives out."""

from __future__ import annotations

from .tokens import Tokens
from .vectors import mapped


def threadgroup_variables(tokens: Tokens) -> None:
    """`threadgroup T x[n], y;` into references to the threadgroup's memory."""
    count = 0
    for at in tokens.positions("threadgroup"):
        start = at
        while tokens.word(start - 1) in ("static", "const", "volatile"):
            start -= 1
        if (
            tokens.word(start - 1) == ")"
            and tokens.word(tokens.opening(start - 1) - 1) == "alignas"
        ):
            start = tokens.opening(start - 1) - 1
        if tokens.word(start - 1) not in (";", "{", "}"):
            continue
        i = at + 1
        while tokens.is_name(i) or tokens.word(i) in ("::", "<"):
            if tokens.word(i) == "<":
                end = tokens.close_angle(i)
                if end is None:
                    break
                i = end
            elif tokens.word(i) == "alignas":
                i = tokens.close(i + 1)
            i += 1
        if tokens.word(i) not in ("[", ";", ",") or not tokens.is_name(i - 1):
            continue
        kind = tokens.source(at + 1, i - 2)
        end = i
        while tokens.word(end) != ";":
            end = tokens.close(end) if tokens.word(end) in ("(", "[", "{") else end
            end += 1
        declarations = []
        for first, last in tokens.split(i - 1, end - 1):
            name = tokens.word(first)
            if "=" in tokens.words[first : last + 1]:  # Metal ignores the initial value
                last = tokens.words.index("=", first) - 1
            extent = mapped(tokens.source(first + 1, last)) if last > first else ""
            declarations.append(
                f"typedef {mapped(kind)} mg_type_{name}{extent}; __local mg_type_{name}& {name} = "
                f"*(__local mg_type_{name}*)mg_threadgroup_variable({count}, "
                f"sizeof(mg_type_{name}), alignof(mg_type_{name}))"
            )
            count += 1
        tokens.blank(start, end - 1)
        tokens.set(start, "; ".join(declarations))
