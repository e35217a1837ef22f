"""Attention by its definition: in float64 for checking, in plain MLX for what has no kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metalgen.problem.config import AttentionConfig

__all__ = [
    "attention_float64",
    "attention_mlx",
    "config_features",
    "gradients_float64",
    "gradients_mlx",
]

HOW_NOT_WHAT = frozenset(
    {
        "head_dim",
        "value_head_dim",
        "heads_per_kv",
        "return_lse",
        "deterministic",
        "tf32",
        "max_work",
    }
)
"""Fields of a config that the definition finds in the arrays' shapes, or has no use for."""


def attention_float64(
    q: Any, k: Any, v: Any, *, scale: float, **features: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attention and its log-sum-exp in NumPy float64: what every kernel is checked against.

    By definition, one sequence after the other, and with nothing shared with the kernels. What
    kernels round to the config's type before they multiply is rounded here, too: turned queries,
    and keys and values that were quantized.

    Args:
        q, k, v: arrays of MLX or NumPy, of the shapes that `AttentionConfig` describes.
        scale: factor of the scores.
        features: fields of an `AttentionConfig`, by name; left out: its default. ``inputs``: the
            `metalgen.problem.inputs.Inputs` that they ask for.

    Returns:
        ``(B, H, Lq, Dv)``, zeros in rows that see no key, and ``(B, H, Lq)``, -inf there (with
        sinks: the sink's logit).
    """
    from metalgen.reference.float64 import attention

    return attention(q, k, v, scale, features)


def gradients_float64(
    q: Any,
    k: Any,
    v: Any,
    cotangents: tuple[Any, Any],
    *,
    scale: float,
    given: tuple[Any, Any] | None = None,
    **features: Any,
) -> dict[str, NDArray[np.float64]]:
    """The gradients of `attention_float64`: what every backward kernel is checked against.

    By the formulas of the softmax: with p the weights, Z the dropout mask over what it keeps, dO
    and dL the cotangents, D the row sums of dO * O less dL, and y = f(x) the changed scores,

        dY = p (Z dO V^T - D)   dX = f'(x) dY   dQ = scale dX K   dK = scale dX^T Q
        dV = (Z p)^T dO         dbias = dY      dslope = -sum(dY distance)
        dsink = -sum(exp(sink - lse) D)

    Derivatives of score functions are central differences.

    Args:
        q, k, v, scale, features: as of `attention_float64`.
        cotangents: of the output and of the log-sum-exp; None: zeros.
        given: an output and a log-sum-exp that other keys had a share in, as in ring attention;
            None: those of the call.

    Returns:
        By name: ``q``, ``k``, ``v`` (zeros for pages), then where the call has them ``bias``,
        ``alibi_slopes``, ``sinks`` and ``score[n]``, the captured arrays of the score function.
    """
    from metalgen.reference.gradients64 import gradients

    return gradients(q, k, v, cotangents, scale, features, given)


def attention_mlx(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float | mx.array, **features: Any
) -> tuple[mx.array, mx.array]:
    """The same in plain MLX operations, in float32: lazy, and looks at no array's contents.

    Differentiable in q, k and v (unless quantized), bias, slopes, sinks and what score functions
    capture. The output has the type of `q`, the log-sum-exp is float32. Its memory grows with
    Lq * Lk, of all packed sequences together.
    """
    from metalgen.reference.plain import attention_plain

    return attention_plain(q, k, v, scale, features)


def gradients_mlx(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    results: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array | None],
    *,
    scale: float | mx.array,
    wanted: Collection[int] | None = None,
    **features: Any,
) -> list[mx.array]:
    """The same in plain MLX operations, from the output and the log-sum-exp of a call.

    Calls of more than 32 million scores are computed in blocks of queries, one after the other, so
    that memory grows with the length, not with its square.

    Args:
        q, k, v, scale, features: as of `attention_mlx`.
        results: output and log-sum-exp, which keys of other calls may have had a share in.
        cotangents: of the output, and of the log-sum-exp or None.
        wanted: in blocks, which gradients are computed, by number; None: all.

    Returns:
        The gradients of q, k, v and of all arrays of ``inputs`` in their order; zeros of those that
        have none, or are not wanted. Lazy: one that is not used is not computed, except in blocks.
    """
    from metalgen.reference.plain_gradients import gradients_plain

    return gradients_plain(q, k, v, results, cotangents, scale, features, wanted)


def config_features(config: AttentionConfig) -> dict[str, Any]:
    """The keyword arguments of both functions for a config."""
    names = (field.name for field in dataclasses.fields(config))
    found = {name: getattr(config, name) for name in names if name not in HOW_NOT_WHAT}
    return found | dict(found.pop("others"))
