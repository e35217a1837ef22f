"""Attention over a sequence in parts: keys and values are gathered, queries stay where they are."""

from __future__ import annotations

from typing import Any, Literal, cast, overload

import mlx.core as mx

from metalgen.distributed.agreement import agree, place, words_of
from metalgen.distributed.layouts import (
    check_layout,
    chunk_length,
    chunks_of,
    joined,
    own_part,
)
from metalgen.errors import ArgumentError
from metalgen.ops.attention import attention
from metalgen.ops.flex_attention import flex_attention
from metalgen.problem.rope import Rope

OPTIONS = frozenset(
    (
        *("causal", "window_left", "window_right", "softcap", "alibi_slopes", "sinks", "dropout"),
        *("dropout_key", "rope", "deterministic", "tf32", "max_work", "device", "chip"),
        *("score_mod", "mask_mod"),
    )
)
"""Options of `attention` and `flex_attention` that have a meaning across parts."""
_AXIS = 2


def shard_sequence(
    x: mx.array, *, axis: int = _AXIS, layout: str = "zigzag", group: Any = None
) -> mx.array:
    """This process's part of an array that every process has whole.

    Args:
        x: any array.
        axis: of the sequence; its length must be a multiple of the number of chunks.
        layout: as of `context_attention`.
        group: a group of ``mx.distributed``; None: all processes.

    Raises:
        ArgumentError: another layout, or a length that cannot be divided.
    """
    rank, size = place(group)
    count = size * len(chunks_of(0, size, check_layout(layout)))
    if x.shape[axis] % count:
        raise ArgumentError(f"x.shape[{axis}]", f"a multiple of {count} rows", x.shape[axis])
    return own_part(x, rank, size, layout, axis)


def unshard_sequence(
    x: mx.array, *, axis: int = _AXIS, layout: str = "zigzag", group: Any = None
) -> mx.array:
    """The whole array, gathered from the parts of all processes, on every one of them.

    Args:
        x: this process's part.
        axis, layout, group: as of `shard_sequence`.

    Raises:
        ArgumentError: another layout, or parts of different shapes.
    """
    _, size = place(group)
    chunk_length(f"x.shape[{axis}]", x.shape[axis], check_layout(layout))
    agree("x.shape", (x.shape, str(x.dtype), layout), x.shape, group)
    return joined(_gathered(x, group), size, layout, axis)


def sequence_positions(length: int, *, layout: str = "zigzag", group: Any = None) -> mx.array:
    """The positions in the whole sequence of this process's rows.

    Args:
        length: rows of a part.
        layout, group: as of `shard_sequence`.

    Returns:
        ``(length,)`` int32.
    """
    rank, size = place(group)
    rows = chunk_length("length", length, check_layout(layout))
    return mx.concatenate(
        [mx.arange(n * rows, (n + 1) * rows) for n in chunks_of(rank, size, layout)]
    ).astype(mx.int32)


@overload
def context_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    group: Any = None,
    layout: str = "zigzag",
    scale: float | None = None,
    return_lse: Literal[False] = False,
    **options: Any,
) -> mx.array: ...


@overload
def context_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    group: Any = None,
    layout: str = "zigzag",
    scale: float | None = None,
    return_lse: Literal[True],
    **options: Any,
) -> tuple[mx.array, mx.array]: ...


