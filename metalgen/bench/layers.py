"""Entries of whole layers, with their projections."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from metalgen.bench.entries import BY_HAND_FACTOR, Call, Entry, Found, Set
from metalgen.bench.work import Work
from metalgen.calls.verify import TOLERANCE
from metalgen.devices import Device
from metalgen.devices.mlx_attention import mlx_sdpa
from metalgen.ops.attention import attention

if TYPE_CHECKING:
    from numpy.typing import NDArray

Weights = tuple[mx.array, mx.array, mx.array, mx.array]
"""Of queries, keys, values and outputs, each ``(dims, dims)``, as of ``mlx.nn.Linear``."""


def layer_entries(work: Work, device: Device) -> list[Found]:
    """A layer by hand, MLX's layer, one with MLX's fused attention, and one with ours.

    All take the same input and weights of the same seed.
    """
    dim = work.config.head_dim
    scale = dim**-0.5

    def by_hand(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mx.softmax((q * scale) @ k.swapaxes(-1, -2), axis=-1, precise=True) @ v

    def fused(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return mlx_sdpa(q, k, v, scale=scale)

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return attention(q, k, v, scale=scale, device=device.name)

    calls: dict[str, Call] = {
        "by hand": functools.partial(_layer, dim, by_hand),
        "nn.MultiHeadAttention": functools.partial(_of_mlx, dim),
        "MLX fused": functools.partial(_layer, dim, fused),
        "ours": functools.partial(_layer, dim, ours),
    }
    tolerance = BY_HAND_FACTOR * TOLERANCE[work.config.dtype]
    return [
        Entry(name, call, _sample, functools.partial(_definition, dim), tolerance)
        for name, call in calls.items()
    ]


def _sample(work: Work, seed: int) -> Set:
    dims = work.heads * work.config.head_dim
    dtype: mx.Dtype = getattr(mx, work.config.dtype)
    keys = mx.random.split(mx.random.key(seed), 5)
    x = mx.random.normal((work.batch, work.q_len, dims), key=keys[0]).astype(dtype)
    weights = [mx.random.normal((dims, dims), key=key) * dims**-0.5 for key in keys[1:]]
    return (x, *(w.astype(dtype) for w in weights))


def _layer(head_dim: int, attend: Call, x: mx.array, *weights: mx.array) -> mx.array:
    batch, length, dims = x.shape
    shape = batch, length, dims // head_dim, head_dim
    q, k, v = ((x @ w.T).reshape(shape).swapaxes(1, 2) for w in weights[:3])
    return attend(q, k, v).swapaxes(1, 2).reshape(batch, length, dims) @ weights[3].T


def _of_mlx(head_dim: int, x: mx.array, *weights: mx.array) -> mx.array:
    layer = nn.MultiHeadAttention(x.shape[2], x.shape[2] // head_dim)  # type: ignore[attr-defined]
    names = ("query_proj", "key_proj", "value_proj", "out_proj")
    layer.update({name: {"weight": w} for name, w in zip(names, weights, strict=True)})
    out: mx.array = layer(x, x, x)
    return out


def _definition(head_dim: int, given: Set) -> NDArray[np.float64]:
    x, *weights = (np.array(each.astype(mx.float32), np.float64) for each in given)
    batch, length, dims = x.shape
    shape = batch, length, dims // head_dim, head_dim
    q, k, v = ((x @ w.T).reshape(shape).swapaxes(1, 2) for w in weights[:3])
    scores = q @ k.swapaxes(-1, -2) * head_dim**-0.5
    likely = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = likely / likely.sum(axis=-1, keepdims=True) @ v
    return np.asarray(out.swapaxes(1, 2).reshape(batch, length, dims) @ weights[3].T)
