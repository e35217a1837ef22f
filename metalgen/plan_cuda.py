"""The plan of the forward family for CUDA: how tiles lie in shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metalgen.kinds import MMA, value_width
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Schedule
from metalgen.tiles import CHUNK_BYTES, CudaRaw, row_bytes

CACHED_BYTES = 32 << 20
"""Of keys and values, which stay in the L2 cache of a large GPU while blocks of rows share them.

On an H200, of 50 MB, anything from 16 to 64 MiB was as good (measured, 2026-11-21).
"""


@dataclass(frozen=True)
class CudaStep:
    """All of K, or all of V, of one pass: ``operand`` is ``"k"`` or ``"v"``."""

    operand: str


@dataclass(frozen=True)
class CudaCopy:
    """How the threads of a block copy rows of an input into a tile, a chunk each.

    Args:
        chunks: chunks of 16 bytes in a row.
        elements: elements in a chunk.
        row_bytes: bytes from one row of the tile to the next.
        step: rows that all threads copy at once, where a thread keeps to one column of chunks and
            the swizzle repeats; 0 where they do not fit so.
    """

    chunks: int
    elements: int
    row_bytes: int
    step: int


@dataclass(frozen=True)
class CudaPlan:
    """Everything that the forward template substitutes.

    Args:
        steps: K, then V.
        k_chunks, v_chunks: chunks of 16 bytes in a row of Q and K, and of V.
        copies: how ``"q"``, ``"k"`` and ``"v"`` are copied into tiles.
        page_rows: keys of a pass that are certain to lie in one page.
        raw: how quantized ``"k"`` and ``"v"`` lie in the ring; empty for others.
        direct: whether fragments are made of raw tiles at once, not of a work tile.
        blocks: where `direct`, the columns of K, and of V, that are shared out among lanes at once.
        q_tile, work_tile, kv_tile: bytes of the tile of Q, of the one that raw tiles are
            dequantized into, and of one tile of the ring.
    """

    steps: tuple[CudaStep, ...]
    k_chunks: int
    v_chunks: int
    copies: dict[str, CudaCopy]
    page_rows: int
    raw: dict[str, CudaRaw]
    direct: bool
    blocks: dict[str, int]
    q_tile: int
    work_tile: int
    kv_tile: int


def cuda_plan(config: AttentionConfig, schedule: Schedule) -> CudaPlan:
    """The plan of a valid schedule (see `metalgen.families.check_schedule`)."""
    widths = {"k": config.head_dim, "v": value_width(config, schedule)}
    q, k, v = (
        _copy(width, config.itemsize, schedule.threads)
        for width in (config.head_dim, widths["k"], widths["v"])
    )
    tiles = MMA.tiles(config, schedule)
    return CudaPlan(
        steps=(CudaStep("k"), CudaStep("v")),
        k_chunks=k.chunks,
        v_chunks=v.chunks,
        copies={"q": q, "k": k, "v": v},
        page_rows=math.gcd(config.page_size or schedule.bk, schedule.bk),
        raw=tiles.raw,
        direct=tiles.direct,
        blocks={
            name: next(n for n in (128, 64, 32) if width % n == 0)
            for name, width in widths.items()
            if tiles.direct
        },
        q_tile=tiles.q,
        work_tile=tiles.work,
        kv_tile=tiles.kv,
    )


def cached_keys(config: AttentionConfig) -> int:
    """Keys of query heads that `CACHED_BYTES` hold, each with its value."""
    bits = (config.head_dim + config.v_dim) * (config.kv_bits or 8 * config.itemsize)
    return 8 * CACHED_BYTES * config.heads_per_kv // bits


def _copy(width: int, itemsize: int, threads: int) -> CudaCopy:
    chunks = MMA.padded(width) * itemsize // CHUNK_BYTES
    step, rest = divmod(threads, chunks)
    whole = chunks * CHUNK_BYTES == width * itemsize
    repeats = chunks % 8 != 0 or step % 8 == 0  # the swizzle has a period of 8 rows
    return CudaCopy(
        chunks,
        CHUNK_BYTES // itemsize,
        row_bytes(width, itemsize),
        step if whole and rest == 0 and repeats else 0,
    )
