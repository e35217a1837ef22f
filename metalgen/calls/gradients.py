"""The gradients of calls: a kernel as a function of which MLX knows the derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import mlx.core as mx

from metalgen.devices import Runner
from metalgen.devices.mlx_attention import differentiates, mlx_runner
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.reference import attention_mlx, config_features

BACKWARDS = {
    "mlx": "MLX's own, of mx.fast.scaled_dot_product_attention",
    "plain": "recomputed in plain MLX operations, whose memory grows with Lq * Lk",
}
"""What computes gradients, and what `Kernel.explain` says of it."""


def backward_of(config: AttentionConfig) -> str:
    """What computes the gradients of a config: a key of `BACKWARDS`."""
    return "mlx" if differentiates(config) else "plain"


def differentiable(
    run: Runner,
    config: AttentionConfig,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    inputs: Inputs,
) -> tuple[mx.array, mx.array | None]:
    """Run a kernel whose gradients are those of `backward_of`; nothing but its inputs is kept.

    They reach the arrays that score functions capture, too. ``mx.vmap`` runs the plain operations,
    since MLX has no rule for custom kernels; ``mx.jvp`` sees the kernel, and refuses it where it is
    lazy.
    """
    if inputs is NOTHING:
        outputs = function_of(run, config, scale, inputs)(q, k, v)
    else:
        outputs = _function(run, config, scale, inputs)(q, k, v, *inputs.arrays)
    return outputs[0], outputs[1] if config.return_lse else None


def _function(
    run: Runner, config: AttentionConfig, scale: float, inputs: Inputs
) -> Callable[..., tuple[mx.array, ...]]:
    """`run` as a function of arrays, of which MLX knows the derivatives."""

    def plain(q: mx.array, k: mx.array, v: mx.array, *arrays: mx.array) -> list[mx.array]:
        features = config_features(config) | {"inputs": inputs.replaced(arrays)}
        out, lse = attention_mlx(q, k, v, scale=scale, **features)
        return [out, lse] if config.return_lse else [out]

    def own(q: mx.array, k: mx.array, v: mx.array, *arrays: mx.array) -> list[mx.array]:
        return [mlx_runner(config)(q, k, v, scale, inputs.replaced(arrays))[0]]

    differentiated = own if differentiates(config) else plain

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        out, lse = run(q, k, v, scale, inputs.replaced(arrays))
        return (out,) if lse is None else (out, lse)

    @attention.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        return tuple(mx.vjp(differentiated, list(primals), list(cotangents))[1])

    @attention.vmap
    def mapped(primals: Any, axes: Any) -> Any:
        many = mx.vmap(plain, in_axes=tuple(axes))(*primals)
        return tuple(many), tuple(0 for _ in many)

    @attention.jvp
    def forward(primals: Any, tangents: Any) -> Any:
        moved = [n for n, tangent in enumerate(tangents) if tangent is not None]

        def of_moved(*arrays: mx.array) -> list[mx.array]:
            every = dict(enumerate(primals)) | dict(zip(moved, arrays, strict=True))
            return plain(*every.values())

        given = [[x[n] for n in moved] for x in (primals, tangents)]
        return tuple(mx.jvp(of_moved, *given)[1])

    return cast(Callable[..., tuple[mx.array, ...]], attention)


function_of = functools.lru_cache(maxsize=256)(_function)
"""The same one when asked again: where a call brings nothing of its own."""
