"""The buffers of a launch in shared memory, laid out by the caller and mapped by the child."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

from metalgen.simulator import errors
from metalgen.simulator.launch_limits import current_limits

WRITABLE, INITIALISED = 1, 2
REPORT_HEADER = 64
"""Bytes before the runtime's own report: finished threadgroups, address of the mapping."""


@dataclass(frozen=True)
class Segment:
    """One Metal buffer: ``size`` bytes, of which ``lead`` lie before the address it is bound at."""

    name: str
    size: int
    writable: bool = False
    initialised: bool = True
    lead: int = 0

    @property
    def flags(self) -> int:
        return (WRITABLE if self.writable else 0) | (INITIALISED if self.initialised else 0)


def _pages(size: int) -> int:
    return max(mmap.PAGESIZE, -(-size // mmap.PAGESIZE) * mmap.PAGESIZE)


class LaunchMemory:
    """The buffers of one launch and a report for each process, in one anonymous shared file.

    Raises ``MemoryLimit`` when the launch would need more than ``limits.memory``.
    """

    def __init__(self, segments: Sequence[Segment], report_bytes: int, reports: int = 1) -> None:
        self.segments = tuple(segments)
        self.report_bytes = report_bytes + REPORT_HEADER
        sizes = [segment.size for segment in segments] + [self.report_bytes] * reports
        self.offsets: list[int] = []
        total = 0
        for size in sizes:
            self.offsets.append(total)
            total += _pages(size)
        allowed = current_limits().memory
        if total > allowed:
            largest = max(self.segments, key=lambda segment: segment.size)
            raise errors.MemoryLimit(
                f"the launch needs {total:,} bytes of buffers (the largest is {largest.name!r} "
                f"with {largest.size:,}), and the simulator may take {allowed:,}; "
                "simulator.limits(memory_bytes=...) raises that"
            )
        self.total = total
        self.fd = _anonymous_file(total)
        try:
            self._map = mmap.mmap(self.fd, total)
        except BaseException:
            os.close(self.fd)
            raise

    def view(self, index: int) -> memoryview:
        """Return the bytes of buffer ``index``."""
        offset = self.offsets[index]
        return memoryview(self._map)[offset : offset + self.segments[index].size]

    def report(self, index: int) -> bytes:
        """Return a copy of the whole report of process ``index``, header included."""
        offset = self.offsets[len(self.segments) + index]
        return self._map[offset : offset + self.report_bytes]

    def table(self, report: int) -> list[tuple[int, int, int, int]]:
        """Return (file offset, bytes, lead, flags) of each buffer, then of the report."""
        rows = [
            (offset, segment.size, segment.lead, segment.flags)
            for offset, segment in zip(self.offsets, self.segments, strict=False)
        ]
        rows.append((self.offsets[len(self.segments) + report], self.report_bytes, 0, WRITABLE))
        return rows

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            with contextlib.suppress(BufferError):  # a caller may still hold a view
                self._map.close()

    def __enter__(self) -> LaunchMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("metalgen-launch", os.MFD_CLOEXEC)
    else:  # macOS
        fd, path = tempfile.mkstemp(prefix="metalgen-launch-")
        os.unlink(path)
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        os.close(fd)
        raise errors.MemoryLimit(f"cannot reserve {size:,} bytes for a launch: {error}") from error
    return fd
