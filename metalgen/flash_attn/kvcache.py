"""``flash_attn_with_kvcache``: a step of generation over a cache of keys and values."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.flash_attn.arguments import (
    array,
    bounds,
    cap,
    check_heads,
    further,
    integers,
    per_sequence,
    slopes,
)
from metalgen.flash_attn.computing import Call
from metalgen.flash_attn.layers.rotary import apply_rotary_emb
from metalgen.flash_attn.sequences import pages_of, write_rows

Result = mx.array | tuple[mx.array, ...]


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    **more: Any,
) -> Result:
    """Attention over a cache, to which new keys and values are appended first, where there are any.

    The caches are written in place: the arrays that are handed over hold the new rows after the
    call, and MLX reuses their buffers where nothing else holds them. A function inside
    ``mx.compile`` cannot change its arguments: ask for `return_caches` there, and return them.

    Args:
        q: ``(B, Lq, H, D)``.
        k_cache: ``(Bc, Lc, Hk, D)``, v_cache: ``(Bc, Lc, Hk, Dv)``. With a `block_table` pages,
            ``(pages, page_size, Hk, D)``, of any size.
        k, v: ``(B, Lnew, Hk, D)``: rows that go to `cache_seqlens` and on.
        rotary_cos, rotary_sin: ``(positions, rotary_dim / 2)``: k rotates by ``cache_seqlens + i``,
            and q by the same if `causal` or with a window, else all of q by ``cache_seqlens``.
        cache_seqlens: rows that each sequence has already: an integer or ``(B,)``. None: Lc.
        cache_batch_idx: ``(B,)``: which entry of the cache belongs to each entry of q. Not with a
            `block_table`.
        cache_leftpad: ``(B,)``: the first row of each sequence that is there.
        block_table: ``(B, M)``: the pages of each sequence, in order.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`; masks
            align to all rows, the new ones with them.
        rotary_interleaved: columns 2 c and 2 c + 1 rotate together (GPT-J), else c and
            c + rotary_dim / 2 (GPT-NeoX).
        num_splits: no effect: the tuned kernel decides.
        return_softmax_lse: also return the log-sum-exp.
        more: by name alone: `return_caches` (also return both caches), `page_table` (for
            `block_table`), `leftpad_k` (for `cache_leftpad`), `rotary_seqlens` (``(B,)``, positions
            in place of `cache_seqlens`), `learnable_sink`, `return_lse`, `device`, `chip`.

    Returns:
        ``(B, Lq, H, Dv)`` of the type of `q`; with `return_softmax_lse` also the log-sum-exp,
        ``(B, H, Lq)`` float32; with `return_caches` both caches last.

    Raises:
        ArgumentError: shapes, types or combinations that cannot be used.
    """
    return_caches = more.pop("return_caches", False)
    rotary_seqlens = more.pop("rotary_seqlens", None)
    page_table, leftpad = more.pop("page_table", None), more.pop("leftpad_k", None)
    block_table = page_table if block_table is None else block_table
    cache_leftpad = leftpad if cache_leftpad is None else cache_leftpad
    own = further("flash_attn_with_kvcache", more, "learnable_sink", "return_lse")

    q = array("q", q, 4, "(B, L, H, D)")
    sequences = q.shape[0]
    layout = "(B, L, H, D)" if block_table is None else "(pages, page_size, H, D)"
    fresh = k is not None
    if fresh and not return_caches and not isinstance(k_cache, mx.array):
        expected = "an mlx.core.array, which can be written in place, or return_caches=True"
        raise ArgumentError("k_cache", expected, type(k_cache).__name__)
    k_cache, v_cache = (
        array(name, x, 4, layout) for name, x in (("k_cache", k_cache), ("v_cache", v_cache))
    )
    table = _table(block_table, cache_batch_idx, sequences, k_cache.shape[0])
    room = k_cache.shape[1] * (1 if table is None else table.shape[1])
    if fresh:
        k, v = _new_rows(k, v, k_cache, v_cache, cache_seqlens, sequences)
    elif v is not None:
        raise ArgumentError("v", "None without k", "an array")
    check_heads(q, k_cache, v_cache, ("k_cache", "v_cache"))
    lengths = None
    if cache_seqlens is not None:
        lengths = per_sequence("cache_seqlens", cache_seqlens, sequences)
    options = bounds(causal, window_size)
    if rotary_cos is not None or rotary_sin is not None:
        if not fresh:
            raise ArgumentError("k", "new keys to rotate, as rotary_cos is given", None)
        if rotary_cos is None or rotary_sin is None:
            raise ArgumentError("rotary_cos, rotary_sin", "both, or neither", "one")
        assert lengths is not None
        at = lengths
        if rotary_seqlens is not None:
            at = per_sequence("rotary_seqlens", rotary_seqlens, sequences)
        tables = rotary_cos, rotary_sin, rotary_interleaved
        k = apply_rotary_emb(k, *tables, seqlen_offsets=at)
        q = apply_rotary_emb(q, *tables, seqlen_offsets=at, _one_position=not options)
    if fresh:
        assert lengths is not None
        rows = mx.arange(sequences, dtype=mx.int32)[:, None] if table is None else table
        for cache, new in ((k_cache, k), (v_cache, v)):
            write_rows(cache, new, rows, lengths)
        lengths = lengths + k.shape[1]

    keys, values = k_cache, v_cache
    if table is not None:
        (keys, pages), (values, _) = pages_of(keys, table), pages_of(values, table)
        options["block_table"] = pages
        lengths = mx.full((sequences,), room, mx.int32) if lengths is None else lengths
    if lengths is not None:
        options["kv_lens"] = lengths
    if (capped := cap(softcap)) is not None:
        options["softcap"] = capped
    if own.learnable_sink is not None:
        options["sinks"] = own.learnable_sink
    if cache_leftpad is not None:
        options["kv_starts"] = per_sequence("cache_leftpad", cache_leftpad, sequences)
    call = Call(
        q.swapaxes(1, 2),
        keys.swapaxes(1, 2),
        values.swapaxes(1, 2),
        options={"device": own.device, "chip": own.chip, **options},
        scale=softmax_scale,
        slopes=slopes(alibi_slopes, sequences, q.shape[2]),
    )
    out, lse = call.run()
    found = [out.swapaxes(1, 2)]
    if return_softmax_lse or own.return_lse:
        found.append(lse)
    if return_caches:
        found += [k_cache, v_cache]
    return tuple(found) if len(found) > 1 else found[0]


def _table(block_table: Any, cache_batch_idx: Any, sequences: int, entries: int) -> mx.array | None:
    """Pages of each sequence; an entry of a dense cache is one. None: sequence n has entry n."""
    if block_table is not None:
        if cache_batch_idx is not None:
            expected = "None with a block_table, which says where each sequence lies"
            raise ArgumentError("cache_batch_idx", expected, "an array")
        table = integers("block_table", block_table, 2)
        if table.shape[0] != sequences or not table.shape[1]:
            expected = f"({sequences}, pages of a sequence)"
            raise ArgumentError("block_table.shape", expected, table.shape)
        return table
    if cache_batch_idx is not None:
        return per_sequence("cache_batch_idx", cache_batch_idx, sequences)[:, None]
    if entries != sequences:
        expected = f"a batch of {sequences}, as q has, without cache_batch_idx"
        raise ArgumentError("k_cache.shape", expected, entries)
    return None


def _new_rows(
    k: Any, v: Any, k_cache: mx.array, v_cache: mx.array, cache_seqlens: Any, sequences: int
) -> tuple[mx.array, mx.array]:
    if v is None:
        raise ArgumentError("v", "new values, as k is given", None)
    if cache_seqlens is None:
        raise ArgumentError("cache_seqlens", "rows that there are already, as k is given", None)
    k, v = (array(name, x, 4, "(B, L, H, D)") for name, x in (("k", k), ("v", v)))
    for name, x, cache in (("k", k, k_cache), ("v", v, v_cache)):
        expected = (sequences, k.shape[1], *cache.shape[2:])
        if x.shape != expected:
            raise ArgumentError(f"{name}.shape", str(expected), x.shape)
        if x.dtype != cache.dtype:
            raise ArgumentError(f"{name}.dtype", f"{cache.dtype}, as the cache has", str(x.dtype))
    return k, v
