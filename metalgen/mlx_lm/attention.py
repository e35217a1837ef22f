"""The function that takes the place of mlx-lm's ``scaled_dot_product_attention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx

from metalgen import switches
from metalgen.calls import recording
from metalgen.calls.kernel import Kernel
from metalgen.calls.options import Options
from metalgen.calls.request import prepare
from metalgen.devices import default_device
from metalgen.errors import ArgumentError
from metalgen.families.sizes import DECODE_QUERIES
from metalgen.mlx_lm import counts
from metalgen.mlx_lm.masks import Mask, MaskRules
from metalgen.nn.flash import pinned_block
from metalgen.ops.attention import attention
from metalgen.ops.flex_attention import flex_attention
from metalgen.ops.sdpa import attend


@dataclass
class Where:
    """Where patched models compute.

    Args:
        device, chip: as of `metalgen.attention`.
        block_size: queries and keys of a tile, for calls with many queries; None: as tuned.
    """

    device: str | None = None
    chip: str | None = None
    block_size: int | None = None


class KeyColumns(NamedTuple):
    """Quantized values that are columns of the keys, as in latent attention."""

    words: mx.array
    scales: mx.array
    biases: mx.array


active: Where | None = None
"""Set by `patch`; None: mlx-lm's own function computes everything."""
original: Any = None
"""mlx-lm's own function; kept after `unpatch` for modules that still hold ours."""


