"""Where in a Python file a line of Metal source was written."""

from __future__ import annotations

from collections.abc import Sequence

SHORTEST = 6
"""Characters of a line that is looked for within others."""


def line_in(file: Sequence[str], program: Sequence[str], line: int) -> int | None:
    """The line of a file that a line of a program stands on.

    Args:
        file: the lines of a Python file with the source of a kernel in a string.
        program: the lines of the whole Metal source, as it was compiled.
        line: one of them, from 1.

    Returns:
        The line of the file, from 1, that reads the same and has the most equal lines around it,
        or else the only one that holds it within (a source in one line); None where there is none
        (an f-string), or where two have as many.
    """
    wanted = program[line - 1].strip()
    if not wanted:
        return None
    places = [
        (_equal_around(file, place, program, line - 1), place + 1)
        for place, text in enumerate(file)
        if text.strip() == wanted
    ]
    if not places:
        within = [place + 1 for place, text in enumerate(file) if wanted in text]
        return within[0] if len(within) == 1 and len(wanted) >= SHORTEST else None
    best = max((equal for equal, _ in places), default=0)
    found = [place for equal, place in places if equal == best]
    return found[0] if len(found) == 1 else None


def _equal_around(file: Sequence[str], place: int, program: Sequence[str], line: int) -> int:
    """How many lines on end are the same, before and after a place."""
    equal = 0
    for step in (-1, 1):
        a, b = place + step, line + step
        while (
            0 <= a < len(file) and 0 <= b < len(program) and file[a].strip() == program[b].strip()
        ):
            equal, a, b = equal + 1, a + step, b + step
    return equal
