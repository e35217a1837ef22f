"""Rotary embedding by tables of cosines and sines (``flash_attn.layers.rotary``).

MLX operations compute it. "In place" has flash-attn's meaning for the caller: the array that is
handed over is the rotated one afterwards, outside of ``mx.compile``.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError
from metalgen.flash_attn.arguments import array, integers, per_sequence


def apply_rotary_emb(
    x: Any,
    cos: Any,
    sin: Any,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: Any = 0,
    cu_seqlens: Any = None,
    max_seqlen: int | None = None,
    *,
    _one_position: bool = False,
) -> mx.array:
    """Rows rotated by their positions.

    Args:
        x: ``(B, L, H, D)``, or with `cu_seqlens` packed sequences ``(T, H, D)``.
        cos, sin: ``(positions, rotary_dim / 2)``; the first `rotary_dim` columns rotate. A position
            beyond the table takes its last row.
        interleaved: columns 2 c and 2 c + 1 rotate together, else c and c + rotary_dim / 2.
        inplace: `x` is the result afterwards.
        seqlen_offsets: position of each sequence's first row, an integer or ``(B,)``.
        cu_seqlens: ``(N + 1,)``, where packed sequences start.
        max_seqlen: no effect.

    Returns:
        The rotated rows, of the shape and type of `x`; computed in float32.

    Raises:
        ArgumentError: shapes or types that cannot be used.
    """
    given = x
    packed = cu_seqlens is not None
    x = array("x", x, 3 if packed else 4, "(T, H, D)" if packed else "(B, L, H, D)")
    cos, sin = (array(name, t, 2, "(positions, rotary_dim / 2)") for name, t in _both(cos, sin))
    if cos.shape != sin.shape:
        raise ArgumentError("sin.shape", f"{cos.shape}, as cos has", sin.shape)
    turned = 2 * cos.shape[1]
    if turned > x.shape[-1] or not cos.shape[0]:
        expected = f"one row or more, of at most {x.shape[-1] // 2} columns"
        raise ArgumentError("cos.shape", expected, cos.shape)
    position = _positions(x, seqlen_offsets, cu_seqlens, _one_position)
    position = mx.clip(position, 0, cos.shape[0] - 1)
    # An axis for the heads, which all rotate alike.
    cosine, sine = (mx.expand_dims(t.astype(mx.float32)[position], -2) for t in (cos, sin))
    rows = x[..., :turned].astype(mx.float32)
    if interleaved:
        one, other = rows[..., ::2], rows[..., 1::2]
    else:
        one, other = rows[..., : turned // 2], rows[..., turned // 2 :]
    pair = [one * cosine - other * sine, one * sine + other * cosine]
    if interleaved:
        rotated = mx.stack(pair, axis=-1).reshape(rows.shape)
    else:
        rotated = mx.concatenate(pair, axis=-1)
    out = mx.concatenate([rotated.astype(x.dtype), x[..., turned:]], axis=-1)
    if inplace and isinstance(given, mx.array):
        given[...] = out
        return given
    return out


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Any,
    cos: Any,
    sin: Any,
    cos_k: Any = None,
    sin_k: Any = None,
    interleaved: bool = False,
    seqlen_offsets: Any = 0,
    num_heads_q: int | None = None,
) -> mx.array:
    """Queries and keys of a packed array rotated in place, and that array.

    Args:
        qkv: ``(B, L, 3, H, D)``, or with `num_heads_q` ``(B, L, H + 2 Hk, D)``.
        cos, sin, cos_k, sin_k: tables; those of the keys are those of the queries where None.
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.
    """
    qkv = found = array("qkv", qkv)
    if qkv.ndim not in (4, 5) or (qkv.ndim == 4) != (num_heads_q is not None):
        expected = "(B, L, 3, H, D), or with num_heads_q (B, L, H + 2 Hk, D)"
        raise ArgumentError("qkv.shape", expected, qkv.shape)
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k
    whole = slice(None)
    parts: list[Any] = [(whole, whole, 0), (whole, whole, 1)]
    if num_heads_q is not None:
        middle = num_heads_q + (qkv.shape[2] - num_heads_q) // 2
        parts = [(whole, whole, slice(num_heads_q)), (whole, whole, slice(num_heads_q, middle))]
    for part, tables in zip(parts, ((cos, sin), (cos_k, sin_k)), strict=True):
        qkv[part] = apply_rotary_emb(qkv[part], *tables, interleaved, seqlen_offsets=seqlen_offsets)
    return found


def apply_rotary_emb_kv_(
    kv: Any, cos: Any, sin: Any, interleaved: bool = False, seqlen_offsets: Any = 0
) -> mx.array:
    """Keys of a packed array ``(B, L, 2, Hk, D)`` rotated in place, and that array."""
    found = array("kv", kv, 5, "(B, L, 2, H, D)")
    keys = found[:, :, 0]
    found[:, :, 0] = apply_rotary_emb(keys, cos, sin, interleaved, seqlen_offsets=seqlen_offsets)
    return found


class RotaryEmbedding(nn.Module):  # type: ignore[misc, name-defined]
    """Rotary embedding with tables that grow as positions come (Su et al., 2021).

    Args:
        dim: columns that rotate.
        base: of the periods.
        interleaved: as in `apply_rotary_emb`.
        scale_base: of xPos (Sun et al., 2022), whose keys have tables of their own; None: none.
        device: no effect.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, float(base), interleaved
        self.scale_base = scale_base
        self._tables: tuple[int, mx.Dtype, list[mx.array]] | None = None

    def tables(self, positions: int, dtype: mx.Dtype) -> list[mx.array]:
        """Cosines and sines of queries, and of keys; ``(positions or more, dim / 2)`` each."""
        if self._tables is None or positions > self._tables[0] or dtype != self._tables[1]:
            pairs = mx.arange(0, self.dim, 2, dtype=mx.float32)
            place = mx.arange(positions, dtype=mx.float32)
            angle = place[:, None] / self.base ** (pairs / self.dim)
            found = [mx.cos(angle), mx.sin(angle)] * 2
            if self.scale_base is not None:
                growth = (pairs + 0.4 * self.dim) / (1.4 * self.dim)
                growth = growth ** ((place - positions // 2) / self.scale_base)[:, None]
                found = [x * growth for x in found[:2]] + [x / growth for x in found[2:]]
            self._tables = positions, dtype, [x.astype(dtype) for x in found]
        return self._tables[2]

    def __call__(
        self,
        qkv: mx.array,
        kv: mx.array | None = None,
        seqlen_offset: Any = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> mx.array | tuple[mx.array, mx.array]:
        """Rotated queries and keys; arrays that are handed over stay as they are.

        Args:
            qkv: ``(B, L, 3, H, D)``, or with `num_heads_q` ``(B, L, H + 2 Hk, D)``; with `kv` the
                queries alone, ``(B, L, H, D)``.
            kv: ``(B, L, 2, Hk, D)``.
            seqlen_offset: position of the first row, an integer or ``(B,)``.
            max_seqlen: positions that the tables must have, needed with an array of offsets.
        """
        last = as_integer(seqlen_offset)
        if max_seqlen is None:
            if last is None:
                expected = "the most positions, with an array of offsets"
                raise ArgumentError("max_seqlen", expected, None)
            max_seqlen = qkv.shape[1] + last
        cos, sin, cos_k, sin_k = self.tables(max_seqlen, qkv.dtype)
        how = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if kv is None:
            return apply_rotary_emb_qkv_(
                mx.array(qkv), cos, sin, cos_k, sin_k, num_heads_q=num_heads_q, **how
            )
        keys = apply_rotary_emb_kv_(mx.array(kv), cos_k, sin_k, **how)
        return apply_rotary_emb(qkv, cos, sin, **how), keys


def _both(cos: Any, sin: Any) -> tuple[tuple[str, Any], tuple[str, Any]]:
    return ("cos", cos), ("sin", sin)


def _positions(x: mx.array, offsets: Any, cu_seqlens: Any, one_position: bool) -> mx.array:
    """Of each row, ``(B, L)`` or ``(T,)``."""
    if cu_seqlens is None:
        first = per_sequence("seqlen_offsets", offsets, x.shape[0])[:, None]
        row = mx.zeros((x.shape[1],), mx.int32) if one_position else mx.arange(x.shape[1])
        return first + row
    starts = integers("cu_seqlens", cu_seqlens, 1)
    first = per_sequence("seqlen_offsets", offsets, starts.size - 1)
    row = mx.arange(x.shape[0])
    sequence = (row[:, None] >= starts[1:-1]).sum(axis=1)
    return row - starts[sequence] + first[sequence]
