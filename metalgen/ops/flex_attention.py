"""Attention with a score function and a mask function of the user's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Unpack, overload

import mlx.core as mx

from metalgen.arguments import as_number
from metalgen.calls.options import Keys, Options
from metalgen.calls.request import Functions, call
from metalgen.errors import ArgumentError
from metalgen.problem.block_mask import BlockMask, create_block_mask, create_mask, noop_mask

if TYPE_CHECKING:
    from metalgen.dsl.trace import Traced

__all__ = [
    "AuxOutput",
    "AuxRequest",
    "and_masks",
    "create_block_mask",
    "create_mask",
    "flex_attention",
    "noop_mask",
    "or_masks",
]

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
    mask_mod: MaskMod | Traced | BlockMask | None = None,
    block_mask: BlockMask | float | None = None,
    scale: float | None = None,
    *,
    enable_gqa: bool | None = None,
    return_lse: Literal[False] = False,
    **options: Unpack[Options],
) -> mx.array: ...


@overload
def flex_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    score_mod: ScoreMod | Traced | None = None,
    mask_mod: MaskMod | Traced | BlockMask | None = None,
    block_mask: BlockMask | float | None = None,
    scale: float | None = None,
    *,
    enable_gqa: bool | None = None,
    return_lse: Literal[True],
    **options: Unpack[Options],
) -> tuple[mx.array, mx.array]: ...


@overload
def flex_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    score_mod: ScoreMod | Traced | None = None,
    mask_mod: MaskMod | Traced | BlockMask | None = None,
    block_mask: BlockMask | float | None = None,
    scale: float | None = None,
    *,
    enable_gqa: bool | None = None,
    return_lse: bool,
    **options: Unpack[Options],
) -> mx.array | tuple[mx.array, mx.array]: ...


@overload
def flex_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    score_mod: ScoreMod | Traced | None = None,
    mask_mod: MaskMod | Traced | BlockMask | None = None,
    block_mask: BlockMask | float | None = None,
    scale: float | None = None,
    *,
    enable_gqa: bool | None = None,
    return_aux: AuxRequest,
    **options: Unpack[Options],
) -> tuple[mx.array, AuxOutput]: ...


def flex_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    score_mod: ScoreMod | Traced | None = None,
    mask_mod: MaskMod | Traced | BlockMask | None = None,
    block_mask: BlockMask | float | None = None,
    scale: float | None = None,
    *,
    enable_gqa: bool | None = None,
    return_lse: bool = False,
    return_aux: AuxRequest | None = None,
    **options: Unpack[Options],
) -> mx.array | tuple[mx.array, mx.array] | tuple[mx.array, AuxOutput]:
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
        block_mask: what `create_block_mask` returned for a mask function, or for an array of
            booleans, in place of `mask_mod`: blocks that it empties are skipped, and only those it
            leaves in part are masked. Not with packed sequences. As in FlexAttention it may also
            stand third, in the place of `mask_mod`, with the scale after it.
        scale: factor of the scores; None means ``1 / sqrt(D)``.
        enable_gqa: whether query heads may share heads of keys; None and True: they may.
        return_lse: also return the log-sum-exp, ``(B, H, Lq)``, float32.
        return_aux: FlexAttention's way to ask for it: ``AuxRequest(lse=True)``.
        options: all others of `metalgen.attention`. What adds to a score comes after `score_mod`,
            which takes the place of `softcap`; a key is seen where all masks leave it.

    Returns:
        ``(B, H, Lq, Dv)`` of the type of `q`, zeros in rows that see no key; with `return_lse` a
        pair; with `return_aux` a pair with an `AuxOutput`. Differentiable in q, k, v and what the
        functions capture.

    Raises:
        FunctionError: what is wrong with a function, and what to write instead.
        ArgumentError: shapes, types or names that cannot be used.
        DeviceError: the device is not available here.
    """
    if isinstance(mask_mod, BlockMask) or as_number(block_mask) is not None:
        mask_mod, block_mask, scale = _as_flex_attention(mask_mod, block_mask, scale)
    assert not isinstance(mask_mod, BlockMask)
    _check_block_mask(block_mask)
    assert block_mask is None or isinstance(block_mask, BlockMask)
    _check_heads(enable_gqa, q, k)
    functions = functions_of(score_mod, mask_mod, block_mask)
    if return_aux is None:
        return call("flex_attention", q, k, v, scale, return_lse, options, functions)
    _check_aux(return_aux, return_lse)
    result = call("flex_attention", q, k, v, scale, return_aux.lse, options, functions)
    return (result[0], AuxOutput(result[1])) if isinstance(result, tuple) else (result, AuxOutput())


