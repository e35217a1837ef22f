"""The tiles of a mask: those with a key that is seen, those with no other, and lists of them."""

from __future__ import annotations

import mlx.core as mx

LISTED_AT_LEAST = 7
"""Shortest lists, so that an array of them has 8 elements: MLX binds smaller ones differently."""


def listed(some: mx.array, every: mx.array, *, by_keys: bool = False) -> mx.array:
    """The lists of `BlockMask.lists`, of these tiles."""
    if by_keys:
        some, every = (x.swapaxes(2, 3) for x in (some, every))
    count = some.shape[3]
    entries = 2 * mx.arange(count, dtype=mx.int32) + every.astype(mx.int32)
    last = 2 * count + 2
    entries = mx.sort(mx.where(some, entries, last), axis=-1)
    counts = some.astype(mx.int32).sum(axis=-1, keepdims=True)
    parts = [counts, mx.where(entries == last, 0, entries)]
    if count < LISTED_AT_LEAST:
        missing = (*some.shape[:3], LISTED_AT_LEAST - count)
        parts.append(mx.zeros(missing, mx.int32))
    return mx.concatenate(parts, axis=-1)


def blocks_of(
    array: mx.array, q_len: int, kv_len: int, rows: int, columns: int
) -> tuple[mx.array, mx.array]:
    """Whether blocks have a key that is seen, and whether they have none that is not.

    Lazy; an axis of 1 stays unexpanded until the blocks are known, so that the array is read once
    for each of the two, and nothing of its broadcast size is made.

    Args:
        array: booleans ``(B, H, Lq, Lk)``, each axis of which may be 1.
        q_len, kv_len: lengths that it is broadcast to.
        rows, columns: queries and keys of a block.

    Returns:
        Booleans ``(B, H, ceil(q_len / rows), ceil(kv_len / columns))``, twice.
    """
    counts = -(-q_len // rows), -(-kv_len // columns)
    some, every = (_reduced(array, rows, columns, whole=whole) for whole in (False, True))
    shape = (*array.shape[:2], *counts)
    return mx.broadcast_to(some, shape), mx.broadcast_to(every, shape)


def _reduced(array: mx.array, rows: int, columns: int, *, whole: bool) -> mx.array:
    """Any of the elements of each block, or all of them where they are wanted `whole`."""
    batch, heads, queries, keys = array.shape
    rows, columns = (
        1 if size == 1 else block for size, block in ((queries, rows), (keys, columns))
    )
    pad = -queries % rows, -keys % columns
    if any(pad):
        widths = [(0, 0), (0, 0), (0, pad[0]), (0, pad[1])]
        array = mx.pad(array, widths, constant_values=mx.array(whole))
    shape = (batch, heads, (queries + pad[0]) // rows, rows, (keys + pad[1]) // columns, columns)
    found = array.reshape(shape)
    return found.all(axis=(3, 5)) if whole else found.any(axis=(3, 5))
