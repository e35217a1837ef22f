"""Defects that a checked run found, with the source lines they stand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from metalgen.plurals import counted

Position = tuple[int, int, int]


@dataclass(frozen=True)
class Access:
    """One access to memory, such as a ``read``, or a place that a thread ``reached``."""

    kind: str
    file: str | None
    line: int | None
    thread: Position
    """Position in the threadgroup."""
    threadgroup: Position
    """Position in the grid of threadgroups."""

    def __str__(self) -> str:
        where = f"line {self.line}" if self.line else "an unknown line"
        return f"{self.kind} at {where} by thread {self.thread} of threadgroup {self.threadgroup}"


@dataclass(frozen=True)
class Finding:
    """One defect, reported once however often it occurred (``count`` times).

    ``access`` is the first occurrence; ``other`` is the access that a race is with. ``offset`` is
    in bytes from the start of ``memory`` (a buffer's parameter name, or ``threadgroup memory``),
    and lies outside of it when the defect is an access out of bounds.
    """

    kind: str
    message: str
    kernel: str
    file: str | None = None
    line: int | None = None
    memory: str | None = None
    offset: int | None = None
    access: Access | None = None
    other: Access | None = None
    count: int = 1

    def as_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        place = self.file or self.kernel
        place += f":{self.line}" if self.line else ""
        times = f" ({self.count:,} times)" if self.count > 1 else ""
        text = f"{place}: {self.kind}: {self.message}{times}"
        if self.access is not None:
            text += f"\n    {self.access}"
        if self.other is not None:
            text += f"\n    {self.other}"
        return text


@dataclass(frozen=True)
class Findings(Sequence[Finding]):
    """The findings of one launch, in order of first occurrence.

    ``sources`` maps a file name as findings give it to its text, for excerpts. ``dropped`` counts
    the distinct defects beyond what a report can hold.
    """

    items: tuple[Finding, ...] = ()
    sources: dict[str, str] = field(default_factory=dict, repr=False, compare=False)
    dropped: int = 0

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.items)

    def kinds(self) -> dict[str, int]:
        """Return how many distinct findings there are of each kind."""
        counts: dict[str, int] = {}
        for finding in self.items:
            counts[finding.kind] = counts.get(finding.kind, 0) + 1
        return counts

    def report(self, context: int = 2, place: Callable[[Finding], str] = lambda _: "") -> str:
        """Return all findings as text, each with ``context`` source lines around its line.

        ``place`` gives a text to put before each.
        """
        if not self.items:
            return "no findings"
        parts = []
        for finding in self.items:
            parts.append(place(finding) + str(finding))
            text = self.sources.get(finding.file or "")
            if text is not None and finding.line:
                parts.append(excerpt(text, finding.line, context))
        if self.dropped:
            more = counted(self.dropped, "more distinct finding")
            parts.append(f"and {more} that the report left out")
        return "\n".join(parts)


def excerpt(text: str, line: int, context: int = 2) -> str:
    """Return the lines around ``line`` (from 1) of ``text``, numbered, with that one marked."""
    lines = text.split("\n")
    first = max(1, line - context)
    last = min(len(lines), line + context)
    width = len(str(last))
    return "\n".join(
        f"  {'>' if number == line else ' '} {number:>{width}} | {lines[number - 1]}"
        for number in range(first, last + 1)
    )