def functions_of(
    score_mod: ScoreMod | Traced | None,
    mask_mod: MaskMod | Traced | None,
    block_mask: BlockMask | None,
) -> Functions:
    """The functions of a call, traced; raises `FunctionError` and `ArgumentError`."""
    from metalgen.dsl.trace import trace

    _check_block_mask(block_mask)
    score = None if score_mod is None else trace(score_mod, "score_mod")
    mask = None if mask_mod is None else trace(mask_mod, "mask_mod")
    if block_mask is not None:
        own = block_mask.mask
        if mask is not None and own is None:
            expected = "None with the block mask of an array"
            raise ArgumentError("mask_mod", expected, mask.graph.text)
        if mask is not None and own is not None and not mask.is_same(own):
            expected = "None with a block_mask, which brings its own mask function and arrays"
            raise ArgumentError("mask_mod", expected, mask.graph.text)
        mask = own
    return Functions(score, mask, block_mask)


@dataclass(frozen=True)
class AuxRequest:
    """What else `flex_attention` returns: the log-sum-exp.

    ``max_scores``, which FlexAttention has, is refused: no kernel keeps a row's maximum.
    """

    lse: bool = False
    max_scores: bool = False


@dataclass(frozen=True)
class AuxOutput:
    """What was asked for: the log-sum-exp, ``(B, H, Lq)``, float32, or None."""

    lse: mx.array | None = None
    max_scores: None = None


def _as_flex_attention(
    third: Any, fourth: Any, scale: float | None
) -> tuple[Any, BlockMask | None, float | None]:
    """Mask function, block mask and scale of a call in FlexAttention's order.

    There the block mask stands where ours has the mask function, and the scale after it.
    """
    block_mask = third if isinstance(third, BlockMask) else None
    if block_mask is not None and isinstance(fourth, BlockMask):
        raise ArgumentError("block_mask", "one block mask", "two of them")
    if fourth is not None:
        if scale is not None:
            raise ArgumentError("scale", "one scale", f"{fourth} and {scale}")
        scale = fourth
    return (None if block_mask is not None else third), block_mask, scale


def _check_heads(enable_gqa: object, q: Any, k: Any) -> None:
    """Whether heads may be shared as they are; shapes are checked in full later."""
    if enable_gqa is None or enable_gqa is True:
        return
    if enable_gqa is not False:
        raise ArgumentError("enable_gqa", "True, False or None", enable_gqa)
    keys = k[0] if isinstance(k, (tuple, list)) and k else k
    counts = [x.shape[1] for x in (q, keys) if isinstance(x, mx.array) and x.ndim == 4]
    if len(set(counts)) > 1:
        expected = f"True, because {counts[0]} query heads share {counts[1]} heads of keys"
        raise ArgumentError("enable_gqa", expected, False)


def _check_aux(return_aux: object, return_lse: bool) -> None:
    if not isinstance(return_aux, AuxRequest):
        raise ArgumentError("return_aux", "a metalgen.AuxRequest, or None", return_aux)
    if return_aux.max_scores:
        raise ArgumentError("return_aux.max_scores", "False: no kernel keeps it", True)
    if return_lse:
        raise ArgumentError("return_lse", "False with return_aux, which asks for it", True)


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
