"""Attention in plain MLX operations: the fallback, and what gradients are computed from."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen import philox
from metalgen.features.rotary import rotated
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs


@dataclass(frozen=True)
class Places:
    """Where scores ``(B, H, Lq, Lk)`` stand; int32 arrays that broadcast to that shape.

    Packed sequences have one batch entry, with all rows and keys of all sequences, and each row is
    masked to its own.

    Args:
        b: batch entry, or packed sequence, of a row.
        h: query head.
        i: query, counted in its sequence: from 0, or from the call's `q_offset`.
        j: key, counted in its sequence.
        own: the key at the query's own position, ``i + kv_len - q_len``, or with `q_offset` i.
        there: booleans, whether a key is there at all; None: all are.
        rows: booleans, whether a row belongs to any sequence; None: all do.
        row: query, counted from 0; None: as `i`.
        used: booleans, whether a query is one that there is; None: all are.
    """

    b: mx.array
    h: mx.array
    i: mx.array
    j: mx.array
    own: mx.array
    there: mx.array | None = None
    rows: mx.array | None = None
    row: mx.array | None = None
    used: mx.array | None = None


def attention_plain(
    q: mx.array, k: mx.array, v: mx.array, scale: float | mx.array, features: dict[str, Any]
) -> tuple[mx.array, mx.array]:
    """What `metalgen.reference.attention_mlx` describes."""
    if 0 in q.shape[:3]:
        # MLX 0.32.4 on a CPU frees what an empty product of strided keys has yet to copy.
        empty = mx.zeros((*q.shape[:3], v_width(v, features)), q.dtype)
        return empty, mx.full(q.shape[:3], -mx.inf)
    call = located(q, k, v, features)
    scores = scores_of(q, call, scale, features)
    inputs = call.inputs
    sinks = inputs.sinks[:, None, None] if inputs.sinks is not None else None
    weights, lse = _softmax(scores, sinks)
    if features.get("dropout", 0.0):
        weights = weights * kept(call, features)
    kv_heads, kv_len = call.k.shape[1:3]
    by_group = (q.shape[0], kv_heads, q.shape[1] // kv_heads, q.shape[2], kv_len)
    values = call.v.astype(mx.float32)[:, :, None]
    out = (weights.reshape(by_group) @ values).reshape(*q.shape[:3], v_width(v, features))
    if call.at.rows is not None:
        out = mx.where(call.at.rows[..., None], out, 0.0)
        lse = mx.where(call.at.rows, lse, -mx.inf)
    return out.astype(q.dtype), lse


@dataclass(frozen=True)
class Located:
    """The keys and values of a call, and where its scores stand.

    Args:
        k, v: ``(B, Hkv, Lk, ...)`` of the type of q, gathered and dequantized; zeros where no key
            is.
        at: places of the scores.
        inputs: the other arrays.
    """

    k: mx.array
    v: mx.array
    at: Places
    inputs: Inputs


def packing_of(name: str, features: dict[str, Any]) -> tuple[int | None, int]:
    """Bits and group of quantized keys (``"k"``) or values (``"v"``)."""
    bits, group = features.get("kv_bits"), features.get("kv_group", 64)
    if name == "v":
        bits, group = features.get("value_bits") or bits, features.get("value_group") or group
    return bits, group


def v_width(v: mx.array, features: dict[str, Any]) -> int:
    """Columns of the values."""
    bits, _ = packing_of("v", features)
    return int(v.shape[3] if bits is None else v.shape[3] * 32 // bits)


def located(q: mx.array, k: mx.array, v: mx.array, features: dict[str, Any]) -> Located:
    """The keys and values that a call sees."""
    inputs = _constant_places(features.get("inputs") or NOTHING)
    paged = features.get("page_size") is not None
    on_page = None
    if paged:
        on_page = _on_page(inputs.block_table, k.shape[0], k.shape[2])
        inputs = _gathered_scales(inputs)
        k, v = (_gathered(x, inputs.block_table) for x in (k, v))
    if features.get("kv_bits") is not None:
        k = _dequantized("k", k, inputs.k_scales, inputs.k_biases, q.dtype, features)
        v = _dequantized("v", v, inputs.v_scales, inputs.v_biases, q.dtype, features)
    sequence_keys = k.shape[2]
    if paged and features.get("varlen"):  # all sequences' keys one after the other
        k, v = (_joined(x) for x in (k, v))
    at = _places(q, k, sequence_keys, on_page, features, inputs)
    if inputs.seqused_q is not None:
        _, rows = features.get("block", (0, q.shape[2]))
        at = _used(at, inputs.seqused_q, rows, inputs.cu_q)
    if inputs.q_offset is not None:
        number = at.i + inputs.q_offset[at.b]
        at = dataclasses.replace(at, i=number, own=number, row=at.i)
    if inputs.kv_starts is not None:
        begun = at.j >= inputs.kv_starts[at.b]
        at = dataclasses.replace(at, there=begun if at.there is None else at.there & begun)
    if at.there is not None:  # what lies elsewhere may be anything, and 0 * nan is nan
        used = at.there.any(axis=(0, 1, 2)) if features.get("varlen") else at.there[:, 0, 0]
        used = mx.broadcast_to(used, (q.shape[0], k.shape[2]))[:, None, :, None]
        k, v = (mx.where(used, x, mx.array(0, x.dtype)) for x in (k, v))
    return Located(k, v, at, inputs)


def scores_of(
    q: mx.array, call: Located, scale: float | mx.array, features: dict[str, Any]
) -> mx.array:
    """``(B, H, Lq, Lk)``, scores after everything that changes them; -inf where not seen."""
    at = call.at
    wide = q.astype(mx.float32)
    if at.rows is not None:
        wide = mx.where(at.rows[:, None], wide, 0.0)
    if at.used is not None:
        wide = mx.where(at.used, wide, 0.0)
    if features.get("rope") is not None:
        wide = _turned(wide, at, features, call.inputs).astype(q.dtype).astype(mx.float32)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = call.k.shape[1:3]
    shape = (batch, heads, q_len, kv_len)
    grouped = (wide * scale).reshape(batch, kv_heads, heads // kv_heads, q_len, head_dim)
    keys = call.k.astype(mx.float32)[:, :, None]
    scores = (grouped @ keys.swapaxes(-1, -2)).reshape(shape)
    scores = _changed(scores, at, features, call.inputs)
    seen = _seen(shape, at, features, call.inputs)
    return scores if seen is None else mx.where(seen, scores, -mx.inf)


def kept(call: Located, features: dict[str, Any]) -> mx.array:
    """What dropout multiplies weights by: 0, or the inverse of the share that it keeps."""
    p, at = features["dropout"], call.at
    gone = philox.dropped(mx, call.inputs.dropout_key, p, at.b, at.h, at.i, at.j)
    return mx.where(gone, 0.0, 1 / (1 - p))


def _constant_places(inputs: Inputs) -> Inputs:
    """Without gradients of what says where things are, which MLX's gather refuses to give."""
    names = (
        *("cu_q", "cu_k", "kv_lens", "kv_starts", "seqused_q", "q_offset"),
        *("block_table", "rope_offset", "dropout_key"),
    )
    found = {name: getattr(inputs, name) for name in names}
    constant: dict[str, Any] = {
        name: mx.stop_gradient(array) for name, array in found.items() if array is not None
    }
    return dataclasses.replace(inputs, **constant) if constant else inputs


