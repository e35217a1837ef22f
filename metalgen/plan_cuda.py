"""The plan of the forward family for CUDA: how tiles lie in shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metalgen.config import AttentionConfig
from metalgen.schedule import CHUNK_BYTES, Schedule, padded, row_bytes, value_width
from metalgen.targets import CUDA


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
    """The plan of a valid schedule (see `metalgen.schedule.check_schedule`)."""
    widths = {"k": config.head_dim, "v": value_width(config, schedule)}
    q, k, v = (
        _copy(width, config.itemsize, schedule.threads)
        for width in (config.head_dim, widths["k"], widths["v"])
    )
    tile = schedule.bk * max(k.row_bytes, v.row_bytes)
    raw: dict[str, CudaRaw] = {}
    if config.kv_bits is not None:
        raw = {name: _raw(config, width, schedule.bk) for name, width in widths.items()}
    direct = bool(raw) and schedule.simdgroups == 1 and config.itemsize == 2
    return CudaPlan(
        steps=(CudaStep("k"), CudaStep("v")),
        k_chunks=k.chunks,
        v_chunks=v.chunks,
        copies={"q": q, "k": k, "v": v},
        page_rows=math.gcd(config.page_size or schedule.bk, schedule.bk),
        raw=raw,
        direct=direct,
        blocks={
            name: next(n for n in (128, 64, 32) if width % n == 0)
            for name, width in widths.items()
            if direct
        },
        q_tile=schedule.bq * q.row_bytes,
        work_tile=tile if raw and not direct else 0,
        kv_tile=max(own.size for own in raw.values()) if raw else tile,
    )


def shared_bytes(config: AttentionConfig, schedule: Schedule) -> int:
    """Bytes of shared memory: Q, what quantized tiles are dequantized into, and the ring."""
    plan = cuda_plan(config, schedule)
    return plan.q_tile + plan.work_tile + schedule.buffers * plan.kv_tile


def _copy(width: int, itemsize: int, threads: int) -> CudaCopy:
    chunks = padded(width, CUDA) * itemsize // CHUNK_BYTES
    step, rest = divmod(threads, chunks)
    whole = chunks * CHUNK_BYTES == width * itemsize
    repeats = chunks % 8 != 0 or step % 8 == 0  # the swizzle has a period of 8 rows
    return CudaCopy(
        chunks,
        CHUNK_BYTES // itemsize,
        row_bytes(width, itemsize, CUDA),
        step if whole and rest == 0 and repeats else 0,
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
