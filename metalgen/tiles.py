"""How tiles lie in shared memory (CUDA): rows, and their sizes.

Below schedules, whose rules need the sizes, and below the plans of kernels, which need the places.
"""

from __future__ import annotations

from dataclasses import dataclass

from metalgen.problem.config import AttentionConfig

CHUNK_BYTES = 16
"""Bytes that are moved at once (CUDA)."""


DEPTH = 16
"""Columns that one product contracts; rows are padded to it."""


def row_bytes(width: int, itemsize: int) -> int:
    """Bytes from one row to the next of a tile.

    Rows of whole 128 bytes are swizzled, others padded to an odd number of chunks.
    """
    chunks = -(-width // DEPTH) * DEPTH * itemsize // CHUNK_BYTES
    return (chunks if chunks % 8 == 0 else chunks | 1) * CHUNK_BYTES


@dataclass(frozen=True)
class CudaRaw:
    """Quantized rows of K or V as they lie in a tile of the ring: words, then scales, then biases.

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
class CudaTiles:
    """The tiles of a block of threads in shared memory.

    Args:
        raw: how quantized ``"k"`` and ``"v"`` lie in the ring; empty for others.
        direct: whether fragments are made of raw tiles at once, not of a work tile.
        q, work, kv: bytes of the tile of Q, of the one that raw tiles are dequantized into, and of
            one tile of the ring.
    """

    raw: dict[str, CudaRaw]
    direct: bool
    q: int
    work: int
    kv: int


def cuda_tiles(
    config: AttentionConfig, *, bq: int, bk: int, v_width: int, sharing: int
) -> CudaTiles:
    """The tiles of a schedule's `bq` rows of Q, and `bk` rows of K and of V, `v_width` wide.

    `sharing` says how many warps read the same keys.
    """
    widths = {"k": config.head_dim, "v": v_width}
    raw: dict[str, CudaRaw] = {}
    if config.kv_bits is not None:
        raw = {name: _raw(config, width, bk) for name, width in widths.items()}
    direct = bool(raw) and sharing == 1 and config.itemsize == 2
    tile = bk * max(row_bytes(width, config.itemsize) for width in widths.values())
    return CudaTiles(
        raw=raw,
        direct=direct,
        q=bq * row_bytes(config.head_dim, config.itemsize),
        work=tile if raw and not direct else 0,
        kv=max(own.size for own in raw.values()) if raw else tile,
    )


def _raw(config: AttentionConfig, width: int, lines: int) -> CudaRaw:
    assert config.kv_bits is not None
    words = width * config.kv_bits // 8
    pitch = (words // CHUNK_BYTES | 1) * CHUNK_BYTES
    groups = width // config.kv_group
    row = groups * config.itemsize
    window = row if row % 4 == 0 else row + 2
    return CudaRaw(
        bits=config.kv_bits,
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