def _softmax(scores: mx.array, sinks: mx.array | None) -> tuple[mx.array, mx.array]:
    """Weights and their log-sum-exp; a row that sees nothing has zeros, and no NaN gradient."""
    if scores.shape[3]:
        peak = mx.stop_gradient(scores.max(axis=-1, keepdims=True))
    else:
        peak = mx.full((*scores.shape[:3], 1), -mx.inf)
    if sinks is not None:
        peak = mx.maximum(peak, mx.stop_gradient(sinks))
    peak = mx.where(peak == -mx.inf, 0.0, peak)
    weights = mx.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total = total + mx.exp(sinks - peak)
    safe = mx.where(total == 0.0, 1.0, total)
    lse = mx.where(total == 0.0, -mx.inf, peak + mx.log(safe))
    return weights / safe, lse[..., 0]


def _places(
    q: mx.array,
    k: mx.array,
    sequence_keys: int,
    on_page: mx.array | None,
    features: dict[str, Any],
    inputs: Inputs,
) -> Places:
    heads, own_rows, keys = q.shape[1], q.shape[2], k.shape[2]
    first, rows = features.get("block", (0, own_rows))  # of the queries of a call
    h = mx.arange(heads, dtype=mx.int32)[:, None, None]
    row = mx.arange(first, first + own_rows, dtype=mx.int32)[:, None]
    key = mx.arange(keys, dtype=mx.int32)
    kv_lens = inputs.kv_lens
    if kv_lens is not None:
        kv_lens = mx.clip(kv_lens, 0, sequence_keys)
    if not features.get("varlen"):
        b = mx.arange(q.shape[0], dtype=mx.int32)[:, None, None, None]
        if kv_lens is None:
            return Places(b, h, row, key, row + (keys - rows))
        kv_len = kv_lens[:, None, None, None]
        there = key < kv_len
        if on_page is not None:
            there = there & on_page[:, None, None, :]
        return Places(b, h, row, key, row + kv_len - rows, there)

    cu_q = _starts(inputs.cu_q, rows)
    b = _sequence(row, cu_q)
    begin, end = cu_q[b], mx.maximum(cu_q[b], cu_q[b + 1])
    live = (row >= begin) & (row < end)
    if kv_lens is not None:
        count = max(1, sequence_keys)
        of_key, j = key // count, key % count
        kv_len = kv_lens[b]
        there = (of_key == b) & (j < kv_len)
    else:
        cu_k = _starts(inputs.cu_k, keys)
        of_key = _sequence(key[:, None], cu_k)[:, 0]
        j = key - cu_k[of_key]
        kv_len = mx.maximum(cu_k[b + 1] - cu_k[b], 0)
        there = (of_key == b) & (j >= 0) & (j < kv_len)
    if on_page is not None:
        there = there & on_page.reshape(-1)
    i = row - begin
    there = mx.broadcast_to(there & live, (1, 1, own_rows, keys))
    return Places(b, h, i, j, i + kv_len - (end - begin), there, live[:, 0])


