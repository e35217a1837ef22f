"""Calls of flash-attn's interface, drawn as flash-attention's own tests draw them, with results.

`attention` is the definition in float64, and `attention_in` the same in a type of half the width by
plain operations. By the error of the latter flash-attention measures that of a kernel: it may be
twice as large, and what rounding adds. Sequences, heads and lengths are fewer here; widths,
features and the ways they combine are flash-attention's.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.testing.devices import normal

WIDTHS = (32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256)
LENGTHS = ((113, 203), (128, 217), (113, 211), (108, 256), (64, 128), (128, 64), (97, 97), (1, 147))
CACHED = ((1, 128), (1, 339), (3, 256), (64, 200), (16, 128), (128, 128), (8, 96))
DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


@dataclass
class Asked:
    """What a call asks for, in flash-attn's names."""

    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    slopes: Any = None
    options: dict[str, Any] = field(default_factory=dict)

    def keywords(self) -> dict[str, Any]:
        slopes = None if self.slopes is None else mx.array(self.slopes.astype(np.float32))
        return {
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": slopes,
            **self.options,
        }


def asked(draw: random.Random, batch: int, heads: int, kv_len: int) -> Asked:
    """A mask and changes of scores, at random."""
    found = Asked(causal=draw.random() < 0.5)
    if draw.random() < 0.3:
        sides = [draw.choice((-1, draw.randrange(0, max(1, kv_len)))) for _ in range(2)]
        found.window_size = (sides[0], sides[1])
    if draw.random() < 0.25:
        found.softcap = draw.choice((15.0, 50.0))
    if draw.random() < 0.35:
        shape = draw.choice(((heads,), (batch, heads)))
        seed = np.random.default_rng(draw.randrange(1 << 30))
        found.slopes = np.float32(seed.random(shape) * 0.3).astype(np.float64)
    return found


def exact(x: mx.array) -> Any:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def rounded(x: Any, dtype: str) -> Any:
    return exact(mx.array(np.float32(x)).astype(DTYPES[dtype]))


def mask_and_bias(
    ask: Asked, n: int, heads: int, q_len: int, kv_len: int, first: int = 0
) -> tuple[Any, Any]:
    """What sequence n sees, ``(Lq, Lk)``, and what is added to its scores, ``(H, Lq, Lk)``."""
    i, j = np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len)
    left, right = ask.window_size
    seen = np.broadcast_to(j >= first, (q_len, kv_len)).copy()
    if ask.causal:
        right = 0
    if left >= 0:
        seen &= j >= i - left
    if right >= 0:
        seen &= j <= i + right
    bias = np.zeros((heads, q_len, kv_len))
    if ask.slopes is not None:
        own = ask.slopes if ask.slopes.ndim == 1 else ask.slopes[n]
        bias -= own[:, None, None] * np.abs(i - j)
    return seen, bias


def attention(
    q: Any, k: Any, v: Any, seen: Any, bias: Any, softcap: float = 0.0
) -> tuple[Any, Any]:
    """Output and log-sum-exp ``(H, Lq)`` of one sequence, ``(L, H, D)`` each, in float64."""
    each = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, each, axis=1) for x in (k, v))
    scores = np.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen, scores + bias, -np.inf)
    peak = scores.max(axis=-1, initial=-np.inf, keepdims=True)
    peak = np.where(np.isneginf(peak), 0.0, peak)
    weights = np.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    weights = weights / np.where(total == 0, 1, total)
    return np.einsum("hij,jhd->ihd", weights, v), lse


def attention_in(
    dtype: str, q: Any, k: Any, v: Any, seen: Any, bias: Any, softcap: float = 0.0
) -> Any:
    """The same by plain operations that round to `dtype` each time."""
    if not q.size:  # MLX 0.32.4 frees what an empty product on a CPU has yet to copy
        return np.zeros((len(q), q.shape[1], v.shape[2]))
    kind = DTYPES[dtype]
    each = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, each, axis=1) for x in (k, v))
    q, k, v = (mx.array(np.float32(x)).astype(kind).swapaxes(0, 1) for x in (q, k, v))
    scores = q @ (k * q.shape[2] ** -0.5).astype(kind).swapaxes(1, 2)
    if softcap:
        scores = (mx.tanh(scores / softcap) * softcap).astype(kind)
    scores = scores + mx.array(np.float32(bias)).astype(kind)
    there = mx.array(seen)
    scores = mx.where(there, scores, mx.array(-mx.inf, kind))
    weights = mx.where(there.any(axis=-1, keepdims=True), mx.softmax(scores, axis=-1), 0.0)
    return exact((weights.astype(kind) @ v).swapaxes(0, 1))


def allowed(dtype: str, expected: Any, plain: Any, times: float = 2.0) -> float:
    """The largest error that flash-attention's tests allow: twice the plain one, and rounding."""
    rounding = 2 * np.abs(rounded(rounded(expected + 0.3, dtype) - 0.3, dtype) - expected).max()
    return float(times * np.abs(plain - expected).max() + rounding)


def assert_within(dtype: str, got: mx.array, expected: Any, plain: Any, times: float = 2.0) -> None:
    assert got.dtype == DTYPES[dtype]
    assert got.shape == expected.shape
    if not expected.size:
        return
    error = np.abs(exact(got) - expected).max()
    assert error <= allowed(dtype, expected, plain, times), f"{error:.1e}"


def arrays(draw: random.Random, dtype: str, *shapes: tuple[int, ...]) -> list[mx.array]:
    return [normal(shape, dtype, draw.randrange(1 << 30)) for shape in shapes]


def rotated(x: Any, cos: Any, sin: Any, positions: Any, interleaved: bool, dtype: str) -> Any:
    """Rows ``(L, H, D)`` of one sequence at their positions."""
    c, s = cos[positions][:, None], sin[positions][:, None]
    half = cos.shape[1]
    columns = np.arange(half)
    one, other = (2 * columns, 2 * columns + 1) if interleaved else (columns, columns + half)
    out = x.copy()
    out[..., one] = x[..., one] * c - x[..., other] * s
    out[..., other] = x[..., one] * s + x[..., other] * c
    return rounded(out, dtype)
