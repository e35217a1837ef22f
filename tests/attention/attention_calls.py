"""Arrays for calls of attention, and what MLX's own operations make of them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.calls.verify import relative_error
from metalgen.testing.devices import normal

WIDTH, SCALE = 32, 32**-0.5


def arrays(
    q_len: int = 21, kv_len: int = 37, *, dtype: str = "float32", batch: int = 2
) -> tuple[mx.array, mx.array, mx.array]:
    q = normal((batch, 4, q_len, WIDTH), dtype, 1)
    k, v = (normal((batch, 2, kv_len, WIDTH), dtype, seed) for seed in (2, 3))
    return q, k, v


def sdpa(q: mx.array, k: mx.array, v: mx.array, **keywords: Any) -> mx.array:
    """MLX's own attention, in float32."""
    if isinstance(keywords.get("mask"), mx.array) and keywords["mask"].dtype != mx.bool_:
        keywords["mask"] = keywords["mask"].astype(mx.float32)
    if keywords.get("sinks") is not None:
        keywords["sinks"] = keywords["sinks"].astype(mx.float32)
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, **keywords)


def assert_close(got: mx.array, expected: mx.array, tolerance: float | None = None) -> None:
    tolerance = tolerance or {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[got.dtype]
    assert got.shape == expected.shape
    error = relative_error(got, np.array(expected.astype(mx.float32), np.float64))
    assert error < tolerance, f"{error:.1e} of {tolerance:.0e}"


def seen_by(q_len: int, kv_len: int) -> mx.array:
    """Causal, aligned at the lower right."""
    return mx.arange(kv_len) <= mx.arange(q_len)[:, None] + (kv_len - q_len)


LENGTHS_Q, LENGTHS_K = (5, 0, 11, 1), (9, 3, 11, 7)


def packed() -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    q, k, v = arrays(sum(LENGTHS_Q) + 2, sum(LENGTHS_K) + 3, batch=1)
    cu_q, cu_k = (mx.array(np.cumsum([0, *x]).tolist()) for x in (LENGTHS_Q, LENGTHS_K))
    return q, k, v, cu_q, cu_k


PAGE, TABLE = 8, [[6, 1, 3, -1], [0, 5, 4, 2]]


def in_pages(x: mx.array) -> mx.array:
    """Rows ``(2, H, 32, ...)`` in pages of 8, as TABLE has them; the other page holds nonsense."""
    pages = mx.full((7, x.shape[1], PAGE, *x.shape[3:]), 9).astype(x.dtype)
    for n, row in enumerate(TABLE):
        for m, page in enumerate(row):
            if page >= 0:
                pages[page] = x[n, :, m * PAGE : (m + 1) * PAGE]
    return pages


def dequantized(parts: list[mx.array], **how: int) -> mx.array:
    """Computed in float32 and rounded once; MLX's on a CPU rounds products in half, too."""
    packed, scales, biases = parts
    wide = (x.astype(mx.float32) for x in (scales, biases))
    return mx.dequantize(packed, *wide, **how).astype(scales.dtype)


def turned(x: mx.array, offset: int | mx.array, **rope: Any) -> mx.array:
    """By MLX's own rotary embedding."""
    freqs = rope.get("freqs")
    return mx.fast.rope(
        x,
        rope.get("dims", x.shape[3]),
        traditional=rope.get("style") == "pairs",
        base=rope.get("base", 10000.0) if freqs is None else None,
        scale=rope.get("scale", 1.0),
        offset=offset,
        freqs=freqs,
    )
