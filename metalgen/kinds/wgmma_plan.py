"""From operands and a schedule to what the templates of `wgmma` write down.

Four consecutive warps, a warp group, multiply together: 64 owned rows by a whole tile. Tiles lie in
panels of 64 columns, 128 bytes wide, as the instructions read them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from metalgen.kinds.mma_plan import Copy, aligned, cached_keys, in_columns
from metalgen.kinds.mma_tiles import RawTile
from metalgen.kinds.operands import Operand, Operands, Product
from metalgen.kinds.wgmma_numbers import (
    BARRIER_BYTES,
    CHUNK_BYTES,
    COPYING_THREADS,
    DEPTH,
    GROUP_WARPS,
    PANEL_BYTES,
    REGISTERS,
)
from metalgen.schedules import Schedule


def panel_row_bytes(width: int, itemsize: int = 2) -> int:
    """Bytes of a row in all of its panels."""
    return -(-width * itemsize // PANEL_BYTES) * PANEL_BYTES


@dataclass(frozen=True)
class Step:
    """A product of a pass, and its right side, which is in the ring."""

    product: Product
    operand: Operand


@dataclass(frozen=True)
class WgmmaPlan:
    """Everything that the templates substitute; `metalgen.kinds.mma_plan.MmaPlan` has the same
    names for what both share.

    Args:
        operands: what was planned.
        columns, rows: the products of one pass, in order.
        copies: how each operand is copied into tiles, by name.
        column_copies: those by which a thread may keep to one column of chunks.
        aligned: when the rows of an operand can be copied in the background, in CUDA, by name.
        page_rows: rows of a pass that are certain to lie in one page.
        own_offsets: where the tile of each owned operand begins, in bytes, by name.
        own_tile, ring_tile: bytes of the tiles of owned operands, and of one tile of the ring.
        buffers: tiles of the ring.
        own_lines, lines: rows of a block of owned operands, and of a pass.
        groups: warp groups that multiply.
        overlap: whether what a family makes of a pass's scores is made while the products that
            contract the rows of the pass before are on their way.
    """

    operands: Operands
    columns: tuple[Step, ...]
    rows: tuple[Step, ...]
    copies: dict[str, Copy]
    column_copies: dict[str, Copy]
    aligned: dict[str, str]
    page_rows: int
    own_offsets: dict[str, int]
    own_tile: int
    ring_tile: int
    buffers: int
    own_lines: int
    lines: int
    groups: int
    overlap: bool

    direct = False
    """Whether fragments are made of quantized rows; no operand is quantized here."""

    @property
    def raw(self) -> dict[str, RawTile]:
        """Quantized operands: none."""
        return {}

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.groups * GROUP_WARPS * 32 + COPYING_THREADS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that copies, and of one that multiplies."""
        return REGISTERS[self.groups]

    @property
    def barriers(self) -> int:
        """Bytes from the start of the tiles to the barriers behind them."""
        return self.own_tile + self.buffers * self.ring_tile

    @property
    def steps(self) -> tuple[Step, ...]:
        """All products of a pass."""
        return self.columns + self.rows

    @property
    def constants(self) -> dict[str, int]:
        """Named numbers of the kernel's text."""
        found = {
            "THREADS": self.threads,
            "COPIERS": COPYING_THREADS,
            "STAGES": self.buffers,
            "Q_TILE": self.own_tile,
            "KV_TILE": self.ring_tile,
        }
        if self.operands.ordered_heads:
            found["CACHED_KEYS"] = cached_keys(self.operands)
        return found


def wgmma_plan(operands: Operands, schedule: Schedule) -> WgmmaPlan:
    """The plan of a valid schedule."""
    own, traversed = operands.own, operands.traversed
    groups = schedule.simdgroups // GROUP_WARPS
    threads = groups * GROUP_WARPS * 32 + COPYING_THREADS
    copies = {
        each.name: _copy(each, schedule.bq, "threadIdx.x", "THREADS", threads) for each in own
    }
    copies |= {
        each.name: _copy(each, schedule.bk, "copier", "COPIERS", COPYING_THREADS)
        for each in traversed
    }
    steps = [Step(product, operands.operand(product.right)) for product in operands.products]
    sizes = tile_bytes(own, traversed, schedule)
    offsets, start = {}, 0
    for each in own:
        offsets[each.name] = start
        start += schedule.bq * panel_row_bytes(each.width, each.itemsize)
    return WgmmaPlan(
        operands=operands,
        columns=tuple(step for step in steps if operands.contracts_columns(step.product)),
        rows=tuple(step for step in steps if not operands.contracts_columns(step.product)),
        copies=copies,
        column_copies={
            each.name: copies[each.name]
            for each in own + traversed
            if copies[each.name].step and in_columns(each, copies[each.name].step)
        },
        aligned={
            each.name: aligned(each, copies[each.name])
            for each in own + traversed
            if not each.rotated
        },
        page_rows=math.gcd(traversed[0].page or schedule.bk, schedule.bk),
        own_offsets=offsets,
        own_tile=sizes[0],
        ring_tile=sizes[1],
        buffers=schedule.buffers,
        own_lines=schedule.bq,
        lines=schedule.bk,
        groups=groups,
        overlap=getattr(schedule, "overlap", "none") == "softmax",
    )


def tile_bytes(
    own: tuple[Operand, ...], traversed: tuple[Operand, ...], schedule: Schedule
) -> tuple[int, int]:
    """Bytes of the tiles of owned operands together, and of a tile of the ring."""
    rows = [sum(panel_row_bytes(each.width, each.itemsize) for each in own)]
    rows.append(max(panel_row_bytes(each.width, each.itemsize) for each in traversed))
    return schedule.bq * rows[0], schedule.bk * rows[1]


def barrier_bytes(buffers: int) -> int:
    """Bytes of the barriers: a full and an empty one of each tile, and one of owned rows."""
    return (2 * buffers + 1) * BARRIER_BYTES


def _copy(operand: Operand, lines: int, thread: str, threads: str, count: int) -> Copy:
    """Eight neighbouring threads copy a row of a panel, 16 rows or more at once: whole periods of
    the swizzle, so that a thread keeps to one column of chunks."""
    width = -(-operand.width // DEPTH) * DEPTH
    across = PANEL_BYTES // CHUNK_BYTES
    whole = operand.width * operand.itemsize % CHUNK_BYTES == 0 and width == operand.width
    return Copy(
        chunks=width * operand.itemsize // CHUNK_BYTES,
        elements=CHUNK_BYTES // operand.itemsize,
        row_bytes=PANEL_BYTES,
        step=count // across if whole else 0,
        lines=lines,
        across=across,
        thread=thread,
        threads=threads,
        count=count,
    )
