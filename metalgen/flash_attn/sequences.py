"""Packed sequences of which only some rows are used, and caches of pages of any size."""

from __future__ import annotations

import mlx.core as mx

from metalgen.features.pages import MAX_PAGE, MIN_PAGE


def split_unused(
    cu_q: mx.array,
    cu_k: mx.array | None,
    used_q: mx.array | None,
    used_k: mx.array | None,
) -> tuple[mx.array, mx.array | None]:
    """Starts of packed sequences, with three in place of each: what is used, and what is not.

    Each sequence becomes its used queries with its used keys, its other queries without any key
    (zeros, with a log-sum-exp of -inf), and its other keys without any query. So nothing moves. A
    kernel that takes used lengths will replace it.

    Args:
        cu_q, cu_k: ``(N + 1,)``; `cu_k` is None where keys lie in pages.
        used_q, used_k: ``(N,)``; None: all.

    Returns:
        ``(3 N + 1,)`` starts of queries, and of keys where they have any.
    """
    end_q = cu_q[1:] if used_q is None else mx.minimum(cu_q[:-1] + used_q, cu_q[1:])
    queries = mx.stack([cu_q[:-1], end_q, cu_q[1:]], axis=1).reshape(-1)
    queries = mx.concatenate([queries, cu_q[-1:]])
    if cu_k is None:
        return queries, None
    end_k = cu_k[1:] if used_k is None else mx.minimum(cu_k[:-1] + used_k, cu_k[1:])
    keys = mx.stack([cu_k[:-1], end_k, end_k], axis=1).reshape(-1)
    return queries, mx.concatenate([keys, cu_k[-1:]])


def spread(x: mx.array, other: int) -> mx.array:
    """What belongs to N sequences, for the 3 N that `split_unused` makes of them."""
    rest = mx.full(x.shape, other, x.dtype)
    return mx.stack([x, rest, rest], axis=1).reshape(-1, *x.shape[1:])


def pages_of(cache: mx.array, table: mx.array) -> tuple[mx.array, mx.array]:
    """Pages of a size that metalgen's kernels take, and their table.

    Pages larger than these become several, by views; those that 8 does not divide are copied.

    Args:
        cache: ``(pages, page_size, Hkv, D)``, any size. A dense cache is one page for each entry.
        table: ``(N, M)`` int32.
    """
    count, size = cache.shape[:2]
    part = next((n for n in range(MAX_PAGE, MIN_PAGE - 1, -8) if size % n == 0), None)
    if part == size:
        return cache, table
    if part is not None:
        each = size // part
        numbers = table[..., None] * each + mx.arange(each)
        numbers = mx.where(table[..., None] < 0, -1, numbers)
        return cache.reshape(count * each, part, *cache.shape[2:]), numbers.reshape(
            table.shape[0], -1
        ).astype(mx.int32)
    sequences, columns = table.shape
    rows = cache[mx.clip(table, 0, count - 1)].reshape(sequences, columns * size, *cache.shape[2:])
    missing = -rows.shape[1] % MIN_PAGE
    if missing:
        rows = mx.pad(rows, [(0, 0), (0, missing), (0, 0), (0, 0)])
    whole = mx.arange(sequences, dtype=mx.int32)[:, None]
    return pages_of(rows, whole)


def write_rows(cache: mx.array, rows: mx.array, table: mx.array, offset: mx.array) -> None:
    """Write new rows of sequences into their pages; `cache` then is the array with them.

    MLX stores them in place where nothing else holds the buffer. A row whose page is none, or that
    lies beyond its table, is dropped as long as any row of the call has a place.

    Args:
        cache: ``(pages, page_size, ...)``.
        rows: ``(N, T, ...)``.
        table: ``(N, M)`` int32, pages of each sequence.
        offset: ``(N,)`` int32, rows that each sequence has already.
    """
    (sequences, length), (count, size) = rows.shape[:2], cache.shape[:2]
    if not rows.size:
        return
    slot = offset[:, None] + mx.arange(length)
    there = (slot >= 0) & (slot < table.shape[1] * size)
    column = mx.clip(slot // size, 0, table.shape[1] - 1)
    page = mx.take_along_axis(table, column, axis=1)
    there = (there & (page >= 0) & (page < count)).reshape(-1)
    # What has no place is written where the first row is that has one, and is the same as that.
    first = mx.argmax(there)
    source = mx.where(there, mx.arange(sequences * length), first)
    page = mx.clip(page, 0, count - 1).reshape(-1)[source]
    cache[page, (slot % size).reshape(-1)[source]] = rows.reshape(-1, *rows.shape[2:])[source]
