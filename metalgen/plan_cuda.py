"""The plan of the forward family for CUDA: how tiles lie in shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from metalgen.config import AttentionConfig
from metalgen.schedule import CHUNK_BYTES, Schedule, row_bytes
from metalgen.targets import CUDA


@dataclass(frozen=True)
class CudaStep:
    """All of K, or all of V, of one pass: ``operand`` is ``"k"`` or ``"v"``."""

    operand: str


@dataclass(frozen=True)
class CudaPlan:
    """Everything that the forward template substitutes.

    Args:
        steps: K, then V.
        k_chunks, v_chunks: chunks of 16 bytes in a row of Q and K, and of V.
        q_tile, kv_tile: bytes of the tile of Q, and of one tile of the ring.
    """

    steps: tuple[CudaStep, ...]
    k_chunks: int
    v_chunks: int
    q_tile: int
    kv_tile: int


def cuda_plan(config: AttentionConfig, schedule: Schedule) -> CudaPlan:
    """The plan of a valid schedule (see `metalgen.schedule.check_schedule`)."""
    widths = (config.head_dim, config.v_dim)
    rows = [row_bytes(width, config.itemsize, CUDA) for width in widths]
    chunks = [-(-w // CUDA.depth) * CUDA.depth * config.itemsize // CHUNK_BYTES for w in widths]
    return CudaPlan(
        steps=(CudaStep("k"), CudaStep("v")),
        k_chunks=chunks[0],
        v_chunks=chunks[1],
        q_tile=schedule.bq * rows[0],
        kv_tile=schedule.bk * max(rows),
    )
