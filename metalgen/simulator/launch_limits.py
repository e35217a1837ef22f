"""What one launch may take: time, memory, processes, stack."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any


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

    Raises ``TypeError`` for an unknown name.
    """
    global _limits
    before = _limits
    _limits = replace(before, **changes)
    try:
        yield _limits
    finally:
        _limits = before
