"""Attention with a score function and a mask function of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import mlx.core as mx

from metalgen.calls.options import Keys, Options
from metalgen.calls.request import Functions, call
from metalgen.errors import ArgumentError
from metalgen.problem.block_mask import BlockMask, create_block_mask

if TYPE_CHECKING:
    from metalgen.dsl.trace import Traced

__all__ = ["and_masks", "create_block_mask", "flex_attention", "or_masks"]

ScoreMod = Callable[..., Any]
"""``score_mod(score, b, h, q_idx, kv_idx) -> score``, of scalar arrays."""
MaskMod = Callable[..., Any]
"""``mask_mod(b, h, q_idx, kv_idx) -> whether the key is seen``, of scalar arrays."""


@overload
def flex_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    score_mod: ScoreMod | Traced | None = None,
    mask_mod: MaskMod | Traced | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> mx.array: ...


@overload
def flex_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    score_mod: ScoreMod | Traced | None = None,
    mask_mod: MaskMod | Traced | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[mx.array, mx.array]: ...


@overload
def flex_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    score_mod: ScoreMod | Traced | None = None,
    mask_mod: MaskMod | Traced | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    *,
    return_lse: bool,
    **options: Unpack[Options],
) -> mx.array | tuple[mx.array, mx.array]: ...


def flex_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    score_mod: ScoreMod | Traced | None = None,
    mask_mod: MaskMod | Traced | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    *,
    return_lse: bool = False,
    **options: Unpack[Options],
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention whose scores and mask are functions, by FlexAttention's conventions, in one kernel.

    The functions are written with MLX's own operations on scalar arrays; they may capture arrays
    and index them, as in ``bias[h, q_idx - kv_idx]``. They are traced at each call, in less than a
    millisecond, and must not depend on anything but their arguments and what they capture.

    Args:
        q: ``(B, H, Lq, D)``, k: ``(B, Hkv, Lk, D)``, v: ``(B, Hkv, Lk, Dv)``; float32, float16
            or bfloat16; Hkv divides H; any strides. (Quantized, paged and packed ones:
            `metalgen.attention`.)
        score_mod: ``score_mod(score, b, h, q_idx, kv_idx)``; the scaled score is float32, batch
            entry, query head, query and key are int32 and count from 0. In packed sequences b is
            the sequence, and queries and keys count from its start.
        mask_mod: ``mask_mod(b, h, q_idx, kv_idx)``, a boolean; the key is seen where it is true.
            Alone it is applied to every element, and no block is skipped.
        block_mask: what `create_block_mask` returned for a mask function, in place of `mask_mod`:
            blocks that it empties are skipped, and only those it leaves in part are masked. Not
            with packed sequences.
        scale: factor of the scores; None means ``1 / sqrt(D)``.
        return_lse: also return the log-sum-exp, ``(B, H, Lq)``, float32.
        options: all others of `metalgen.attention`. What adds to a score comes after `score_mod`,
            which takes the place of `softcap`; a key is seen where all masks leave it.

    Returns:
        ``(B, H, Lq, Dv)`` of the type of `q`, zeros in rows that see no key; with `return_lse` a
        pair. Differentiable in q, k, v and the captured arrays, by the definition in plain MLX.

    Raises:
        FunctionError: what is wrong with a function, and what to write instead.
        ArgumentError: shapes, types or names that cannot be used.
        DeviceError: the device is not available here.
    """
    from metalgen.dsl.trace import trace

    _check_block_mask(block_mask)
    score = None if score_mod is None else trace(score_mod, "score_mod")
    mask = None if mask_mod is None else trace(mask_mod, "mask_mod")
    if block_mask is not None:
        if mask is not None and not mask.is_same(block_mask.mask):
            expected = "None with a block_mask, which brings its own mask function and arrays"
            raise ArgumentError("mask_mod", expected, mask.graph.text)
        mask = block_mask.mask
    functions = Functions(score, mask, block_mask)
    return call("flex_attention", q, k, v, scale, return_lse, options, functions)


def _check_block_mask(block_mask: object) -> None:
    if block_mask is not None and not isinstance(block_mask, BlockMask):
        expected = "what create_block_mask returns, or None (a function goes to mask_mod)"
        raise ArgumentError("block_mask", expected, block_mask)


def and_masks(*masks: MaskMod) -> MaskMod:
    """The mask function of what all of `masks` leave."""
    return _combined("and_masks", masks, lambda x, y: x & y)


def or_masks(*masks: MaskMod) -> MaskMod:
    """The mask function of what any of `masks` leaves."""
    return _combined("or_masks", masks, lambda x, y: x | y)


def _combined(name: str, masks: tuple[MaskMod, ...], combine: Callable[[Any, Any], Any]) -> MaskMod:
    if not masks or not all(callable(mask) for mask in masks):
        raise ArgumentError(name, "one or more mask functions", masks)

    def mask_mod(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        seen = masks[0](b, h, q_idx, kv_idx)
        for mask in masks[1:]:
            seen = combine(seen, mask(b, h, q_idx, kv_idx))
        return seen

    return mask_mod
