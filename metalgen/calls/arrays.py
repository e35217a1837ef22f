"""The queries, keys and values of a call: taken apart, of one type, heads before rows."""

from __future__ import annotations

import warnings
from typing import Any

import mlx.core as mx

from metalgen.arguments import check_integer
from metalgen.calls.options import Keys, Options
from metalgen.errors import ArgumentError
from metalgen.features.quantized import KV_BITS, KV_GROUPS
from metalgen.features.triple import arrays_of, bits_of, group_of
from metalgen.problem.config import MAX_HEAD_DIM

MANY_HEADS = 512
"""More query heads than any known model has: such a call has probably rows before heads."""
SWAPPED = "for arrays (B, L, H, D), pass q.swapaxes(1, 2), and k and v likewise"

Parts = tuple[mx.array, ...]
"""Rows alone; or, quantized, packed words, scales and biases."""


def main_arrays(
    q: mx.array, k: Keys, v: Keys, value_head_dim: int | None = None
) -> tuple[mx.array, Parts, Parts, dict[str, Any]]:
    """Queries, keys and values of one type, and the config's fields that they decide.

    Types that differ are promoted by MLX's rule, as in ``mx.fast.scaled_dot_product_attention``:
    float32 queries with bfloat16 keys are computed in float32. The fields are ``value_head_dim``
    and, where keys and values are quantized, bits and groups of both.

    Args:
        q, k, v: as of `metalgen.attention`.
        value_head_dim: width of the values; None: what v says.

    Raises:
        ArgumentError: what cannot be q, k and v of one call.
    """
    key, value = _taken_apart("k", k), _taken_apart("v", v)
    for name, x in (("q", q), ("k", key[0]), ("v", value[0])):
        if not isinstance(x, mx.array):
            raise ArgumentError(name, "an mlx.core.array", type(x).__name__)
        if x.ndim != 4:
            raise ArgumentError(f"{name}.shape", "4 axes (B, H, L, D)", x.shape)
    if len(key) != len(value):
        odd = "v" if len(key) == 3 else "k"
        other = "k" if odd == "v" else "v"
        expected = f"as {other} is: both the triples of mx.quantize, or both arrays"
        raise ArgumentError(odd, expected, type(v if odd == "v" else k).__name__)
    heads, kv_heads = q.shape[1], key[0].shape[1]
    if kv_heads == 0 or heads % kv_heads or heads == 0:
        expected = f"a number of heads that divides the {heads} of q"
        raise ArgumentError("k.shape", expected, key[0].shape)
    if heads > MANY_HEADS and q.shape[2] < heads:
        _warn_of_heads(q.shape)
    if len(key) == 1:
        if not q.dtype == key[0].dtype == value[0].dtype:
            q, key, value = _promoted(q, key, value)
        width = value[0].shape[3]
        if value_head_dim not in (None, width):
            raise ArgumentError("value_head_dim", f"{width}, as v has, or None", value_head_dim)
        return q, key, value, {"value_head_dim": width}
    bits, group = _quantization("k", key, q.shape[3])
    if value_head_dim is None:
        value_head_dim = _value_width(value, q.shape[3], bits, group)
    else:
        value_head_dim = check_integer("value_head_dim", value_head_dim, 1, MAX_HEAD_DIM)
    value_bits, value_group = _quantization("v", value, value_head_dim)
    fields = {
        "value_head_dim": value_head_dim,
        "kv_bits": bits,
        "kv_group": group,
        "value_bits": value_bits,
        "value_group": value_group,
    }
    if any(x.dtype != q.dtype for x in (*key[1:], *value[1:])):
        q, key, value = _promoted(q, key, value)
    return q, key, value, fields


def types_of(q: mx.array, k: Keys, v: Keys) -> dict[str, str]:
    """Names of the types of queries, keys and values; of quantized ones, of what they stand for."""
    parts = {"q": (q,), "k": _taken_apart("k", k), "v": _taken_apart("v", v)}
    return {name: str(x[-1].dtype).removeprefix("mlx.core.") for name, x in parts.items()}