def scaled_dot_product_attention(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention of mlx-lm's models, in the place of ``mlx_lm.models.base``'s function.

    Args:
        queries: ``(B, H, L, D)``.
        keys, values: arrays, or of a quantized cache the triples of ``mx.quantize``.
        cache: the cache that they come from, or None.
        scale: factor of the scores.
        mask: `metalgen.mlx_lm.masks.MaskRules`, an array, ``"causal"`` or None.
        sinks: ``(H,)``, or None.
    """
    return compute(queries, keys, values, cache, scale, mask, sinks)


def compute(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None = None,
    softcap: float | None = None,
) -> mx.array:
    """`scaled_dot_product_attention`, with a softcap of the scores (Gemma 2)."""
    apart = not isinstance(keys, mx.array) and quantized_apart(cache)

    def own(reason: str) -> mx.array:
        rows = _dequantized(keys, values, cache) if apart else (keys, values, cache)
        return _own(queries, *rows, scale, mask, sinks, reason)

    rules = mask if isinstance(mask, MaskRules) else None
    if rules is not None and not _fits(rules, queries, keys):
        mask, rules = rules.array("keys of another length than the cache's"), None
    counts.masks[_kind(mask)] += 1
    where = active
    if where is None:
        return own("unpatched")
    if softcap is None and (reason := _stays(keys, sinks)):
        return own(reason)
    named = where.device or default_device().name
    plain = rules is None and softcap is None and where.block_size is None
    if plain and isinstance(keys, mx.array) and named != "reference":
        # As mx.fast's function: MLX keeps the call unless ours was measured as faster.
        return attend(
            queries, keys, values, scale, mask, sinks, device=where.device, chip=where.chip
        )
    options = Options(sinks=sinks, device=where.device, chip=where.chip)
    if softcap is not None:
        options["softcap"] = softcap
    if apart and not isinstance(values, KeyColumns):
        options["value_head_dim"] = values[0].shape[3] * 32 // cache.value_bits
    try:
        if rules is not None:
            return _by_rules(queries, keys, values, scale, rules, options)
        if mask is not None:
            options["mask"] = mask  # type: ignore[typeddict-item]
        return _attention(queries, keys, values, scale, options)
    except ArgumentError as error:
        if softcap is not None or error.argument == "block_size":
            raise
        reason = f"metalgen does not take it: {error}"
        return own(reason)


def quantized_apart(cache: Any) -> bool:
    """Whether a cache quantizes values otherwise than keys."""
    if not hasattr(cache, "value_bits"):
        return False
    return bool((cache.bits, cache.group_size) != (cache.value_bits, cache.value_group_size))


def _dequantized(keys: Any, values: Any, cache: Any) -> tuple[Any, Any, Any]:
    """Rows for mlx-lm's own function, which has one number of bits for both, and no cache."""
    own = {"group_size": cache.group_size, "bits": cache.bits}
    other = {"group_size": cache.value_group_size, "bits": cache.value_bits}
    values_own = own if isinstance(values, KeyColumns) else other
    return mx.dequantize(*keys, **own), mx.dequantize(*values, **values_own), None


def _kind(mask: Any) -> str:
    if mask is None:
        return "none"
    if isinstance(mask, str):
        return "causal"
    if isinstance(mask, MaskRules):
        return "rules"
    return "boolean" if mask.dtype == mx.bool_ else "additive"


def _fits(rules: MaskRules, queries: mx.array, keys: Any) -> bool:
    rows = keys if isinstance(keys, mx.array) else keys[0]
    if queries.ndim != 4 or (queries.shape[2], rows.shape[2]) != (rules.q_len, rules.kv_len):
        return False
    return rules.starts is None or rules.starts.shape[0] == queries.shape[0]


def _stays(keys: Any, sinks: mx.array | None) -> str:
    """Why mlx-lm's own function computes a call; empty where ours does."""
    if not isinstance(keys, mx.array) and sinks is not None:
        return ""  # mlx-lm refuses it
    return "" if is_ours() else "there is no GPU here"


def _by_rules(
    queries: mx.array,
    keys: Any,
    values: Any,
    scale: float,
    rules: MaskRules,
    options: Options,
) -> mx.array:
    if rules.ring is not None:
        if rules.starts is not None:
            return _in_padded_ring(queries, keys, values, scale, rules, options)
        assert rules.window is not None
        keys, values = (_newest(x, rules.ring, rules.window) for x in (keys, values))
        return _attention(queries, keys, values, scale, options)
    if rules.starts is not None:
        options["kv_starts"] = rules.starts
    options["causal"] = rules.q_len > 1 or rules.window is not None
    if rules.window is not None:
        options["window_left"] = rules.window - 1
    return _attention(queries, keys, values, scale, options)


def _attention(
    queries: mx.array, keys: Any, values: Any, scale: float, options: Options
) -> mx.array:
    block = None if active is None else active.block_size
    if block is None or queries.shape[2] <= DECODE_QUERIES:
        return attention(queries, keys, values, scale=scale, **options)
    prepared = prepare("attention", queries, keys, values, False, options)
    kernel = prepared.kernel
    if isinstance(kernel, Kernel) and kernel.device != "reference":
        kernel = pinned_block(kernel.config, block, kernel.device)
    out = kernel(*prepared.arrays, scale=scale, inputs=prepared.inputs)
    assert isinstance(out, mx.array)
    return out


def _newest(rows: Any, oldest: int, count: int) -> Any:
    """The last `count` rows in time of a ring buffer whose first is `oldest`; in any order."""
    if not isinstance(rows, mx.array):
        return tuple(_newest(part, oldest, count) for part in rows)
    length = rows.shape[2]
    first = (oldest - count) % length
    if first + count <= length:
        return rows[:, :, first : first + count]
    return mx.concatenate([rows[:, :, first:], rows[:, :, : first + count - length]], axis=2)


def _in_padded_ring(
    queries: mx.array,
    keys: Any,
    values: Any,
    scale: float,
    rules: MaskRules,
    options: Options,
) -> mx.array:
    """One query in a ring that may still hold padding, which lies anywhere in it."""
    starts, length = rules.starts, rules.kv_len
    assert starts is not None and rules.ring is not None
    oldest = mx.array([rules.ring], mx.int32)  # an array, so that each step has the same kernel
    first = 0 if rules.window is None else length - rules.window
    starts = mx.maximum(starts, first).astype(mx.int32)

    def valid(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        slot = kv_idx - oldest[0]
        return mx.where(slot < 0, slot + length, slot) >= starts[b]

    return flex_attention(queries, keys, values, mask_mod=valid, scale=scale, **options)


def _own(
    queries: mx.array,
    keys: Any,
    values: Any,
    cache: Any,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
    reason: str,
) -> mx.array:
    counts.left[reason] += 1
    if isinstance(mask, MaskRules):
        mask = mask.array(f"for mlx-lm's own function: {reason}")
    result: mx.array = original(
        queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks
    )
    return result


def is_ours() -> bool:
    """Whether models that compute attention by hand should call ours: patched, and not on a CPU.

    On a machine without a GPU, and with no device named, plain operations would take the place of
    plain operations, which is done only to record the calls.
    """
    if active is None:
        return False
    named = active.device is not None or switches.asked_device() is not None
    return named or recording.active is not None or default_device().is_gpu
