"""Attention with MLX's own signature: by our kernel where it should, else by MLX's function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen.calls import recording
from metalgen.calls.kernel import Kernel
from metalgen.calls.resolve import get_kernel, kept_with_kernels
from metalgen.counters import Tally, tally
from metalgen.devices import default_device, get_device
from metalgen.devices.mlx_attention import MLX_FUSED_DIMS, mlx_sdpa
from metalgen.errors import ArgumentError
from metalgen.families.sizes import DECODE_QUERIES, MAX_BATCH_HEADS, MAX_LENGTH
from metalgen.features.array_mask import finds_tiles
from metalgen.features.conversions import booleans, numbers, scores
from metalgen.features.fields import DTYPES
from metalgen.problem.config import MAX_HEAD_DIM, MIN_HEAD_DIM, AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs

_DTYPES = tuple(getattr(mx, name) for name in DTYPES)


def scaled_dot_product_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    force_fused: bool = False,
    stream: Any = None,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention``, by metalgen's kernel where that is the better one.

    Takes all that MLX's function takes. MLX's function computes whatever metalgen's kernels do not
    take, and every call for which it has a fused kernel that metalgen's was not measured to beat on
    this chip; `metalgen.explain_sdpa` says which of them a call gets, and why, and `metalgen.stats`
    counts them. Rows that see no key are zeros where metalgen computes them, and what MLX makes of
    them where MLX does.

    Args:
        q: ``(B, H, Lq, D)``, k: ``(B, Hkv, Lk, D)``, v: ``(B, Hkv, Lk, Dv)``; types may differ.
        scale: factor of the scores.
        mask: ``"causal"`` (aligned at the lower right), or an array that broadcasts to
            ``(B, H, Lq, Lk)``: booleans, True where a key is seen, or floats that are added.
        sinks: ``(H,)``, a logit for each head that takes part in the softmax and has no value.
        force_fused: ask MLX for its fused kernel; MLX computes the call.
        stream: where to compute, a stream or a device of MLX.

    Returns:
        ``(B, H, Lq, Dv)``, of the type that q, k and v promote to.

    Raises:
        ValueError: as MLX's function raises it.
    """
    return attend(q, k, v, scale, mask, sinks, force_fused, stream)


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    mask: Any = None,
    sinks: Any = None,
    force_fused: bool = False,
    stream: Any = None,
    device: str | None = None,
    chip: str | None = None,
) -> mx.array:
    """`scaled_dot_product_attention`, on a device of metalgen's by name."""
    if stream is not None:
        with mx.stream(stream):
            return attend(q, k, v, scale, mask, sinks, force_fused, None, device, chip)
    if recording.active is not None:
        _note(recording.active, q, k, v, mask, sinks)
    route = _route(q, k, v, mask, sinks, force_fused, device, chip)
    if route.kernel is not None:
        last = route.last  # once: another thread may change it
        if last is not None and scale == last[0]:
            route.tally.calls += 1
            return last[1](q, k, v)[0]
        try:
            return _by_kernel(route, q, k, v, scale, mask, sinks)
        except ArgumentError:  # MLX's function takes it, or raises its own error
            route = _mlx(_UNFIT)
    route.tally.calls += 1
    return mlx_sdpa(q, k, v, scale=scale, mask=mask, sinks=sinks, force_fused=force_fused)


def _by_kernel(
    route: Route, q: mx.array, k: mx.array, v: mx.array, scale: float, mask: Any, sinks: Any
) -> mx.array:
    kernel = route.kernel
    assert kernel is not None
    inputs = _inputs(kernel.config, q, mask, sinks) if route.brings else NOTHING
    out = kernel(q, k, v, scale=scale, inputs=inputs)
    if not route.brings and type(scale) is float:
        route.last = (scale, kernel._with_scale(scale))
    assert not isinstance(out, tuple)
    return out


