"""From operands and a schedule to what the templates of `mma` write down."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from metalgen.kinds.mma_tiles import (
    CHUNK_BYTES,
    DEPTH,
    MmaTiles,
    RawTile,
    mma_tiles,
    padded,
    row_bytes,
)
from metalgen.kinds.operands import Operand, Operands, Product
from metalgen.schedules import Schedule

CACHED_BYTES = 32 << 20
"""Of keys and values, which stay in the L2 cache of a large GPU while blocks of rows share them.

On an H200, of 50 MB, anything from 16 to 64 MiB was as good (measured, 2026-11-21).
"""


@dataclass(frozen=True)
class Fetch:
    """The copy of one tile into the ring, ahead of its use.

    Args:
        operands: whose rows are copied, each with where they begin in the tile, in bytes: one, or
            all of a pass.
        ahead: tiles of the ring after the one that is used next.
        later: passes after this one in which the tile is used.
    """

    operands: tuple[tuple[Operand, int], ...]
    ahead: int
    later: int


@dataclass(frozen=True)
class Step:
    """A product of a pass, and the tile that is fetched meanwhile.

    Args:
        product: what is multiplied.
        operand: of its right side, which is in the ring.
        name: of what the kernel's text has for it.
        fetch: with one tile the step's own one, else the furthest ahead for which there is room;
            None where the pass's tile is there already.
        arrived: the steps whose rows are there once its tile is.
    """

    product: Product
    operand: Operand
    name: str
    fetch: Fetch | None
    arrived: tuple[tuple[str, Operand], ...]


@dataclass(frozen=True)
class Copy:
    """How the threads of a block copy rows of an operand into a tile, a chunk each.

    Args:
        chunks: chunks of 16 bytes in a row.
        elements: elements in a chunk.
        row_bytes: bytes from one row of the tile to the next.
        step: rows that all threads copy at once, where a thread keeps to one column of chunks and
            the swizzle repeats; 0 where they do not fit so.
        lines: rows of the tile.
        across: chunks of a row that neighbouring threads copy: all, or those of a panel.
        thread, threads: who a thread is among those that copy, and how many these are, by the names
            that the kernel's text has for them.
        count: the same number.
    """

    chunks: int
    elements: int
    row_bytes: int
    step: int
    lines: int
    across: int
    thread: str
    threads: str
    count: int

    @property
    def panels(self) -> int:
        """Parts of a row that lie apart in the tile."""
        return -(-self.chunks // self.across)

    @property
    def panel_bytes(self) -> int:
        """Bytes from one panel of the tile to the next."""
        return self.lines * self.row_bytes


@dataclass(frozen=True)
class Shares:
    """How the warps of a block share out an output of so many blocks of 16 rows and columns.

    Args:
        rows, columns: blocks of a warp.
        warps: that share the columns of the same rows.
        apart: from a warp's block of rows to its next.
        ragged: whether some warps have fewer columns.
    """

    rows: int
    columns: int
    warps: int
    apart: int
    ragged: bool


def shares(rows: int, columns: int, warps: int) -> Shares:
    """Columns are shared out first: a fragment of them then serves all rows of a warp."""
    apart = next(
        n
        for n in range(min(rows, max(1, warps // columns)), 0, -1)
        if rows % n == 0 and warps % n == 0
    )
    across = warps // apart
    own = -(-columns // across)
    return Shares(rows // apart, own, across, apart, own * across != columns)


@dataclass(frozen=True)
class Adding:
    """A product that contracts the owned rows of a block.

    Args:
        operand: its right side.
        offset: where its left side is left for all warps, in bytes.
        copy: how the rows of that tile lie.
        shares: who computes what.
    """

    operand: Operand
    offset: int
    copy: Copy
    shares: Shares


@dataclass(frozen=True)
class MmaPlan:
    """Everything that the templates substitute.

    Args:
        operands: what was planned.
        columns, rows: the products of one pass, in order: those that contract columns, then those
            that contract the pass's rows.
        first: what is fetched before the loop.
        copies: how each operand is copied into tiles, by name.
        column_copies: those by which a thread may keep to one column of chunks.
        aligned: when the rows of an operand can be copied in the background, in CUDA, by name;
            not of those that are rotated.
        page_rows: rows of a pass that are certain to lie in one page.
        raw: how quantized operands lie in the ring, by name; none of others.
        direct: whether fragments are made of raw tiles at once, not of a work tile.
        blocks: where `direct`, the columns of each operand that are shared out among lanes at once.
        own_offsets: where the tile of each owned operand begins, in bytes, by name.
        offsets: where the rows of each traversed operand begin in a tile of the ring, likewise.
        own_tile, work_tile, ring_tile: bytes of the tiles of owned operands, of the one that raw
            tiles are dequantized into, and of one tile of the ring.
        buffers: tiles of the ring.
        kept: owned operands that stay in registers.
        waiting: groups of copies that may be on their way when a step's tile is needed.
        own_lines, lines: rows of a block of owned operands, and of a pass.
        threads: threads per block.
        added: the product that contracts owned rows; None: there is none.
    """

    operands: Operands
    columns: tuple[Step, ...]
    rows: tuple[Step, ...]
    first: tuple[Fetch, ...]
    copies: dict[str, Copy]
    column_copies: dict[str, Copy]
    aligned: dict[str, str]
    page_rows: int
    raw: dict[str, RawTile]
    direct: bool
    blocks: dict[str, int]
    own_offsets: dict[str, int]
    offsets: dict[str, int]
    own_tile: int
    work_tile: int
    ring_tile: int
    buffers: int
    kept: tuple[Operand, ...]
    waiting: int
    own_lines: int
    lines: int
    threads: int
    added: Adding | None = None

    @property
    def constants(self) -> dict[str, int]:
        """Named numbers of the kernel's text."""
        found = {}
        for each in self.operands.own:
            depth = 8 if each.itemsize == 4 else DEPTH
            found[f"{each.columns}_STEPS"] = padded(each.width) // depth
        found |= {
            "THREADS": self.threads,
            "STAGES": self.buffers,
            "Q_TILE": self.own_tile,
            "KV_TILE": self.ring_tile,
        }
        if self.operands.ordered_heads:
            found["CACHED_KEYS"] = cached_keys(self.operands)
        return found

    @property
    def steps(self) -> tuple[Step, ...]:
        """All products of a pass."""
        return self.columns + self.rows


