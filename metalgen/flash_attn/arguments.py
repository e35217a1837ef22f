"""flash-attn's conventions for arguments, in metalgen's."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen.arguments import as_integer, as_number
from metalgen.errors import ArgumentError
from metalgen.features.conversions import as_int32, brief

IGNORED = ("num_splits", "pack_gqa", "sm_margin", "scheduler_metadata", "deterministic")
"""How a CUDA kernel runs: taken, and without effect here, where tuning decides and every result is
the same from call to call."""
ZERO = ("attention_chunk", "q_descale", "k_descale", "v_descale")
"""Taken where they ask for nothing."""


@dataclass(frozen=True)
class Further:
    """What functions take by name alone: FlashAttention-3's and -4's names, and metalgen's.

    Args:
        qv: ``(..., H, Dv)``; scores are ``q k^T + qv v^T`` (FlashAttention-3's form of MLA).
        learnable_sink: ``(H,)``, FlashAttention-4's attention sinks.
        return_lse: return the output and the log-sum-exp.
        seqused_q, seqused_k: ``(N,)``, how many rows of each packed sequence are there.
        device, chip: as in `metalgen.attention`.
    """

    qv: mx.array | None = None
    learnable_sink: mx.array | None = None
    return_lse: bool = False
    seqused_q: mx.array | None = None
    seqused_k: mx.array | None = None
    device: str | None = None
    chip: str | None = None


def further(function: str, given: dict[str, Any], *taken: str) -> Further:
    """The further arguments of a call.

    Raises:
        TypeError: a name that the function does not take.
        ArgumentError: one that asks for what only a CUDA kernel does.
    """
    known = (*taken, "device", "chip", *IGNORED, *ZERO)
    for name, value in given.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}{hint}")
        if name in ZERO and value is not None and as_number(value) != 0:
            raise ArgumentError(name, "None or 0: metalgen has no such feature", brief(value))
    kept = {name: value for name, value in given.items() if name not in (*IGNORED, *ZERO)}
    for name in ("qv", "learnable_sink"):
        if kept.get(name) is not None:
            kept[name] = array(name, kept[name])
    for name in ("seqused_q", "seqused_k"):
        if kept.get(name) is not None:
            kept[name] = integers(name, kept[name], 1)
    return Further(**kept)


def array(name: str, x: Any, axes: int | None = None, layout: str = "") -> mx.array:
    """An array of MLX, made of NumPy's where it is one.

    Raises:
        ArgumentError: it is neither, or has another number of axes.
    """
    if not isinstance(x, mx.array) and not hasattr(x, "__array__"):
        raise ArgumentError(name, "an mlx.core.array, or one of NumPy's", brief(x))
    found: mx.array = x if isinstance(x, mx.array) else mx.array(x)
    if axes is not None and found.ndim != axes:
        raise ArgumentError(f"{name}.shape", f"{axes} axes {layout}", found.shape)
    return found


def integers(name: str, x: Any, axes: int) -> mx.array:
    """An array of integers as int32; raises `ArgumentError` for anything else."""
    found = array(name, x)
    if not mx.issubdtype(found.dtype, mx.integer):
        raise ArgumentError(f"{name}.dtype", "int32", str(found.dtype))
    if found.ndim != axes:
        expected = f"{axes} axes" if axes > 1 else "1 axis"
        raise ArgumentError(f"{name}.shape", expected, found.shape)
    return as_int32(found)


def per_sequence(name: str, x: Any, count: int) -> mx.array:
    """``(count,)`` int32 of an integer, or of an array of that shape."""
    number = as_integer(x)
    if number is not None:
        return mx.full((count,), number, mx.int32)
    found = integers(name, x, 1)
    if found.size != count:
        raise ArgumentError(f"{name}.shape", f"({count},), one of each sequence", found.shape)
    return found


def bounds(causal: bool, window_size: Any) -> dict[str, Any]:
    """flash-attn's `causal` and `window_size`, as options of `metalgen.attention`.

    A negative side, or None, is no bound; `causal` bounds the right side by the query's own key.
    """
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ArgumentError("window_size", "(left, right), each -1 for no bound", window_size)
    sides: list[int | None] = []
    for side in window_size:
        number = as_integer(side)
        if side is not None and number is None:
            raise ArgumentError("window_size", "two integers, -1 for no bound", window_size)
        sides.append(None if number is None or number < 0 else number)
    left, right = sides
    found: dict[str, Any] = {}
    if causal or right == 0:
        found["causal"], right = True, None
    for name, side in (("window_left", left), ("window_right", right)):
        if side is not None and side < 1 << 24:  # any longer one is no bound
            found[name] = side
    return found


def cap(softcap: Any) -> float | None:
    """flash-attn's `softcap`: 0 is none."""
    number = as_number(softcap)
    if number is None:
        raise ArgumentError("softcap", "a number, 0.0 for none", softcap)
    return number if number > 0 else None


def slopes(alibi_slopes: Any, sequences: int, heads: int) -> mx.array | None:
    """Slopes ``(H,)`` or ``(B, H)`` as float32; raises `ArgumentError` for anything else."""
    if alibi_slopes is None:
        return None
    found = array("alibi_slopes", alibi_slopes)
    if not mx.issubdtype(found.dtype, mx.floating):
        raise ArgumentError("alibi_slopes.dtype", "float32", str(found.dtype))
    if found.shape not in ((heads,), (sequences, heads)):
        expected = f"({heads},) or ({sequences}, {heads})"
        raise ArgumentError("alibi_slopes.shape", expected, found.shape)
    return found.astype(mx.float32)


def check_heads(q: mx.array, k: mx.array, v: mx.array, names: tuple[str, str] = ("k", "v")) -> None:
    """Whether heads and widths, the last two axes of each, fit; raises `ArgumentError`."""
    key, value = names
    if v.shape[:-1] != k.shape[:-1]:
        expected = f"{k.shape[:-1]} before the last axis, as {key} has"
        raise ArgumentError(f"{value}.shape", expected, v.shape)
    if k.shape[-1] != q.shape[-1]:
        raise ArgumentError(f"{key}.shape", f"a last axis of {q.shape[-1]}, as q has", k.shape)
    if not k.shape[-2] or q.shape[-2] % k.shape[-2]:
        expected = f"a number of heads that divides the {q.shape[-2]} of q"
        raise ArgumentError(f"{key}.shape", expected, k.shape)
    for name, x in ((key, k), (value, v)):
        if x.dtype != q.dtype:
            raise ArgumentError(f"{name}.dtype", f"{q.dtype}, the type of q", str(x.dtype))
