"""How the tiles of `mma` lie in shared memory: rows, and their sizes.

Below schedules, whose rules need the sizes, and below plans, which need the places.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from metalgen.kinds.operands import Operand

DEPTH = 16
"""Columns, or rows of a pass, that one instruction contracts."""
CHUNK_BYTES = 16
"""Bytes that are moved at once."""


def padded(width: int) -> int:
    """A head dimension rounded up to whole matrices."""
    return -(-width // DEPTH) * DEPTH


def row_bytes(width: int, itemsize: int) -> int:
    """Bytes from one row to the next of a tile.

    Rows of whole 128 bytes are swizzled, others padded to an odd number of chunks.
    """
    chunks = padded(width) * itemsize // CHUNK_BYTES
    return (chunks if chunks % 8 == 0 else chunks | 1) * CHUNK_BYTES


@dataclass(frozen=True)
class RawTile:
    """Quantized rows as they lie in a tile of the ring: words, then scales, then biases.

    All in bytes but `bits`, `groups` and `shifted`.

    Args:
        bits: of an element.
        words: of a row's words, a multiple of 16, for groups have 32 elements or more.
        pitch: from one row of words to the next: an odd multiple of 16, so that rows start in
            different banks.
        groups: scales (or biases) of a row.
        window: copied for a row of scales: that row where it is a multiple of 4 bytes. Another may
            start in the middle of 4 bytes; then all groups of 4 that hold some of it, wherever.
        each: of one copy of scales.
        shifted: whether a row of scales may start in the middle of its window.
        scales, biases: from the tile's start to the first row of them.
        size: of the tile.
    """

    bits: int
    words: int
    pitch: int
    groups: int
    window: int
    each: int
    shifted: bool
    scales: int
    biases: int
    size: int


@dataclass(frozen=True)
class MmaTiles:
    """The tiles of a block of threads in shared memory.

    Args:
        raw: how quantized operands lie in the ring, by name; none of others.
        direct: whether fragments are made of raw tiles at once, not of a work tile.
        own: bytes of the tiles of owned operands.
        work: bytes of the tile that raw tiles are dequantized into.
        ring: bytes of one tile of the ring; of those of a pass, where they come together.
        offsets: where the rows of each traversed operand begin in it, in bytes, by name.
        added: bytes of the tile of an accumulator that all warps read.
    """

    raw: dict[str, RawTile]
    direct: bool
    own: int
    work: int
    ring: int
    offsets: dict[str, int]
    added: int = 0


def mma_tiles(
    own: Sequence[Operand],
    traversed: Sequence[Operand],
    *,
    bq: int,
    bk: int,
    sharing: int,
    together: bool = False,
    adds: bool = False,
) -> MmaTiles:
    """The tiles of `bq` rows of each owned operand, and of `bk` rows of a traversed one.

    Args:
        own, traversed: operands.
        bq, bk: rows.
        sharing: how many warps read the same rows of a pass.
        together: whether the rows of a pass come together, of all traversed operands.
        adds: whether a product contracts owned rows.
    """
    raw = {each.name: _raw(each, bk) for each in traversed if each.bits is not None}
    direct = bool(raw) and sharing == 1 and traversed[0].itemsize == 2
    sizes = {each.name: bk * row_bytes(each.width, each.itemsize) for each in traversed}
    tile = sum(sizes.values()) if together else max(sizes.values())
    starts = itertools.accumulate(sizes.values(), initial=0)  # and the end
    return MmaTiles(
        raw=raw,
        direct=direct,
        own=bq * sum(row_bytes(each.width, each.itemsize) for each in own),
        work=tile if raw and not direct else 0,
        ring=max(each.size for each in raw.values()) if raw else tile,
        offsets={
            name: start if together else 0 for name, start in zip(sizes, starts, strict=False)
        },
        added=bq * row_bytes(bk, own[0].itemsize) if adds else 0,
    )


def _raw(operand: Operand, lines: int) -> RawTile:
    assert operand.bits is not None
    words = operand.width * operand.bits // 8
    pitch = (words // CHUNK_BYTES | 1) * CHUNK_BYTES
    groups = operand.width // operand.group
    row = groups * operand.itemsize
    window = row if row % 4 == 0 else row + 2
    return RawTile(
        bits=operand.bits,
        words=words,
        pitch=pitch,
        groups=groups,
        window=window,
        each=next((n for n in (16, 8) if row % n == 0), 4),
        shifted=row % 4 != 0,
        scales=lines * pitch,
        biases=lines * (pitch + window),
        size=-(-lines * (pitch + 2 * window) // CHUNK_BYTES) * CHUNK_BYTES,
    )