def mma_plan(operands: Operands, schedule: Schedule) -> MmaPlan:
    """The plan of a valid schedule."""
    own, traversed = operands.own, operands.traversed
    sharing = schedule.simdgroups // getattr(schedule, "key_simdgroups", 1)
    sizes = {"bq": schedule.bq, "bk": schedule.bk, "sharing": sharing}
    adds = operands.added is not None
    tiles = mma_tiles(own, traversed, **sizes, together=operands.together, adds=adds)
    lines = dict.fromkeys((each.name for each in own), schedule.bq)
    copies = {
        each.name: _copy(each, lines.get(each.name, schedule.bk), schedule.threads)
        for each in own + traversed
    }
    ahead = schedule.buffers - 1
    steps = _steps(operands, ahead, tiles.offsets)
    in_background = {
        each.name: _aligned_raw(each, tiles.raw[each.name])
        if each.name in tiles.raw
        else aligned(each, copies[each.name])
        for each in own + traversed
        if not each.rotated
    }
    page = traversed[0].page or schedule.bk
    return MmaPlan(
        operands=operands,
        columns=tuple(step for step in steps if operands.contracts_columns(step.product)),
        rows=tuple(step for step in steps if not operands.contracts_columns(step.product)),
        first=tuple(_fetch(operands, 0, n, tiles.offsets) for n in range(ahead)),
        copies=copies,
        column_copies={
            each.name: copies[each.name]
            for each in own + traversed
            if copies[each.name].step and in_columns(each, schedule.bk)
        },
        aligned=in_background,
        page_rows=math.gcd(page, schedule.bk),
        raw=tiles.raw,
        direct=tiles.direct,
        blocks={
            each.name: next(n for n in (128, 64, 32) if each.width % n == 0)
            for each in traversed
            if tiles.direct
        },
        own_offsets=_offsets(own, schedule.bq),
        offsets=tiles.offsets,
        own_tile=tiles.own,
        work_tile=tiles.work,
        ring_tile=tiles.ring,
        buffers=schedule.buffers,
        kept=tuple(each for each in own if getattr(schedule, f"{each.name}_source") == "registers"),
        waiting=max(schedule.buffers - 2, 0),
        own_lines=schedule.bq,
        lines=schedule.bk,
        threads=schedule.threads,
        added=_adding(operands, schedule, tiles),
    )


