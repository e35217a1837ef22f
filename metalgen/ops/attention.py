"""Attention for arrays: the config is read off them."""

from __future__ import annotations

from typing import Literal, overload

import mlx.core as mx

from metalgen.config import AttentionConfig
from metalgen.dispatch import get_kernel
from metalgen.errors import ArgumentError


@overload
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    return_lse: Literal[False] = False,
    device: str | None = None,
    chip: str | None = None,
) -> mx.array: ...


@overload
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    return_lse: Literal[True],
    device: str | None = None,
    chip: str | None = None,
) -> tuple[mx.array, mx.array]: ...


@overload
def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    return_lse: bool,
    device: str | None = None,
    chip: str | None = None,
) -> mx.array | tuple[mx.array, mx.array]: ...


def attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    causal: bool = False,
    window_left: int | None = None,
    window_right: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    device: str | None = None,
    chip: str | None = None,
) -> mx.array | tuple[mx.array, mx.array]:
    """Scaled dot-product attention by the best known kernel, as `metalgen.get_kernel` finds it.

    Args:
        q: ``(B, H, Lq, D)``, k: ``(B, Hkv, Lk, D)``, v: ``(B, Hkv, Lk, Dv)``; float32, float16
            or bfloat16; Hkv divides H; any strides.
        scale: factor of the scores; None means ``1 / sqrt(D)``.
        causal: query i sees key j when ``j <= i + Lk - Lq``.
        window_left, window_right: a sliding window, as in `AttentionConfig`.
        softcap: C; a scaled score x becomes ``C * tanh(x / C)``.
        return_lse: also return the log-sum-exp, ``(B, H, Lq)``, float32.
        device: ``"metal"``, ``"simulator"``, ``"reference"``; None: this machine's GPU, and plain
            MLX where there is none.
        chip: whose tuning records to use; None means this machine's.

    Returns:
        ``(B, H, Lq, Dv)`` of the type of `q`, zeros in rows that see no key; with `return_lse` a
        pair.

    Raises:
        ArgumentError: shapes, types or names that cannot be used.
        DeviceError: the device is not available here.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, mx.array):
            raise ArgumentError(name, "an mlx.core.array", type(x).__name__)
        if x.ndim != 4:
            raise ArgumentError(f"{name}.shape", "4 axes (B, H, L, D)", x.shape)
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    if kv_heads == 0 or heads % kv_heads or heads == 0:
        raise ArgumentError("k.shape", f"a number of heads that divides the {heads} of q", k.shape)
    config = AttentionConfig(
        head_dim,
        str(q.dtype),
        value_head_dim=v.shape[3],
        heads_per_kv=heads // kv_heads,
        causal=causal,
        return_lse=return_lse,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
    )
    kernel = get_kernel(
        config,
        batch=max(1, batch),
        heads=heads,
        q_len=max(1, q_len),
        kv_len=max(1, kv_len),
        device=device,
        chip=chip,
    )
    return kernel(q, k, v, scale=scale)
