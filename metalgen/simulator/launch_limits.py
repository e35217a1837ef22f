"""What one launch may take: time, memory, processes, stack."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from metalgen.arguments import as_number, check_integer
from metalgen.errors import ArgumentError

LONGEST = 1e6
"""Seconds of the longest launch: eleven days, which every clock and timer can count."""


@dataclass(frozen=True)
class Limits:
    """What one launch may take. Change it with ``simulator.limits(...)``."""

    seconds: float = 120.0
    """Wall-clock time of one launch."""
    memory_bytes: int = 0
    """Buffers, fibre stacks and the checker's shadow together; 0: half of this machine's memory."""
    processes: int = 0
    """Child processes that one launch may use; 0: one for each core this process may use."""
    stack_bytes: int = 64 * 1024
    """Stack of one GPU thread."""

    def __post_init__(self) -> None:
        seconds = as_number(self.seconds)
        if seconds is None or not 0 < seconds <= LONGEST:
            raise ArgumentError("seconds", "a number above 0, up to a million", self.seconds)
        # As Python's own: children are sent bytes, in which NumPy's would be something else.
        object.__setattr__(self, "seconds", seconds)
        for name, low, high in (
            ("memory_bytes", 0, 1 << 62),
            ("processes", 0, 1 << 16),
            ("stack_bytes", 1, 1 << 40),
        ):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), low, high))

    @property
    def memory(self) -> int:
        return self.memory_bytes or _physical_memory() // 2

    @property
    def workers(self) -> int:
        return self.processes or usable_cores()


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _physical_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_limits = Limits()


def current_limits() -> Limits:
    """Return the limits now in force for every thread of this process."""
    return _limits


@contextlib.contextmanager
def limits(**changes: Any) -> Iterator[Limits]:
    """Change ``Limits`` inside a ``with`` block; the names are the fields of ``Limits``.

    Raises ``TypeError`` for an unknown name, and ``ArgumentError`` for a value that cannot be.
    """
    global _limits
    before = _limits
    _limits = replace(before, **changes)
    try:
        yield _limits
    finally:
        _limits = before
