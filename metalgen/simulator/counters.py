"""What a kernel did, counted exactly while it ran under the checker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class BufferTraffic:
    """Traffic of one buffer, in bytes summed over all threads.

    ``distinct_read`` and ``distinct_written`` count each byte of the buffer once. ``lines`` counts
    the cache lines that its simdgroup accesses touched (an access is one instruction executed by
    up to 32 lanes together), ``accesses`` those accesses; ``ideal_lines`` is the least number of
    lines that could have carried the same bytes.
    """

    name: str
    read: int = 0
    written: int = 0
    atomic: int = 0
    distinct_read: int = 0
    distinct_written: int = 0
    accesses: int = 0
    lines: int = 0
    ideal_lines: int = 0

    @property
    def coalescing(self) -> float:
        """Least possible lines over touched lines: 1 is perfect, 0 means no access."""
        return self.ideal_lines / self.lines if self.lines else 0.0


@dataclass(frozen=True)
class Counters:
    """Exact counts of one launch, summed over all threads and threadgroups.

    Bytes are those that the source asks for, before any cache. ``multiply_accumulates`` counts
    8x8x8 matrix instructions a simdgroup; ``barriers`` and ``collectives`` count one for each
    simdgroup that takes part. ``bank_conflicts`` counts the extra passes of threadgroup accesses
    whose lanes meet in one bank (32 banks of 4 bytes).
    """

    buffers: tuple[BufferTraffic, ...] = ()
    threadgroup_read: int = 0
    threadgroup_written: int = 0
    threadgroup_memory: int = 0
    multiply_accumulates: int = 0
    exponentials: int = 0
    barriers: int = 0
    simdgroup_barriers: int = 0
    collectives: int = 0
    atomics: int = 0
    threadgroup_accesses: int = 0
    bank_conflicts: int = 0

    @property
    def device_read(self) -> int:
        """Bytes read from all buffers."""
        return sum(buffer.read for buffer in self.buffers)

    @property
    def device_written(self) -> int:
        """Bytes written to all buffers."""
        return sum(buffer.written for buffer in self.buffers)

    def buffer(self, name: str) -> BufferTraffic:
        """Return the traffic of the buffer with this parameter name; ``KeyError`` if none has."""
        for each in self.buffers:
            if each.name == name:
                return each
        raise KeyError(f"no buffer {name!r}; there are {[each.name for each in self.buffers]}")

    def as_dict(self) -> dict[str, Any]:
        """Return plain types for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, int]]:
        """Return (label, value) of everything but the traffic of single buffers."""
        return [
            ("device bytes read", self.device_read),
            ("device bytes written", self.device_written),
            ("threadgroup bytes read", self.threadgroup_read),
            ("threadgroup bytes written", self.threadgroup_written),
            ("threadgroup memory, bytes", self.threadgroup_memory),
            ("8x8x8 multiply-accumulates", self.multiply_accumulates),
            ("exponentials", self.exponentials),
            ("threadgroup barriers", self.barriers),
            ("simdgroup barriers", self.simdgroup_barriers),
            ("collectives", self.collectives),
            ("atomic operations", self.atomics),
            ("threadgroup accesses", self.threadgroup_accesses),
            ("bank conflicts", self.bank_conflicts),
        ]

    def tables(self) -> Sequence[Table]:
        """Return the counts as two rich tables: by buffer, and all else."""
        from rich.table import Table

        traffic = Table(title="Traffic by buffer, bytes")
        traffic.add_column("buffer")
        for column in ("read", "distinct", "written", "distinct", "atomic", "coalescing"):
            traffic.add_column(column, justify="right")
        for each in self.buffers:
            traffic.add_row(
                each.name,
                f"{each.read:,}",
                f"{each.distinct_read:,}",
                f"{each.written:,}",
                f"{each.distinct_written:,}",
                f"{each.atomic:,}",
                f"{each.coalescing:.2f}" if each.lines else "",
            )
        totals = Table(title="Totals", show_header=False)
        totals.add_column("what")
        totals.add_column("count", justify="right")
        for label, value in self.rows():
            totals.add_row(label, f"{value:,}")
        return [traffic, totals]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from self.tables()