def layout_hint(q: Any, k: Any, options: Options) -> str:
    """What to write where it looks as if the axes of a call were (B, L, H, D); else nothing."""
    key = k[0] if isinstance(k, (tuple, list)) and k else k
    if not all(isinstance(x, mx.array) and x.ndim == 4 for x in (q, key)):
        return ""
    batch, heads, rows, _ = q.shape
    kv_heads, kv_rows = key.shape[1:3]
    swapped = 0 < rows <= MANY_HEADS and 0 < kv_rows <= rows and rows % kv_rows == 0
    if not swapped:
        return ""
    misfits = kv_heads == 0 or heads % kv_heads != 0
    for name in ("alibi_slopes", "sinks"):
        x = options.get(name)
        misfits |= isinstance(x, mx.array) and heads != rows and x.shape == (rows,)
    for name in ("bias", "mask"):
        x = options.get(name)
        if isinstance(x, mx.array) and x.ndim == 4:
            fits = [
                all(a in (1, b) for a, b in zip(x.shape, whole, strict=True))
                for whole in ((batch, heads, rows, kv_rows), (batch, rows, heads, kv_heads))
            ]
            misfits |= fits == [False, True]
    return SWAPPED if misfits else ""


def _warn_of_heads(shape: tuple[int, ...]) -> None:
    warnings.warn(
        f"q of shape {shape} has {shape[1]} heads of {shape[2]} queries each: metalgen takes "
        f"(B, H, L, D); {SWAPPED}",
        UserWarning,
        stacklevel=6,
    )


def _promoted(q: mx.array, key: Parts, value: Parts) -> tuple[mx.array, Parts, Parts]:
    def rows(parts: Parts) -> Parts:
        return parts if len(parts) == 1 else parts[1:]

    dtype = mx.result_type(q, *rows(key), *rows(value))

    def cast(parts: Parts) -> Parts:
        return (*parts[: len(parts) - len(rows(parts))], *(x.astype(dtype) for x in rows(parts)))

    return q.astype(dtype), cast(key), cast(value)


def _taken_apart(name: str, x: Any) -> tuple[Any, ...]:
    if not isinstance(x, (tuple, list)):
        return (x,)
    if (found := arrays_of(x)) is None:
        what = f"mx.quantize({name}, group_size=64, bits=8)"
        expected = f"an mlx.core.array, or the three of 4 axes that {what} returns"
        raise ArgumentError(name, expected, [getattr(part, "shape", part) for part in x])
    return found


def _value_width(value: Parts, width: int, bits: int, group: int) -> int:
    """The width of quantized values: that of rows quantized as keys are, else that of keys.

    Words and scales alone do not tell 64 columns of 8 bits from 128 columns of 4 bits in groups
    twice as large; `value_head_dim` does.
    """
    alike = value[0].shape[3] * 32 // bits
    return alike if value[1].shape[3] * group == alike else width


def _quantization(name: str, parts: Parts, width: int) -> tuple[int, int]:
    """Bits and group of quantized rows of a width."""
    if parts[0].dtype != mx.uint32:
        raise ArgumentError(f"{name}[0].dtype", "uint32, as of mx.quantize", str(parts[0].dtype))
    bits = bits_of(parts[0], width)
    if bits is None:
        sizes = " or ".join(f"{width * b // 32} ({b} bits)" for b in KV_BITS)
        owner = "queries" if name == "k" else "values"
        expected = f"a last axis of {sizes} for {owner} of width {width}"
        raise ArgumentError(f"{name}[0].shape", expected, parts[0].shape)
    group = group_of(parts[1], width)
    if group is None:
        known = ", ".join(f"{width // g} (groups of {g})" for g in KV_GROUPS if width % g == 0)
        expected = f"a last axis of {known}" if known else "rows of a width that 32 divides"
        raise ArgumentError(f"{name}[1].shape", expected, parts[1].shape)
    return bits, group
