"""``mx.fast.scaled_dot_product_attention``, where it computes the same thing as a config."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx

from metalgen.devices.base import Runner
from metalgen.languages import CUDA, METAL
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs

mlx_sdpa = mx.fast.scaled_dot_product_attention
"""MLX's own function, also while `metalgen.install` has put ours in its place."""

MLX_FUSED_DIMS = frozenset({(64, 64), (72, 72), (80, 80), (96, 96), (128, 128)})
"""Query and value widths for which MLX's own fused attention kernel exists, for any lengths."""


def is_fused(config: AttentionConfig) -> bool:
    """Whether MLX has a fused kernel that computes a config for any lengths."""
    return computes(config) and (config.head_dim, config.v_dim) in MLX_FUSED_DIMS


def computes(config: AttentionConfig) -> bool:
    """Whether MLX's function computes a config: plain, causal or by an array of booleans, sinks.

    An additive array is not among them: MLX takes it in the type of the queries only.
    """
    plain = AttentionConfig(
        config.head_dim,
        config.dtype,
        value_head_dim=config.value_head_dim,
        heads_per_kv=config.heads_per_kv,
        causal=config.causal,
        sinks=config.sinks,
        array_mask=config.array_mask,
        block_mask=config.array_mask and config.block_mask,
    )
    return config == plain and not (config.causal and config.array_mask)


def differentiates(config: AttentionConfig) -> bool:
    """Whether the gradient of MLX's function is that of a config.

    As `computes`; windows, and all masks together, too, as one array of booleans. Not sinks in 16
    bits, to which MLX rounds them and the kernels do not. How a kernel runs makes no difference.
    """
    same = replace(
        config,
        causal=config.causal and not config.array_mask,
        window_left=None,
        window_right=None,
        deterministic=False,
        tf32=False,
        max_work=None,
    )
    return computes(same) and not (config.sinks and config.dtype != "float32")


FUSED_GRADIENTS = {
    METAL.name: frozenset({"float16", "bfloat16", "float32"}),
    CUDA.name: frozenset({"float16", "bfloat16"}),
}
"""Types of which MLX has fused gradients, by language."""


def differentiates_in_linear_memory(config: AttentionConfig, language: str) -> bool:
    """Whether the gradient of MLX's function keeps no scores of a config.

    As of MLX 0.32.4 that is so without masks other than a causal one, and without sinks: on Metal
    by products over blocks of 1,024 rows, on CUDA in 16 bits by cuDNN.
    """
    masked = config.window_left is not None or config.window_right is not None or config.array_mask
    if masked or config.sinks or not differentiates(config):
        return False
    fused = (config.head_dim, config.v_dim) in MLX_FUSED_DIMS
    return fused and config.dtype in FUSED_GRADIENTS[language]


def mlx_runner(config: AttentionConfig) -> Runner:
    """A runner of MLX's function, for a config that it `computes` or `differentiates`."""

    def run(
        q: mx.array, k: mx.array, v: mx.array, scale: float, inputs: Inputs = NOTHING
    ) -> tuple[mx.array, None]:
        windows = config.window_left, config.window_right
        seen = seen_by(q.shape[2], k.shape[2], config.causal, windows, inputs.array_mask)
        return mlx_attention(q, k, v, scale, seen, inputs.sinks), None

    return run


def mlx_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    seen: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """MLX's function, of arrays of one type; but rows that see no key are zeros.

    There MLX gives NaN or the mean of the values, and NaN gradients of all keys.

    Args:
        q, k, v: as `metalgen.attention` takes them.
        scale: factor of the scores.
        seen: booleans that broadcast to ``(B, H, Lq, Lk)``, ``"causal"`` (no more queries than
            keys) or None; or floats, which are added to the scores, rounded to the type of q.
        sinks: ``(H,)``, rounded to the type of q.
    """
    if 0 in q.shape or 0 in k.shape:
        return mx.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    sinks = None if sinks is None else sinks.astype(q.dtype)
    if not isinstance(seen, mx.array):
        return mlx_sdpa(q, k, v, scale=scale, mask=seen, sinks=sinks)
    if seen.dtype == mx.bool_:
        some = seen.any(axis=-1, keepdims=True)
        mask = seen | ~some
    else:
        some = (seen > -mx.inf).any(axis=-1, keepdims=True)
        mask = mx.where(some, seen, 0.0).astype(q.dtype)
    out = mlx_sdpa(q, k, v, scale=scale, mask=mask, sinks=sinks)
    return mx.where(some, out, mx.zeros((), out.dtype))


def seen_by(
    q_len: int,
    kv_len: int,
    causal: bool,
    windows: tuple[int | None, int | None],
    array: mx.array | None,
) -> mx.array | str | None:
    """All masks of a call in one, as `mlx_attention` takes it."""
    left, right = windows
    if left is None and right is None and array is None and q_len <= kv_len:
        return "causal" if causal and q_len > 1 else None  # one query sees every key
    masks = [] if array is None else [array]
    own = mx.arange(q_len)[:, None] + (kv_len - q_len)
    keys = mx.arange(kv_len)
    if causal:
        masks.append(keys <= own)
    if left is not None:
        masks.append(keys >= own - left)
    if right is not None:
        masks.append(keys <= own + right)
    found = None
    for mask in masks:
        found = mask if found is None else found & mask
    return found
