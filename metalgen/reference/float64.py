"""Attention by its definition, in NumPy float64, one sequence after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metalgen import philox
from metalgen.dsl.graph import parse
from metalgen.problem.inputs import NOTHING, Inputs

Array = NDArray[Any]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Sequence:
    """One batch entry, or one packed sequence.

    Args:
        number: which.
        entry: index of q's first axis.
        rows: its rows of q.
        q, k, v: ``(H, Lq, D)``, ``(Hkv, Lk, D)`` and ``(Hkv, Lk, Dv)``.
        there: ``(Lk,)``, whether a key is there at all.
        keys: its rows of k and v; None where they are pages.
        offset: the number of its first query, where the call gives one.
        used: how many of its queries there are; None: all.
    """

    number: int
    entry: int
    rows: slice
    q: Float64
    k: Float64
    v: Float64
    there: NDArray[np.bool_]
    keys: slice | None
    offset: int | None = None
    used: int | None = None


def attention(
    q: Any, k: Any, v: Any, scale: float, features: dict[str, Any]
) -> tuple[Float64, Float64]:
    """What `metalgen.reference.attention_float64` describes."""
    inputs = features.get("inputs") or NOTHING
    queries, keys, values = arrays_of(q, k, v, features, inputs)
    out = np.zeros((*queries.shape[:3], values.shape[3]))
    lse = np.full(queries.shape[:3], -np.inf)
    for sequence in sequences_of(queries, keys, values, features, inputs):
        place = sequence.entry, slice(None), sequence.rows
        out[place], lse[place] = _of_sequence(sequence, queries.shape, scale, features, inputs)
    return out, lse


def arrays_of(
    q: Any, k: Any, v: Any, features: dict[str, Any], inputs: Inputs
) -> tuple[Float64, Float64, Float64]:
    """Queries, keys and values of a call, dequantized."""
    keys = _dequantized("k", k, inputs.k_scales, inputs.k_biases, features)
    return as_float64(q), keys, _dequantized("v", v, inputs.v_scales, inputs.v_biases, features)


def sequences_of(
    q: Float64, k: Float64, v: Float64, features: dict[str, Any], inputs: Inputs
) -> Iterator[Sequence]:
    """The sequences of a call, one after the other."""
    varlen = features.get("varlen", False)
    count = _integers(inputs.cu_q).size - 1 if varlen else q.shape[0]
    for n in range(count):
        entry, rows = n, slice(0, q.shape[2])
        if varlen:
            entry, rows = 0, _span(_integers(inputs.cu_q), n, q.shape[2])
        if features.get("page_size") is not None:
            own_k, own_v, there = _from_pages(k, v, features["page_size"], inputs, n)
            own = None
        else:
            own = slice(0, k.shape[2])
            if varlen:
                own = _span(_integers(inputs.cu_k), n, k.shape[2])
            elif features.get("kv_lens"):
                own = slice(0, int(np.clip(_integers(inputs.kv_lens)[n], 0, k.shape[2])))
            own_k, own_v = k[entry][:, own], v[entry][:, own]
            there = np.ones(own_k.shape[1], dtype=bool)
        if features.get("kv_starts"):
            there = there & (np.arange(there.size) >= _integers(inputs.kv_starts)[n])
            own_k, own_v = (np.where(there[:, None], x, 0.0) for x in (own_k, own_v))
        offset = int(_integers(inputs.q_offset)[n]) if features.get("q_offset") else None
        own_q, used = q[entry][:, rows], None
        if features.get("seqused_q"):
            used = int(np.clip(_integers(inputs.seqused_q)[n], 0, own_q.shape[1]))
            own_q = np.where(np.arange(own_q.shape[1])[:, None] < used, own_q, 0.0)
        yield Sequence(n, entry, rows, own_q, own_k, own_v, there, own, offset, used)


@dataclass(frozen=True)
class Weights:
    """The softmax of one sequence.

    Args:
        q: ``(H, Lq, D)``, rotated where the config asks for it.
        k, v: ``(H, Lk, ...)``, repeated for the query heads that share them.
        raw: ``(H, Lq, Lk)``, scaled scores before anything changes them.
        seen: booleans of that shape.
        scores: after everything that changes them; -inf where not seen.
        weights: their softmax; ``dropped``: the same after dropout.
        lse: ``(H, Lq)``.
    """

    q: Float64
    k: Float64
    v: Float64
    raw: Float64
    seen: NDArray[np.bool_]
    scores: Float64
    weights: Float64
    dropped: Float64
    lse: Float64


def _of_sequence(
    s: Sequence, shape: tuple[int, ...], scale: float, features: dict[str, Any], inputs: Inputs
) -> tuple[Float64, Float64]:
    found = weights_of(s, shape, scale, features, inputs)
    return found.dropped @ found.v, found.lse


def places_of(s: Sequence) -> dict[str, Array]:
    """Where the scores of a sequence stand, as score and mask functions see it."""
    return {
        "b": np.full((1, 1, 1), s.number, np.int32),
        "h": np.arange(s.q.shape[0], dtype=np.int32)[:, None, None],
        "q": np.arange(s.q.shape[1], dtype=np.int32)[:, None] + np.int32(s.offset or 0),
        "kv": np.arange(s.k.shape[1], dtype=np.int32),
    }


def own_keys(s: Sequence) -> Array:
    """The key at each query's own position."""
    queries = places_of(s)["q"]
    count = s.q.shape[1] if s.used is None else s.used
    return queries + s.k.shape[1] - count if s.offset is None else queries


