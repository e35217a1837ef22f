"""Gradients of attention in plain MLX operations, from its output and log-sum-exp."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metalgen.problem.inputs import NOTHING
from metalgen.reference.plain import kept, located, scores_of


def gradients_plain(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    results: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array | None],
    scale: float | mx.array,
    features: dict[str, Any],
) -> list[mx.array]:
    """What `metalgen.reference.gradients_mlx` describes."""
    inputs = features.get("inputs") or NOTHING
    every = (q, k, v, *inputs.arrays)
    if 0 in q.shape[:3] or 0 in k.shape:
        return [mx.zeros_like(x) for x in every]
    given = list(inputs.arrays)

    def with_arrays(arrays: tuple[mx.array, ...]) -> dict[str, Any]:
        return {**features, "inputs": inputs.replaced(arrays)}

    def scores(q: mx.array, k: mx.array, *arrays: mx.array) -> mx.array:
        own = with_arrays(arrays)
        return scores_of(q, located(q, k, v, own), scale, own)

    def values(v: mx.array, *arrays: mx.array) -> mx.array:
        return located(q, k, v, with_arrays(arrays)).v.astype(mx.float32)

    call = located(q, k, v, features)
    (out, lse), (dout, dlse) = results, cotangents
    # A row that sees nothing has a log-sum-exp of -inf, and weights of 0.
    lse = mx.where(lse == -mx.inf, mx.inf, lse)[..., None]
    weights = mx.exp(scores(q, k, *given) - lse)
    dout = dout.astype(mx.float32)
    if call.at.rows is not None:  # the output of rows of no sequence is constant
        dout = mx.where(call.at.rows[..., None], dout, 0.0)
    kv_heads, kv_len = call.k.shape[1:3]
    by_group = (q.shape[0], kv_heads, q.shape[1] // kv_heads, q.shape[2])
    grouped = dout.reshape(*by_group, -1)
    wide = call.v.astype(mx.float32)[:, :, None]
    of_weights = (grouped @ wide.swapaxes(-1, -2)).reshape(weights.shape)
    dropped = weights
    if features.get("dropout", 0.0):
        share = kept(call, features)
        of_weights, dropped = of_weights * share, weights * share
    delta = (dout * out.astype(mx.float32)).sum(axis=-1)
    if dlse is not None:
        delta = delta - dlse
    of_scores = weights * (of_weights - delta[..., None])
    of_values = (dropped.reshape(*by_group, kv_len).swapaxes(-1, -2) @ grouped).sum(axis=2)
    dq, dk, *others = mx.vjp(scores, [q, k, *given], [of_scores])[1]
    dv, *more = mx.vjp(values, [v, *given], [of_values])[1]
    found = [a + b for a, b in zip(others, more, strict=True)]  # scales of quantized values
    if inputs.sinks is not None:
        share = mx.exp(inputs.sinks[:, None] - lse[..., 0])
        number = next(n for n, x in enumerate(inputs.arrays) if x is inputs.sinks)
        found[number] = -(share * delta).sum(axis=(0, 2))
    return [dq, dk, dv, *found]