def _used(at: Places, used: mx.array, rows: int, cu_q: mx.array | None) -> Places:
    """With queries behind the used ones left out, and the others aligned at the lower right."""
    count = mx.array(rows)
    if cu_q is not None:
        starts = _starts(cu_q, rows)
        count = mx.maximum(starts[1:] - starts[:-1], 0)
    used = mx.clip(used, 0, count)
    some = at.i < used[at.b]
    there = some if at.there is None else at.there & some
    own = at.own + mx.broadcast_to(count, used.shape)[at.b] - used[at.b]
    return dataclasses.replace(at, own=own, used=some, there=there)


def _starts(starts: mx.array | None, size: int) -> mx.array:
    assert starts is not None
    return mx.clip(starts, 0, size)


def _sequence(place: mx.array, starts: mx.array) -> mx.array:
    """Number of the packed sequence that a place ``(n, 1)`` lies in; the last one's after it."""
    inner = starts[1:-1]
    if inner.size == 0:
        return mx.zeros(place.shape, mx.int32)
    return (inner[None, :] <= place).sum(axis=1, keepdims=True).astype(mx.int32)


def _changed(scores: mx.array, at: Places, features: dict[str, Any], inputs: Inputs) -> mx.array:
    """Scores after everything that changes them, in the order that `AttentionConfig` gives."""
    if (cap := features.get("softcap")) is not None:
        scores = cap * mx.tanh(scores / cap)
    if (text := features.get("score_mod")) is not None:
        found = _evaluated(text, at, inputs.score, {"score": scores})
        scores = mx.broadcast_to(found, scores.shape)
    if inputs.alibi_slopes is not None:
        distance = mx.abs(at.own - at.j).astype(mx.float32)
        slopes = inputs.alibi_slopes
        each = slopes[:, None, None] if slopes.ndim == 1 else slopes[at.b, at.h]
        scores = scores - each * distance
    if inputs.bias is not None:
        scores = scores + inputs.bias.astype(mx.float32)
    return scores