def changed(
    raw: Float64, s: Sequence, shape: tuple[int, ...], features: dict[str, Any], inputs: Inputs
) -> Float64:
    """Scores after everything that changes them, before masks."""
    places = places_of(s)
    j, kv_len = places["kv"], s.k.shape[1]
    scores = raw
    if (cap := features.get("softcap")) is not None:
        scores = cap * np.tanh(scores / cap)
    if (text := features.get("score_mod")) is not None:
        captured = [_captured(a) for a in inputs.score]
        scores = parse(text).evaluate(np, {**places, "score": scores}, captured)
        scores = np.broadcast_to(scores, raw.shape)
    if features.get("alibi"):
        slopes = as_float64(inputs.alibi_slopes)
        slopes = slopes if slopes.ndim == 1 else slopes[s.number]
        scores = scores - slopes[:, None, None] * np.abs(own_keys(s) - j)
    if features.get("bias"):
        scores = scores + _entry(inputs.bias, s, shape)[:, :, :kv_len]
    return scores


def weights_of(
    s: Sequence, shape: tuple[int, ...], scale: float, features: dict[str, Any], inputs: Inputs
) -> Weights:
    """The softmax of a sequence of a call, whose q has a shape."""
    heads = s.q.shape[0]
    places = places_of(s)
    h, i, j = places["h"], places["q"], places["kv"]
    own = own_keys(s)
    q = _turned(s.q, features, inputs, s.number) if features.get("rope") else s.q
    k, v = (np.repeat(x, heads // x.shape[0], axis=0) for x in (s.k, s.v))
    raw = scale * (q @ np.swapaxes(k, 1, 2))
    scores = changed(raw, s, shape, features, inputs)

    # What is seen
    seen = np.broadcast_to(s.there, scores.shape)
    if s.used is not None:
        seen = seen & (np.arange(s.q.shape[1])[:, None] < s.used)
    if features.get("causal"):
        seen = seen & (j <= own)
    if (left := features.get("window_left")) is not None:
        seen = seen & (j >= own - left)
    if (right := features.get("window_right")) is not None:
        seen = seen & (j <= own + right)
    if (text := features.get("mask_mod")) is not None:
        seen = seen & parse(text).evaluate(np, places, [_captured(a) for a in inputs.mask])
    if features.get("array_mask"):
        seen = seen & (_entry(inputs.array_mask, s, shape)[:, :, : s.k.shape[1]] != 0)
    scores = np.where(seen, scores, -np.inf)

    # Softmax, and the values
    peak = scores.max(axis=2, keepdims=True, initial=-np.inf)
    if features.get("sinks"):
        sinks = as_float64(inputs.sinks)[:, None, None]
        peak = np.maximum(peak, sinks)
    base = np.where(np.isfinite(peak), peak, 0.0)
    weights = np.exp(scores - base)
    total = weights.sum(axis=2, keepdims=True)
    if features.get("sinks"):
        total = total + np.exp(sinks - base)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, base + np.log(total), -np.inf)[:, :, 0]
    weights = weights / np.where(total == 0, 1.0, total)
    dropped = weights
    if p := features.get("dropout", 0.0):
        key = np.array(inputs.dropout_key)
        gone = philox.dropped(np, key, p, places["b"], h, i, j)
        dropped = np.where(gone, 0.0, weights / (1 - p))
    return Weights(q, k, v, raw, seen, scores, weights, dropped, lse)


def _turned(q: Float64, features: dict[str, Any], inputs: Inputs, number: int) -> Float64:
    """Queries of a sequence after rotary embedding, rounded as the kernels round them."""
    return _rounded(rotated(q, features, inputs, number, 1), features)


def rotated(
    q: Float64, features: dict[str, Any], inputs: Inputs, number: int, direction: int
) -> Float64:
    """Rows of a sequence rotated by their positions, or (-1) back; angles in float32."""
    steps = np.arange(q.shape[1]) * (not features.get("rope_fixed", False))
    positions = int(_integers(inputs.rope_offset)[number]) + steps
    if features.get("rope_tables"):
        cos, sin = as_float64(inputs.rope_cos), as_float64(inputs.rope_sin)
        inside = np.clip(positions, 0, len(cos) - 1)
        cos, sin = cos[inside], direction * sin[inside]
    else:
        freqs = np.array(inputs.rope_freqs, dtype=np.float32)
        angles = (positions.astype(np.float32)[:, None] * freqs).astype(np.float64)
        cos, sin = np.cos(angles), direction * np.sin(angles)
    pair = np.arange(cos.shape[-1])
    if features["rope"] == "half":
        first, second = pair, pair + pair.size
    else:
        first, second = 2 * pair, 2 * pair + 1
    x, y = q[..., first], q[..., second]
    turned = q.copy()
    turned[..., first] = x * cos - y * sin
    turned[..., second] = x * sin + y * cos
    return turned


def _dequantized(
    name: str, x: Any, scales: mx.array | None, biases: mx.array | None, features: dict[str, Any]
) -> Float64:
    """``scale * q + bias``, rounded to the config's type; q in the words from the lowest bits."""
    bits, group = features.get("kv_bits"), features.get("kv_group", 64)
    if name == "v":
        bits = features.get("value_bits") or bits
        group = features.get("value_group") or group
    if bits is None:
        return as_float64(x)
    words = np.array(x, dtype=np.uint32)[..., None]
    numbers = words >> np.arange(0, 32, bits, dtype=np.uint32) & np.uint32(2**bits - 1)
    width = words.shape[3] * 32 // bits
    numbers = numbers.reshape(*words.shape[:3], width).astype(np.float64)
    scale, bias = (np.repeat(as_float64(a), group, axis=3) for a in (scales, biases))
    with np.errstate(invalid="ignore"):  # anything may lie where nothing is looked at
        return _rounded(scale * numbers + bias, features)


def _from_pages(
    k: Float64, v: Float64, page_size: int, inputs: Inputs, number: int
) -> tuple[Float64, Float64, NDArray[np.bool_]]:
    """Keys and values of a sequence, and which of them are on a page that exists."""
    table = _integers(inputs.block_table)[number]
    kv_len = int(np.clip(_integers(inputs.kv_lens)[number], 0, table.size * page_size))
    own_k, own_v = (np.zeros((x.shape[1], kv_len, x.shape[3])) for x in (k, v))
    there = np.zeros(kv_len, dtype=bool)
    for j in range(kv_len):
        page, slot = table[j // page_size], j % page_size
        if 0 <= page < k.shape[0]:
            own_k[:, j], own_v[:, j], there[j] = k[page, :, slot], v[page, :, slot], True
    return own_k, own_v, there


def _span(starts: Array, number: int, size: int) -> slice:
    """Where a packed sequence lies; whatever the numbers are, inside of the array."""
    begin = int(np.clip(starts[number], 0, size))
    return slice(begin, int(np.clip(starts[number + 1], begin, size)))


def _entry(array: mx.array | None, s: Sequence, shape: tuple[int, ...]) -> Float64:
    """A sequence's part of an array that broadcasts to ``(B, H, Lq, Lk)``."""
    wide = as_float64(array)
    own: Float64 = np.broadcast_to(wide, (*shape[:3], wide.shape[3]))[s.number]
    return own


def _rounded(x: Float64, features: dict[str, Any]) -> Float64:
    narrow = mx.array(x.astype(np.float32)).astype(getattr(mx, features.get("dtype", "float32")))
    return as_float64(narrow)


def as_float64(array: Any) -> Float64:
    """An array of MLX (of any type) or NumPy in float64."""
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    return np.asarray(array, dtype=np.float64)


def _captured(array: Any) -> Array:
    if isinstance(array, mx.array) and array.dtype == mx.bfloat16:
        array = array.astype(mx.float32)
    return np.array(array)


def _integers(array: mx.array | None) -> Array:
    return np.asarray(array).astype(np.int64)
