"""``mx.fast.scaled_dot_product_attention``, where it computes the same thing as a config."""

from __future__ import annotations

import mlx.core as mx

from metalgen.devices.base import Runner
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.reference import attention_mlx, config_features

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
    )
    return config == plain and not (config.causal and config.array_mask)


def mlx_runner(config: AttentionConfig) -> Runner:
    """A runner of MLX's function, for a config that it computes.

    A row that sees no key is zeros here, too, where MLX's kernel alone gives NaN.
    """

    def run(
        q: mx.array, k: mx.array, v: mx.array, scale: float, inputs: Inputs = NOTHING
    ) -> tuple[mx.array, None]:
        empty_rows = config.causal and q.shape[2] > k.shape[2]
        if 0 in q.shape or 0 in k.shape or empty_rows:
            features = config_features(config) | {"inputs": inputs}
            return attention_mlx(q, k, v, scale=scale, **features)[0], None
        sinks = None if inputs.sinks is None else inputs.sinks.astype(q.dtype)
        mask: mx.array | str | None = inputs.array_mask
        if config.causal and q.shape[2] > 1:  # one query sees every key
            mask = "causal"
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
        if inputs.array_mask is not None:
            seen = inputs.array_mask.any(axis=-1, keepdims=True)
            out = mx.where(seen, out, mx.zeros((), out.dtype))
        return out, None

    return run