def _seen(
    shape: tuple[int, ...], at: Places, features: dict[str, Any], inputs: Inputs
) -> mx.array | None:
    """Which keys queries see, in booleans that broadcast to `shape`; None: all."""
    masks: list[mx.array] = []
    if at.there is not None:
        masks.append(at.there)
    if features.get("causal"):
        masks.append(at.j <= at.own)
    if (left := features.get("window_left")) is not None:
        masks.append(at.j >= at.own - left)
    if (right := features.get("window_right")) is not None:
        masks.append(at.j <= at.own + right)
    if (text := features.get("mask_mod")) is not None:
        masks.append(mx.broadcast_to(_evaluated(text, at, inputs.mask, {}), shape))
    if inputs.array_mask is not None:
        masks.append(inputs.array_mask)
    return functools.reduce(mx.logical_and, masks) if masks else None


def _evaluated(
    text: str, at: Places, arrays: tuple[mx.array, ...], more: dict[str, mx.array]
) -> mx.array:
    from metalgen.dsl.graph import parse

    places = {"b": at.b, "h": at.h, "q": at.i, "kv": at.j, **more}
    arrays = tuple(a if _is_floating(a) else mx.stop_gradient(a) for a in arrays)
    value: mx.array = parse(text).evaluate(mx, places, arrays)
    return value


def _is_floating(array: mx.array) -> bool:
    return mx.issubdtype(array.dtype, mx.floating)


def places_of_queries(q: mx.array, k: mx.array, varlen: bool, inputs: Inputs) -> Places:
    """Where the rows of q stand; ``j`` is nothing's.

    Args:
        q, k: ``(B, H, Lq, D)`` and ``(B, Hkv, Lk, D)``.
        varlen: whether sequences are packed.
        inputs: of the call; where it has a `q_offset`, queries count from there.
    """
    row = mx.arange(q.shape[2], dtype=mx.int32)[:, None]
    h = mx.arange(q.shape[1], dtype=mx.int32)[:, None, None]
    b = mx.arange(q.shape[0], dtype=mx.int32)[:, None, None, None]
    if varlen:
        cu_q = _starts(inputs.cu_q, q.shape[2])
        b = _sequence(row, cu_q)
        row = row - cu_q[b]
    number = row if inputs.q_offset is None else row + inputs.q_offset[b]
    return Places(b, h, number, mx.zeros((), mx.int32), number)


def places_of_keys(q: mx.array, k: mx.array, varlen: bool, inputs: Inputs) -> Places:
    """The same of the rows of k, for each head of q; ``i`` is nothing's."""
    key = mx.arange(k.shape[2], dtype=mx.int32)
    h = mx.arange(q.shape[1], dtype=mx.int32)[:, None, None]
    b = mx.arange(q.shape[0], dtype=mx.int32)[:, None, None, None]
    if varlen:
        cu_k = _starts(inputs.cu_k, k.shape[2])
        b = _sequence(key[:, None], cu_k)[:, 0]
        key = key - cu_k[b]
    nothing = mx.zeros((), mx.int32)
    return Places(b, h, nothing, key, nothing)


