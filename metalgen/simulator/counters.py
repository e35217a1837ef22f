"""What a kernel did, counted exactly while it ran under the checker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class BufferTraffic:
    """Traffic of one buffer, summed over all threads.

    Bytes are those that the source asks for, before any cache; the ``distinct`` ones count each
    byte of the buffer once. ``reads``, ``writes`` and ``atomics`` count accesses of one thread;
    ``simdgroup_accesses`` counts an instruction that up to 32 lanes execute together once, and
    ``lines`` the 128-byte cache lines that those touch.
    """

    name: str
    bytes_read: int = 0
    bytes_written: int = 0
    distinct_read: int = 0
    distinct_written: int = 0
    reads: int = 0
    writes: int = 0
    atomics: int = 0
    simdgroup_accesses: int = 0
    lines: int = 0

    @property
    def lines_per_access(self) -> float:
        """Mean number of cache lines that a simdgroup-wide access touches; less is better."""
        return self.lines / self.simdgroup_accesses if self.simdgroup_accesses else 0.0


@dataclass(frozen=True)
class Counters:
    """Exact counts of one launch, summed over all threads and threadgroups.

    ``multiply_accumulates`` counts 8x8x8 matrix products, and ``shuffles``, ``reductions``,
    ``ballots``, ``barriers`` and ``simdgroup_barriers`` count one for each simdgroup that takes
    part; ``exponentials`` (exp, exp2, exp10) one for each thread; ``threadgroup_barriers`` one
    for each threadgroup. ``bank_conflicts`` counts the extra passes that simdgroup-wide accesses
    to threadgroup memory need because lanes meet in one of 32 banks of 4 bytes.
    ``patterns_dropped`` counts accesses that could not be matched with those of the other lanes
    (more than 4,096 of a thread between two meetings of its simdgroup); where it is 0, cache lines
    and bank conflicts are complete.
    """

    buffers: tuple[BufferTraffic, ...] = ()
    threadgroup: BufferTraffic = BufferTraffic("threadgroup memory")
    threadgroup_memory: int = 0
    multiply_accumulates: int = 0
    exponentials: int = 0
    barriers: int = 0
    threadgroup_barriers: int = 0
    simdgroup_barriers: int = 0
    shuffles: int = 0
    reductions: int = 0
    ballots: int = 0
    threadgroup_accesses: int = 0
    bank_conflicts: int = 0
    patterns_dropped: int = 0

    @property
    def collectives(self) -> int:
        """Simdgroup functions: shuffles, reductions and ballots."""
        return self.shuffles + self.reductions + self.ballots

    @property
    def threadgroup_read(self) -> int:
        """Bytes read from threadgroup memory."""
        return self.threadgroup.bytes_read

    @property
    def threadgroup_written(self) -> int:
        """Bytes written to threadgroup memory."""
        return self.threadgroup.bytes_written

    @property
    def device_read(self) -> int:
        """Bytes read from all buffers."""
        return sum(buffer.bytes_read for buffer in self.buffers)

    @property
    def device_written(self) -> int:
        """Bytes written to all buffers."""
        return sum(buffer.bytes_written for buffer in self.buffers)

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
            ("threadgroup barriers, by threadgroup", self.threadgroup_barriers),
            ("threadgroup barriers, by simdgroup", self.barriers),
            ("simdgroup barriers", self.simdgroup_barriers),
            ("shuffles", self.shuffles),
            ("reductions", self.reductions),
            ("ballots", self.ballots),
            ("threadgroup accesses", self.threadgroup_accesses),
            ("bank conflicts", self.bank_conflicts),
        ]

    def tables(self) -> Sequence[Table]:
        """Return the counts as two rich tables: by buffer, and all else."""
        from rich.table import Table

        traffic = Table(title="Traffic by buffer, bytes")
        traffic.add_column("buffer")
        for column in ("read", "distinct", "written", "distinct", "atomics", "lines an access"):
            traffic.add_column(column, justify="right")
        for each in (*self.buffers, self.threadgroup):
            traffic.add_row(
                each.name,
                f"{each.bytes_read:,}",
                f"{each.distinct_read:,}",
                f"{each.bytes_written:,}",
                f"{each.distinct_written:,}",
                f"{each.atomics:,}",
                f"{each.lines_per_access:.2f}" if each.simdgroup_accesses else "",
            )
        totals = Table(title="Totals", show_header=False)
        totals.add_column("what")
        totals.add_column("count", justify="right")
        for label, value in self.rows():
            totals.add_row(label, f"{value:,}")
        return [traffic, totals]

    def __rich_console__(self, console: Any, options: Any) -> Any:
        yield from self.tables()
