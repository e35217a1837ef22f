"""The gradients of calls: a kernel as a function of which MLX knows the derivatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, cast

import mlx.core as mx

from metalgen.calls.backward import KernelGradients, with_lse
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


class Computation(NamedTuple):
    """What computes a call and its gradients.

    Args:
        run: the call; with `kernels`, it may give the log-sum-exp even where it is not asked for.
        config: what is computed.
        kernels: backward kernels; None: gradients are those of `backward_of`.
    """

    run: Runner
    config: AttentionConfig
    kernels: KernelGradients | None = None


def differentiable(
    computation: Computation,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    inputs: Inputs,
) -> tuple[mx.array, mx.array | None]:
    """Run a kernel that has gradients; nothing but its arrays and results is kept for them.

    They reach the arrays that score functions capture, too. ``mx.vmap`` runs the plain operations,
    since MLX has no rule for custom kernels; ``mx.jvp`` sees the kernel, and refuses it where it is
    lazy.
    """
    if inputs is NOTHING:
        outputs = function_of(computation, scale, inputs)(q, k, v)
    else:
        outputs = _function(computation, scale, inputs)(q, k, v, *inputs.arrays)
    return outputs[0], outputs[1] if computation.config.return_lse else None


def _function(
    computation: Computation, scale: float, inputs: Inputs
) -> Callable[..., tuple[mx.array, ...]]:
    """A computation as a function of arrays, of which MLX knows the derivatives.

    All arrays are arguments: MLX gives one that a function captures a gradient of 0.
    """
    run, config, kernels = computation
    both = with_lse(config, kernels).return_lse  # whether it gives the log-sum-exp

    def plain(q: mx.array, k: mx.array, v: mx.array, *arrays: mx.array) -> list[mx.array]:
        features = config_features(config) | {"inputs": inputs.replaced(arrays)}
        out, lse = attention_mlx(q, k, v, scale=scale, **features)
        return [out, lse] if both else [out]

    def own(q: mx.array, k: mx.array, v: mx.array, *arrays: mx.array) -> list[mx.array]:
        return [mlx_runner(config)(q, k, v, scale, inputs.replaced(arrays))[0]]

    differentiated = own if differentiates(config) else plain

    @mx.custom_function
    def attention(q: mx.array, k: mx.array, v: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        out, lse = run(q, k, v, scale, inputs.replaced(arrays))
        return (out,) if lse is None else (out, lse)

    @attention.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> Any:
        if kernels is not None:
            q, k, v, *arrays = primals
            out, *lse = outputs
            if not lse:  # computed again, by a function that has derivatives, too
                again = Computation(kernels.with_lse, replace(config, return_lse=True))
                lse = [_function(again, scale, inputs)(q, k, v, *arrays)[1]]
            given = cotangents if len(cotangents) > 1 else (*cotangents, mx.zeros(()))
            return kernels.of(scale, inputs)(q, k, v, out, *lse, *given, *arrays)
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
