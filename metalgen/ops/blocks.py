"""Attention in blocks of keys: merging results, and gradients from an outside log-sum-exp.

Ring attention and training in chunks see the keys of a sequence one block after the other. Each
block has an output and a log-sum-exp of its own; `merge` joins them. In the backward pass every
block is given the joined ones, and its gradients add up to those of the whole.
"""

from __future__ import annotations

from typing import NamedTuple, Unpack

import mlx.core as mx

from metalgen.calls.kernel import Kernel, check_scale
from metalgen.calls.options import Keys, Options
from metalgen.calls.request import prepare
from metalgen.errors import ArgumentError
from metalgen.features.conversions import brief
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs, check_call
from metalgen.reference import config_features, gradients_mlx

Result = tuple[mx.array, mx.array]
"""Output ``(B, H, Lq, Dv)`` and log-sum-exp ``(B, H, Lq)``."""


class Gradients(NamedTuple):
    """Gradients of `attention`; those that were not asked for are None.

    Attributes:
        q, k, v: of the types and shapes of the arrays.
        bias, alibi_slopes, sinks: likewise, in the shapes in which they were passed with four axes
            or one.
    """

    q: mx.array | None = None
    k: mx.array | None = None
    v: mx.array | None = None
    bias: mx.array | None = None
    alibi_slopes: mx.array | None = None
    sinks: mx.array | None = None


def merge(*results: Result) -> Result:
    """The attention over all keys from the attention over blocks of them.

    With L = log(sum of exp(L_n)), the joined log-sum-exp, the output is the sum of
    exp(L_n - L) O_n. Sinks belong to one block only.

    Args:
        results: for each block its output ``(B, H, Lq, Dv)`` and log-sum-exp ``(B, H, Lq)``, as
            `attention` returns them with `return_lse`; one or more.

    Returns:
        Output, of the type of the first, and log-sum-exp, float32. Rows that no block has keys for
        are zeros and -inf. Differentiable.

    Raises:
        ArgumentError: no results, or arrays whose shapes or types do not fit each other.
    """
    if not results:
        raise ArgumentError("results", "one pair of output and log-sum-exp or more", results)
    pairs = [_pair(n, result) for n, result in enumerate(results)]
    first = pairs[0][0]
    for n, (out, _) in enumerate(pairs):
        if out.shape != first.shape or out.dtype != first.dtype:
            expected = f"{first.dtype} {first.shape}, as the first has"
            raise ArgumentError(f"results[{n}][0]", expected, brief(out))
    sums = mx.stack([lse for _, lse in pairs])
    peak = mx.stop_gradient(sums.max(axis=0))
    peak = mx.where(peak == -mx.inf, 0.0, peak)
    shares = mx.exp(sums - peak)
    total = shares.sum(axis=0)
    safe = mx.where(total == 0.0, 1.0, total)
    weights = shares / safe
    out = sum(
        (weights[n][..., None] * own.astype(mx.float32) for n, (own, _) in enumerate(pairs)),
        mx.zeros((), mx.float32),
    )
    lse = mx.where(total == 0.0, -mx.inf, peak + mx.log(safe))
    return out.astype(first.dtype), lse


def attention_backward(
    q: mx.array,
    k: Keys,
    v: Keys,
    out: mx.array,
    lse: mx.array,
    dout: mx.array,
    *,
    dlse: mx.array | None = None,
    scale: float | None = None,
    wanted: tuple[str, ...] = ("q", "k", "v"),
    **options: Unpack[Options],
) -> Gradients:
    """The gradients of `attention` over these keys, from its output and log-sum-exp.

    Where keys of other blocks had a share in the rows, pass the joined output and log-sum-exp
    (`merge`): then the gradients of q over all blocks add up, and those of k and v are the block's.

    Args:
        q, k, v, scale, options: as of `attention`.
        out: ``(B, H, Lq, Dv)`` of the type of q, and lse: ``(B, H, Lq)`` float32, what `attention`
            returned with `return_lse`, or what `merge` made of it.
        dout: the cotangent of out, of its shape and type.
        dlse: the cotangent of lse, of its shape and type; None: zeros.
        wanted: which gradients: among ``"q"``, ``"k"``, ``"v"``, ``"bias"``, ``"alibi_slopes"``
            and ``"sinks"``. Others are not computed.

    Returns:
        The gradients.

    Raises:
        ArgumentError: shapes or types that do not fit, or a gradient that there is not: of arrays
            that were not passed, and of pages and quantized keys and values.
        DeviceError: the device is not available here.
    """
    prepared = prepare("attention_backward", q, k, v, True, options)
    assert isinstance(prepared.kernel, Kernel)  # MLX's function gives no log-sum-exp
    config, inputs = prepared.kernel.config, prepared.inputs
    queries, keys, values = prepared.arrays
    check_call(config, queries, keys, values, inputs)
    _check_wanted(config, wanted, inputs)
    whole = (*queries.shape[:3], config.v_dim)
    for name, x, shape, dtype in (
        ("out", out, whole, queries.dtype),
        ("dout", dout, whole, queries.dtype),
        ("lse", lse, whole[:3], mx.float32),
        ("dlse", lse if dlse is None else dlse, whole[:3], mx.float32),
    ):
        if not isinstance(x, mx.array) or x.shape != shape or x.dtype != dtype:
            raise ArgumentError(name, f"an mlx.core.array, {dtype} {shape}", brief(x))
    factor = check_scale(config.head_dim, scale)
    if (kernels := prepared.kernel._gradients) is not None:
        cotangents = (dout, mx.zeros(()) if dlse is None else dlse)
        run = kernels.of(factor, inputs)
        found = [*run(queries, keys, values, out, lse, *cotangents, *inputs.arrays)]
    else:
        found = gradients_mlx(
            *(queries, keys, values, (out, lse), (dout, dlse)),
            scale=factor,
            **config_features(config),
            inputs=inputs,
        )
    names = ["q", "k", "v", *("" for _ in (*inputs.score, *inputs.mask)), *inputs.named]
    return Gradients(**{n: x for n, x in zip(names, found, strict=True) if n in wanted})


def _pair(number: int, result: object) -> Result:
    name = f"results[{number}]"
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ArgumentError(name, "an output and its log-sum-exp", brief(result))
    out, lse = result
    if not isinstance(out, mx.array) or out.ndim < 2 or not mx.issubdtype(out.dtype, mx.floating):
        expected = "an mlx.core.array of floats, (B, H, Lq, Dv)"
        raise ArgumentError(f"{name}[0]", expected, brief(out))
    if not isinstance(lse, mx.array) or lse.shape != out.shape[:-1] or lse.dtype != mx.float32:
        raise ArgumentError(f"{name}[1]", f"float32 {out.shape[:-1]}, as its output", brief(lse))
    return out, lse


def _check_wanted(config: AttentionConfig, wanted: object, inputs: Inputs) -> None:
    names = Gradients._fields
    if not isinstance(wanted, (tuple, list)) or not all(name in names for name in wanted):
        raise ArgumentError("wanted", f"names among {', '.join(names)}", wanted)
    for name in wanted:
        if name in ("k", "v"):
            if config.kv_bits is not None:
                expected = f"no {name!r}: quantized keys and values have no gradients; pass arrays"
                raise ArgumentError("wanted", expected, wanted)
            if config.page_size is not None:
                expected = f"no {name!r}: pages are a cache; pass keys and values without pages"
                raise ArgumentError("wanted", expected, wanted)
        elif name != "q" and inputs.get(name) is None:
            raise ArgumentError("wanted", f"no {name!r}, which the call does not pass", wanted)
