"""Attention as docs/attention.md says it, one row after the other, in float64.

A third way to compute it, written from the page alone: it shares no line with `metalgen.reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np


@dataclass
class Facts:
    """What a call's arrays mean, in NumPy; names as in `metalgen.attention`.

    Args:
        turns: style, radians a position of each pair, and for each sequence the first position.
        score, mask: functions of numbers: ``score(s, b, h, i, j)``, ``mask(b, h, i, j)``.
        dtype: queries are rounded to it once they are turned.
    """

    q: Any
    k: Any
    v: Any
    dtype: mx.Dtype
    scale: float | None = None
    starts_q: list[int] | None = None
    starts_k: list[int] | None = None
    kv_lens: list[int] | None = None
    kv_starts: list[int] | None = None
    q_offset: list[int] | None = None
    seqused_q: list[int] | None = None
    table: list[list[int]] | None = None
    turns: tuple[str, Any, list[int] | None] | None = None
    score: Any = None
    mask: Any = None
    options: dict[str, Any] = field(default_factory=dict)


def exact(x: mx.array) -> Any:
    """An array in float64."""
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x).astype(np.float64)


def dequantized(parts: Any, group: int, bits: int, dtype: mx.Dtype) -> Any:
    """``scale * level + bias``, rounded once; levels lie in the words from the lowest bits on."""
    words, scales, biases = parts
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    levels = (np.array(words)[..., None] >> shifts) & np.uint32(2**bits - 1)
    levels = levels.reshape(*words.shape[:-1], -1).astype(np.float64)
    scale, bias = (np.repeat(exact(x), group, axis=-1) for x in (scales, biases))
    return rounded(levels * scale + bias, dtype)


def rounded(x: Any, dtype: mx.Dtype) -> Any:
    return exact(mx.array(np.float32(x)).astype(dtype))


def sequences(f: Facts) -> Iterator[tuple[int, int, range, Any, Any, Any]]:
    """Number, batch entry, rows, keys, values of each sequence, and which of its keys are there."""
    count = len(f.q) if f.starts_q is None else len(f.starts_q) - 1
    for n in range(count):
        entry, rows = (n, range(f.q.shape[2]))
        if f.starts_q is not None:
            entry, rows = 0, range(f.starts_q[n], f.starts_q[n + 1])
        if f.table is not None:
            assert f.kv_lens is not None
            size = f.k.shape[2]
            pages = [f.table[n][j // size] for j in range(f.kv_lens[n])]
            there = np.array([0 <= page < len(f.k) for page in pages], dtype=bool)
            found = [
                np.array(
                    [
                        x[page, :, j % size] if there[j] else np.zeros_like(x[0, :, 0])
                        for j, page in enumerate(pages)
                    ]
                ).reshape(-1, x.shape[1], x.shape[3])
                if len(x)
                else np.zeros((len(pages), x.shape[1], x.shape[3]))
                for x in (f.k, f.v)
            ]
            yield n, entry, rows, *(x.swapaxes(0, 1) for x in found), there
            continue
        keys = slice(0, f.k.shape[2] if f.kv_lens is None else f.kv_lens[n])
        if f.starts_q is not None:
            starts = f.starts_q if f.starts_k is None else f.starts_k
            keys = slice(starts[n], starts[n + 1])
        k, v = f.k[entry][:, keys], f.v[entry][:, keys]
        yield n, entry, rows, k, v, np.ones(k.shape[1], dtype=bool)


def definition(f: Facts) -> tuple[Any, Any]:
    """Output and log-sum-exp."""
    heads = f.q.shape[1]
    out = np.zeros((*f.q.shape[:3], f.v.shape[3]))
    lse = np.full(f.q.shape[:3], -np.inf)
    for n, entry, rows, k, v, there in sequences(f):
        if f.kv_starts is not None:
            there &= np.arange(len(there)) >= f.kv_starts[n]
        if f.seqused_q is not None:
            rows = rows[: f.seqused_q[n]]
        for h in range(heads):
            own_k, own_v = (x[h * len(k) // heads] for x in (k, v))
            for i, row in enumerate(rows):
                query = turned(f, f.q[entry, h, row], n, i, len(rows), len(own_k))
                seen, logits = row_of(f, query, own_k, there, (n, entry, h, i, row), len(rows))
                if "sinks" in f.options:
                    logits = np.append(logits, f.options["sinks"][h])
                if not len(logits) or np.isneginf(logits).all():
                    continue
                weights = np.exp(logits - logits.max())
                lse[entry, h, row] = logits.max() + np.log(weights.sum())
                out[entry, h, row] = weights[: seen.sum()] / weights.sum() @ own_v[seen]
    return out, lse


def row_of(
    f: Facts, query: Any, keys: Any, there: Any, at: tuple[int, ...], q_len: int
) -> tuple[Any, Any]:
    """Which keys a row sees, and its logits with them."""
    n, entry, h, i, row = at
    o, j = f.options, np.arange(len(keys))
    own = i + len(keys) - q_len
    if f.q_offset is not None:
        own = i = i + f.q_offset[n]
    s = (len(query) ** -0.5 if f.scale is None else f.scale) * (keys @ query)
    if "softcap" in o:
        s = o["softcap"] * np.tanh(s / o["softcap"])
    if f.score is not None:
        s = np.array([f.score(x, n, h, i, t) for t, x in enumerate(s)], dtype=np.float64)
    if "alibi_slopes" in o:
        s = s - o["alibi_slopes"][h] * np.abs(own - j)
    if "bias" in o:
        s = s + broadcast(o["bias"], f, entry, h, row)[: len(j)]
    seen = there & ((j <= own) | (not o.get("causal", False)))
    seen &= j >= own - o.get("window_left", np.inf)
    seen &= j <= own + o.get("window_right", np.inf)
    if "mask" in o:
        seen &= broadcast(o["mask"], f, entry, h, row)[: len(j)]
    if f.mask is not None:
        seen &= np.array([bool(f.mask(n, h, i, t)) for t in j], dtype=bool)
    return seen, s[seen]


def broadcast(x: Any, f: Facts, entry: int, h: int, row: int) -> Any:
    places = f.k.shape[2] if f.table is None else len(f.table[entry]) * f.k.shape[2]
    return np.broadcast_to(x, (*f.q.shape[:3], places))[entry, h, row]


def turned(f: Facts, query: Any, n: int, i: int, q_len: int, kv_len: int) -> Any:
    if f.turns is None:
        return query
    style, radians, offsets = f.turns
    first = kv_len - q_len if f.q_offset is None else f.q_offset[n]
    position = i + (first if offsets is None else offsets[n])
    angles = np.float64(np.float32(position) * np.float32(radians))
    c, half = np.arange(len(radians)), len(radians)
    x, y = (c, c + half) if style == "half" else (2 * c, 2 * c + 1)
    found = query.copy()
    found[x] = query[x] * np.cos(angles) - query[y] * np.sin(angles)
    found[y] = query[x] * np.sin(angles) + query[y] * np.cos(angles)
    return rounded(found, f.dtype)