def context_attention(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    group: Any = None,
    layout: str = "zigzag",
    scale: float | None = None,
    return_lse: bool = False,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """This process's part of the attention over a sequence that all processes hold in parts.

    Every process must call it, with parts of the same shapes and the same options. Keys and values
    are gathered, which every back end of ``mx.distributed`` can do; queries stay. A query sees what
    it would see in the whole sequence: causal masks, windows, ALiBi, dropout, rotary embedding and
    functions count from the start of the whole. Keys behind the last query of a chunk are left out
    of causal calls.

    Args:
        q: ``(B, H, L, D)``, k: ``(B, Hkv, L, D)``, v: ``(B, Hkv, L, Dv)``: this process's rows of a
            sequence of ``L * size`` rows, as `shard_sequence` makes them.
        group: a group of ``mx.distributed``; None: all processes.
        layout: ``"zigzag"``, which balances causal masks, or ``"contiguous"``.
        scale, return_lse: as of `metalgen.attention`.
        options: causal, window_left, window_right, softcap, alibi_slopes ``(H,)``, sinks, dropout
            (with a dropout_key, the same on every process), rope (without an offset: by the
            positions in the whole), deterministic, tf32, max_work, device and chip of
            `metalgen.attention`; score_mod and mask_mod of `metalgen.flex_attention`.

    Returns:
        ``(B, H, L, Dv)``, and with `return_lse` the log-sum-exp ``(B, H, L)``. Differentiable in q,
        k and v: gradients of k and v are summed over all processes, by communication of their own.
        Gradients of `alibi_slopes`, `sinks` and captured arrays are this process's share; their sum
        over the processes is the whole.

    Raises:
        ArgumentError: an option without a meaning across parts, a part of odd length in the zigzag
            layout, or, on every process, processes that disagree.
    """
    layout = check_layout(layout)
    rank, size = place(group)
    _check_options(options)
    rows = chunk_length("q.shape[2]", q.shape[_AXIS], layout)
    if k.shape[_AXIS] != q.shape[_AXIS] or v.shape[_AXIS] != q.shape[_AXIS]:
        expected = f"{q.shape[_AXIS]} rows, as q has"
        raise ArgumentError("k, v", expected, (k.shape[_AXIS], v.shape[_AXIS]))
    words = (q.shape, k.shape, v.shape, str(q.dtype), layout, scale, return_lse, words_of(options))
    agree("q, k, v and options", words, q.shape, group)
    if k.shape[:2] != v.shape[:2]:
        raise ArgumentError("v.shape", f"{k.shape[:2]} before its rows, as k has", v.shape)
    keys, values = _whole(k, v, size, rank, layout, group)
    cuts = [n * rows for n in range(1, len(chunks_of(rank, size, layout)))]
    found = []
    for number, part in zip(
        chunks_of(rank, size, layout), mx.split(q, cuts, axis=_AXIS), strict=True
    ):
        end = (number + 1) * rows if options.get("causal") else keys.shape[_AXIS]
        seen = keys[:, :, :end], values[:, :, :end]
        found.append(_chunk(part, *seen, number * rows, scale, return_lse, options))
    if not return_lse:
        return mx.concatenate(found, axis=_AXIS)
    outs, lses = zip(*found, strict=True)
    return mx.concatenate(list(outs), axis=_AXIS), mx.concatenate(list(lses), axis=_AXIS)


def explain_context(
    q: mx.array, k: mx.array, v: mx.array, *, group: Any = None, layout: str = "zigzag"
) -> str:
    """How `context_attention` computes such a call, and the bytes that it sends; text."""
    _, size = place(group)
    part = k.nbytes + v.nbytes
    chunks = len(chunks_of(0, size, check_layout(layout)))
    return "\n".join(
        (
            f"context attention over {size} processes, {layout}: "
            f"{q.shape[_AXIS]} of {size * q.shape[_AXIS]} rows here, in {chunks} chunks",
            f"  method: gather of keys and values; a ring passes {(size - 1) * part} bytes through "
            f"each process, and every process holds all keys and values ({size * part} bytes)",
            "  gradients: those of keys and values are summed over all processes, "
            f"{size * part} bytes each",
        )
    )


def _chunk(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    first: int,
    scale: float | None,
    return_lse: bool,
    options: dict[str, Any],
) -> Any:
    """Attention of neighbouring queries, the first of which has a number in the whole sequence."""
    options = dict(options)
    rope = options.get("rope")
    if isinstance(rope, Rope):
        options["rope"] = rope.moved(first)
    has_functions = not options.keys().isdisjoint(("score_mod", "mask_mod"))
    call: Any = flex_attention if has_functions else attention
    return call(q, k, v, scale=scale, return_lse=return_lse, q_offset=first, **options)


def _check_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name not in OPTIONS and value is not None:
            raise ArgumentError(
                name, f"none with parts of a sequence, where {', '.join(sorted(OPTIONS))} go", value
            )
    if options.get("dropout") and options.get("dropout_key") is None:
        raise ArgumentError("dropout_key", "a key, the same on every process, with dropout", None)
    slopes = options.get("alibi_slopes")
    if isinstance(slopes, mx.array) and slopes.ndim != 1:
        raise ArgumentError("alibi_slopes.shape", "(H,) with parts of a sequence", slopes.shape)


def _gathered(x: mx.array, group: Any) -> mx.array:
    """The parts of all processes, ``(size, ...)``."""
    return mx.distributed.all_gather(mx.contiguous(x)[None], group=group)


def _whole(
    k: mx.array, v: mx.array, size: int, rank: int, layout: str, group: Any
) -> tuple[mx.array, mx.array]:
    """Keys and values of the whole sequence; their cotangents are summed over all processes.

    ``mx.distributed`` differentiates a gather as if every process computed the same loss. Keys and
    values travel in one message: of two, processes whose graphs differ may send either first.
    """
    width = k.shape[-1]

    @mx.custom_function
    def whole(k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        both = _gathered(mx.concatenate([k, v], axis=-1), group)
        keys, values = mx.split(joined(both, size, layout, _AXIS), [width], axis=-1)
        return keys.astype(k.dtype), values.astype(v.dtype)

    @whole.vjp
    def backward(primals: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, mx.array]:
        both = mx.distributed.all_sum(mx.concatenate(list(cotangents), axis=-1), group=group)
        own = own_part(both, rank, size, layout, _AXIS)
        keys, values = mx.split(own, [width], axis=-1)
        return keys.astype(primals[0].dtype), values.astype(primals[1].dtype)

    if size == 1:
        return k, v
    keys, values = cast(tuple[mx.array, mx.array], whole(k, v))
    return keys, values
