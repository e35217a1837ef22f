"""Which rows of a sequence a process holds."""

from __future__ import annotations

import mlx.core as mx

from metalgen.errors import ArgumentError

LAYOUTS = ("zigzag", "contiguous")
"""``"zigzag"``: of 2 n chunks process r has chunks r and 2 n - 1 - r, so that every process has
the same share of a causal mask, as in the zigzag variant of ring-flash-attention.
``"contiguous"``: of n chunks, chunk r."""


def check_layout(layout: object) -> str:
    """The layout; raises `ArgumentError` for another."""
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise ArgumentError("layout", f"one of {', '.join(LAYOUTS)}", layout)
    return layout


def chunks_of(rank: int, size: int, layout: str) -> tuple[int, ...]:
    """The numbers of the chunks that a process holds, in the order in which it holds them."""
    return (rank, 2 * size - 1 - rank) if layout == "zigzag" else (rank,)


def chunk_length(name: str, rows: int, layout: str) -> int:
    """Rows of a chunk, of a part of so many rows; raises `ArgumentError` for an odd number."""
    if layout != "zigzag":
        return rows
    if rows % 2:
        expected = "an even number of rows, two chunks of the zigzag layout"
        raise ArgumentError(name, expected, rows)
    return rows // 2


def order(size: int, layout: str) -> list[int]:
    """Where each chunk of the sequence is among those of all processes, one after the other."""
    held = [chunk for rank in range(size) for chunk in chunks_of(rank, size, layout)]
    return sorted(range(len(held)), key=held.__getitem__)


def joined(parts: mx.array, size: int, layout: str, axis: int) -> mx.array:
    """The whole sequence from the parts ``(size, ...)`` of all processes; `axis` is of a part."""
    each = [part.squeeze(0) for part in mx.split(parts, size, axis=0)]
    count = len(chunks_of(0, size, layout))
    chunks = [chunk for part in each for chunk in mx.split(part, count, axis=axis)]
    return mx.concatenate([chunks[n] for n in order(size, layout)], axis=axis)


def own_part(whole: mx.array, rank: int, size: int, layout: str, axis: int) -> mx.array:
    """A process's part of the whole sequence."""
    numbers = chunks_of(rank, size, layout)
    chunks = mx.split(whole, size * len(numbers), axis=axis)
    return mx.concatenate([chunks[n] for n in numbers], axis=axis)