def rotate_queries(q: mx.array, *, config: AttentionConfig, inputs: Inputs) -> mx.array:
    """Queries ``(B, H, Lq, D)`` rotated by their positions, in float32, rounded to their type."""
    names = ("rope", "rope_fixed", "rope_tables")
    features = {name: getattr(config, name) for name in names}
    rows = mx.arange(q.shape[2], dtype=mx.int32)[:, None]
    b, i = mx.arange(q.shape[0], dtype=mx.int32)[:, None, None, None], rows
    if config.varlen:
        cu_q = _starts(inputs.cu_q, q.shape[2])
        b = _sequence(rows, cu_q)
        i = rows - cu_q[b]
    at = Places(b, b, i, i, i)  # of which b and i are looked at
    return _turned(q.astype(mx.float32), at, features, inputs).astype(q.dtype)


def _turned(q: mx.array, at: Places, features: dict[str, Any], inputs: Inputs) -> mx.array:
    offset = inputs.rope_offset
    assert offset is not None
    row = at.i if at.row is None else at.row
    row = row * (not features.get("rope_fixed", False))
    position = offset[at.b] + row  # (B or 1, 1, L, 1) or (L, 1)
    if features.get("rope_tables"):
        assert inputs.rope_cos is not None and inputs.rope_sin is not None
        inside = mx.clip(position[..., 0], 0, inputs.rope_cos.shape[0] - 1)
        cos, sin = inputs.rope_cos[inside], inputs.rope_sin[inside]
    else:
        assert inputs.rope_freqs is not None
        angles = position.astype(mx.float32) * inputs.rope_freqs
        cos, sin = mx.cos(angles), mx.sin(angles)
    return rotated(q, cos, sin, features["rope"])


def _dequantized(
    name: str,
    x: mx.array,
    scales: mx.array | None,
    biases: mx.array | None,
    dtype: mx.Dtype,
    features: dict[str, Any],
) -> mx.array:
    """``scale * q + bias`` in float32, rounded once: mx.dequantize rounds differently by device."""
    assert scales is not None and biases is not None
    bits, group = packing_of(name, features)
    assert bits is not None
    shifts = mx.arange(0, 32, bits, dtype=mx.uint32)
    numbers = (x[..., None] >> shifts) & mx.array(2**bits - 1, mx.uint32)
    groups = (*scales.shape, group)
    numbers = numbers.astype(mx.float32).reshape(groups)
    scale, bias = (a.astype(mx.float32)[..., None] for a in (scales, biases))
    width = groups[3] * groups[4]
    return (scale * numbers + bias).astype(dtype).reshape(*x.shape[:3], width)


def _gathered(pages: mx.array, table: mx.array | None) -> mx.array:
    """``(N, Hkv, keys, D)`` of ``(pages, Hkv, page_size, D)``; anything for bad numbers."""
    assert table is not None
    count, heads, size, width = pages.shape
    shape = (table.shape[0], heads, table.shape[1] * size, width)
    if count == 0 or table.size == 0:
        return mx.zeros(shape, pages.dtype)
    return pages[mx.clip(table, 0, count - 1)].swapaxes(1, 2).reshape(shape)


def _joined(x: mx.array) -> mx.array:
    """``(1, Hkv, N * keys, D)`` of ``(N, Hkv, keys, D)``."""
    count, heads, keys, width = x.shape
    return x.swapaxes(0, 1).reshape(1, heads, count * keys, width)


def _gathered_scales(inputs: Inputs) -> Inputs:
    names = ("k_scales", "k_biases", "v_scales", "v_biases")
    found = {name: getattr(inputs, name) for name in names}
    gathered: dict[str, Any] = {
        name: _gathered(array, inputs.block_table)
        for name, array in found.items()
        if array is not None
    }
    return dataclasses.replace(inputs, **gathered)


def _on_page(table: mx.array | None, pages: int, page_size: int) -> mx.array:
    """``(N, keys)``: whether a key's page is one that exists."""
    assert table is not None
    return mx.repeat((table >= 0) & (table < pages), page_size, axis=1)