def _inputs(config: AttentionConfig, q: mx.array, mask: Any, sinks: Any) -> Inputs:
    return Inputs(
        bias=scores(mask, q.dtype) if config.bias else None,
        array_mask=booleans(mask) if config.array_mask else None,
        sinks=numbers("sinks", sinks),
    )


@dataclass(slots=True, eq=False)
class Route:
    """What computes calls of one form.

    Args:
        kernel: metalgen's kernel; None: MLX's function.
        reason: why it is MLX's function.
        brings: whether the kernel takes a mask or sinks as arrays.
        last: of a kernel that takes none, the scale that it was last called with, and the kernel as
            a function of q, k and v alone: repeated calls save half of their time in Python.
    """

    kernel: Kernel | None
    reason: str
    brings: bool
    tally: Tally
    last: tuple[float, Callable[..., tuple[mx.array, ...]]] | None = None


_routes: dict[Any, Route] = {}
_MOST_ROUTES = 4096
kept_with_kernels.append(_routes)

_UNFIT = "arguments that only MLX's function can judge"


def _route(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    sinks: Any,
    force_fused: bool,
    device: str | None,
    chip: str | None,
) -> Route:
    """The route of a call, from its shapes and types alone; kept for all calls like it."""
    name = default_device().name if device is None else device
    try:
        batch, heads, q_len, width = q.shape
        entries, kv_heads, kv_len, key_width = keys = k.shape
        values = v.shape
        key = (
            *(width, values[3], heads, kv_heads),
            *((batch - 1).bit_length(), (q_len - 1).bit_length(), (kv_len - 1).bit_length()),
            # What MLX refuses, or takes although it is empty, is another form.
            batch == entries and width == key_width and keys[:3] == values[:3] and 0 not in keys,
            *(q_len > 0, q.dtype, k.dtype, v.dtype),
            mask if mask is None or type(mask) is str else mask.dtype,
            sinks is None or sinks.dtype,
            *(force_fused, name, chip),
        )
        return _routes[key]
    except (AttributeError, TypeError, ValueError, IndexError):
        return _mlx(_UNFIT)
    except KeyError:
        pass
    sizes = {"batch": batch, "heads": heads, "q_len": q_len, "kv_len": kv_len}
    widths = (width, values[3])
    if len(_routes) >= _MOST_ROUTES:
        _routes.clear()
    _routes[key] = found = _found(q, k, v, widths, mask, sinks, force_fused, (name, chip, sizes))
    return found


def _mlx(reason: str) -> Route:
    return Route(None, reason, False, tally("mlx", reason))