def _adding(operands: Operands, schedule: Schedule, tiles: MmaTiles) -> Adding | None:
    if operands.added is None:
        return None
    operand = operands.operand(operands.added.product.right)
    columns = padded(operand.width) // DEPTH
    copy = _copy(replace(operand, width=schedule.bk), schedule.bq, schedule.threads)
    offset = tiles.own + tiles.work + schedule.buffers * tiles.ring
    own = shares(schedule.bk // DEPTH, columns, schedule.simdgroups)
    return Adding(operand, offset, copy, own)


def cached_keys(operands: Operands) -> int:
    """Keys of query heads that `CACHED_BYTES` hold, each with its value."""
    widths = ((each, each.width * each.shares) for each in operands.traversed)
    bits = sum(width * (each.bits or 8 * each.itemsize) for each, width in widths)
    return 8 * CACHED_BYTES * operands.ordered_heads // bits


def _steps(operands: Operands, ahead: int, offsets: dict[str, int]) -> list[Step]:
    """The products of a pass: each waits for a tile of its own, or the first for that of all."""
    named: list[tuple[Product, str, Operand]] = []
    for product in operands.products:
        again = any(product.right == known.right for known, _, _ in named)
        name = f"{product.right}_{product.into}" if again else product.right
        named.append((product, name, operands.operand(product.right)))
    every = tuple((name, operand) for _, name, operand in named)
    found = []
    for turn, (product, name, operand) in enumerate(named):
        fetch: Fetch | None = None
        arrived: tuple[tuple[str, Operand], ...] = ()
        if not operands.together or turn == 0:
            fetch = _fetch(operands, turn, ahead, offsets)
            arrived = every if operands.together else ((name, operand),)
        found.append(Step(product, operand, name, fetch, arrived))
    return found


def _fetch(operands: Operands, turn: int, ahead: int, offsets: dict[str, int]) -> Fetch:
    """The tile that is used so many tiles after that of product number `turn` of a pass."""
    if operands.together:
        every = tuple((each, offsets[each.name]) for each in operands.traversed)
        return Fetch(every, ahead, ahead)
    later, which = divmod(turn + ahead, len(operands.products))
    return Fetch(((operands.operand(operands.products[which].right), 0),), ahead, later)


def _offsets(own: tuple[Operand, ...], lines: int) -> dict[str, int]:
    """Where the tiles of operands begin that follow each other."""
    found, start = {}, 0
    for each in own:
        found[each.name] = start
        start += lines * row_bytes(each.width, each.itemsize)
    return found


def in_columns(operand: Operand, lines: int) -> bool:
    """Whether some rows of an operand that are copied at once are a fixed step apart."""
    if operand.head_rows or operand.rotated or operand.bits is not None:
        return False
    return operand.page is None or operand.page % lines == 0


def _copy(operand: Operand, lines: int, threads: int) -> Copy:
    width, itemsize = operand.width, operand.itemsize
    chunks = padded(width) * itemsize // CHUNK_BYTES
    step, rest = divmod(threads, chunks)
    whole = chunks * CHUNK_BYTES == width * itemsize
    repeats = chunks % 8 != 0 or step % 8 == 0  # the swizzle has a period of 8 rows
    return Copy(
        chunks,
        CHUNK_BYTES // itemsize,
        row_bytes(width, itemsize),
        step if whole and rest == 0 and repeats else 0,
        lines,
        across=chunks,
        thread="threadIdx.x",
        threads="THREADS",
        count=threads,
    )


def _multiples(places: list[str], size: int) -> str:
    """Whether addresses and distances are multiples of a power of two."""
    return f"(({' | '.join(places)}) & {size - 1}) == 0"


def _address(name: str) -> str:
    return f"reinterpret_cast<uintptr_t>({name}_head)"


def aligned(operand: Operand, copy: Copy) -> str:
    name = operand.name
    places = [_address(name), f"{name}_pitch"]
    places += [f"{name}_next"] if operand.head_rows else []
    places += [f"{name}_page"] if operand.page is not None else []
    places += [f"{name}_strides[1] * int(sizeof(*{name}))"] if operand.several_heads else []
    whole = f"{operand.columns} % {copy.elements} == 0"
    return f"{whole} && {name}_strides[3] == 1 && {_multiples(places, CHUNK_BYTES)}"


def _aligned_raw(operand: Operand, raw: RawTile) -> str:
    name, scales, biases = operand.arrays
    places = [_address(name), f"{name}_pitch"]
    places += [f"{name}_page"] if operand.page is not None else []
    found = [f"{name}_strides[3] == 1"]
    if raw.groups > 1:
        found += [f"{each}_strides[3] == 1" for each in (scales, biases)]
    found.append(_multiples(places, CHUNK_BYTES))
    if not raw.shifted:
        places = [_address(scales), _address(biases), f"{scales}_pitch", f"{biases}_pitch"]
        found.append(_multiples(places, raw.each))
    if operand.page is not None:
        found.append(_multiples([f"{scales}_page", f"{biases}_page"], raw.each))
    return " && ".join(found)
