"""Paged caches, by the names that the MLX port of flash-attn gives to their functions."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.flash_attn.arguments import array, integers, per_sequence
from metalgen.flash_attn.sequences import write_rows


def validate_paged_kv_params(
    k_cache: Any, v_cache: Any, page_table: Any, batch_size: int
) -> tuple[int, int]:
    """Whether pages and a table fit each other. It looks into the table, so it waits for it.

    Args:
        k_cache, v_cache: ``(pages, page_size, Hk, D)``.
        page_table: ``(batch_size, M)`` int32; -1 stands for no page.

    Returns:
        Rows of a page, and pages of a sequence.

    Raises:
        ArgumentError: naming what does not fit.
    """
    layout = "(pages, page_size, H, D)"
    k, v = (array(name, x, 4, layout) for name, x in (("k_cache", k_cache), ("v_cache", v_cache)))
    if v.shape[:3] != k.shape[:3]:
        raise ArgumentError("v_cache.shape", f"{k.shape[:3]}, as k_cache has", v.shape)
    table = array("page_table", page_table, 2, "(batch, pages of a sequence)")
    if table.dtype != mx.int32:
        raise ArgumentError("page_table.dtype", "int32", str(table.dtype))
    if table.shape[0] != batch_size:
        raise ArgumentError("page_table.shape", f"({batch_size}, pages of a sequence)", table.shape)
    wrong = (table < -1) | (table >= k.shape[0])
    if table.size and wrong.any().item():
        place: Any = mx.argmax(wrong.reshape(-1)).item()
        index = divmod(place, table.shape[1])
        expected = f"a page from 0 to {k.shape[0] - 1}, or -1 for none"
        got = table.reshape(-1)[place].item()
        raise ArgumentError(f"page_table[{index[0]}, {index[1]}]", expected, got)
    return k.shape[1], table.shape[1]


def update_paged_kv_cache(
    k_cache: mx.array,
    v_cache: mx.array,
    new_k: Any,
    new_v: Any,
    page_table: Any,
    cache_seqlens: Any,
) -> mx.array:
    """Write new rows of each sequence behind those that it has; the caches then are the new ones.

    Args:
        k_cache, v_cache: ``(pages, page_size, Hk, D)``; written in place.
        new_k, new_v: ``(B, T, Hk, D)``.
        page_table: ``(B, M)`` integers. Rows beyond it, or on no page, are dropped.
        cache_seqlens: rows that each sequence has, an integer or ``(B,)``.

    Returns:
        The lengths with the new rows, ``(B,)`` int32.

    Raises:
        ArgumentError: shapes or types that do not fit.
    """
    table = integers("page_table", page_table, 2)
    lengths = per_sequence("cache_seqlens", cache_seqlens, table.shape[0])
    found = []
    for name, cache, new in (("k", k_cache, new_k), ("v", v_cache, new_v)):
        if not isinstance(cache, mx.array):
            raise ArgumentError(f"{name}_cache", "an mlx.core.array", type(cache).__name__)
        new = array(f"new_{name}", new, 4, "(B, T, H, D)")
        if (new.shape[0], *new.shape[2:]) != (table.shape[0], *cache.shape[2:]):
            expected = f"{(table.shape[0], new.shape[1], *cache.shape[2:])}"
            raise ArgumentError(f"new_{name}.shape", expected, new.shape)
        if new.dtype != cache.dtype:
            expected = f"{cache.dtype}, as the cache has"
            raise ArgumentError(f"new_{name}.dtype", expected, str(new.dtype))
        found.append(new)
    if found[1].shape[1] != found[0].shape[1]:
        raise ArgumentError("new_v.shape", f"{found[0].shape[1]} rows, as new_k", found[1].shape)
    for cache, new in zip((k_cache, v_cache), found, strict=True):
        write_rows(cache, new, table, lengths)
    return lengths + found[0].shape[1]