def _found(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    widths: tuple[int, int],
    mask: Any,
    sinks: Any,
    force_fused: bool,
    where: tuple[str, str | None, dict[str, int]],
) -> Route:
    name, chip, sizes = where
    additive = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    taken = not additive or mask.dtype in (q.dtype, *(() if q.dtype != mx.float32 else _DTYPES))
    why = _not_ours(q, k, v, widths, mask, sinks, force_fused)
    if why:
        return _mlx(why)
    try:
        config = _config(q, k, widths, mask, sinks)
        kept = {
            "batch": min(sizes["batch"], max(1, MAX_BATCH_HEADS // sizes["heads"])),
            "heads": sizes["heads"],
            "q_len": min(sizes["q_len"], MAX_LENGTH),
            "kv_len": min(sizes["kv_len"], MAX_LENGTH),
        }
        kernel = get_kernel(config, **kept, device=name, chip=chip)
    except ArgumentError as error:
        if error.argument in ("device", "chip"):
            raise
        return _mlx(f"metalgen does not take it: {error}")
    brings = config.bias or config.array_mask or config.sinks
    if not taken:  # MLX refuses masks of a wider type than the queries'
        return Route(kernel, "", brings, kernel._tally)
    if kernel.backend != "metalgen":
        return _mlx(kernel.path[-1].removeprefix("plain MLX operations: "))
    if additive and get_device(name).is_gpu and widths in MLX_FUSED_DIMS:
        return _mlx("MLX's own fused attention keeps the call: additive masks are never raced")
    return Route(kernel, "", brings, kernel._tally)


def _config(
    q: mx.array, k: mx.array, widths: tuple[int, int], mask: Any, sinks: Any
) -> AttentionConfig:
    array = isinstance(mask, mx.array)
    additive = array and mask.dtype != mx.bool_
    seen, q_len = array and not additive, q.shape[2]
    by_tiles = q_len > DECODE_QUERIES and finds_tiles(q.shape[0] * q.shape[1], q_len, k.shape[2])
    return AttentionConfig(
        widths[0],
        str(q.dtype),
        value_head_dim=widths[1],
        heads_per_kv=q.shape[1] // k.shape[1],
        causal=not array and mask == "causal",
        bias=additive,
        array_mask=seen,
        block_mask=seen and by_tiles,
        sinks=sinks is not None,
    )


def _note(
    into: recording.Recording, q: mx.array, k: mx.array, v: mx.array, mask: Any, sinks: Any
) -> None:
    """Count a call that metalgen's kernels could compute."""
    try:
        widths = (q.shape[3], v.shape[3])
        if not _not_ours(q, k, v, widths, mask, sinks, False):
            rows = q.shape[0] * q.shape[1]
            into.note(_config(q, k, widths, mask, sinks), rows, q.shape[2], k.shape[2])
    except (ArgumentError, AttributeError, IndexError):  # MLX's function says what is wrong
        pass


def _not_ours(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    widths: tuple[int, int],
    mask: Any,
    sinks: Any,
    force_fused: bool,
) -> str:
    """Why metalgen's kernels do not take a call; empty where they do."""
    if force_fused:
        return "force_fused asks for MLX's kernel"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v of several types: {_types(q, k, v)}"
    if q.dtype not in _DTYPES:
        return f"arrays of type {_types(q)}"
    if not all(MIN_HEAD_DIM <= width <= MAX_HEAD_DIM for width in widths):
        return f"head dimensions {widths}, not from {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    own, keys = q.shape, k.shape
    fit = own[::3] == keys[::3] and keys[:3] == v.shape[:3]
    if not fit or 0 in own or 0 in keys or own[1] % keys[1]:
        return _UNFIT
    if isinstance(mask, str) and mask != "causal":
        return _UNFIT
    for what, array, dtypes in (
        ("mask", mask, (mx.bool_, *_DTYPES)),
        ("sinks", sinks, _DTYPES),
    ):
        if isinstance(array, mx.array) and array.dtype not in dtypes:
            return f"{what} of type {_types(array)}"
    return ""


def _types(*arrays: mx.array) -> str:
    return ", ".join(dict.fromkeys(str(x.dtype).removeprefix("mlx.core.") for x in arrays))


def explain_sdpa(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
    force_fused: bool = False,
    stream: Any = None,
    device: str | None = None,
    chip: str | None = None,
) -> str:
    """What computes such a call of `scaled_dot_product_attention`, and why; one step a line.

    Nothing is computed, but a kernel that was never checked on this device is checked.

    Args:
        q, k, v, scale, mask, sinks, force_fused, stream: as in `scaled_dot_product_attention`.
        device, chip: as in `metalgen.attention`.

    Raises:
        MetalgenError: the device or the chip is not known, or not available here.
    """
    if stream is not None:
        with mx.stream(stream):
            return explain_sdpa(
                *(q, k, v),
                scale=scale,
                mask=mask,
                sinks=sinks,
                force_fused=force_fused,
                device=device,
                chip=chip,
            )
    route = _route(q, k, v, mask, sinks, force_fused, device, chip)
    if route.kernel is not None:
        return route.kernel.explain()
    return f"mx.fast.scaled_dot_product_attention computes the call: {route.reason}"
