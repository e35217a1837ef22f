"""The options of a call, in one place for every function that users call."""

from __future__ import annotations

from typing import Literal, TypedDict

import mlx.core as mx

from metalgen.problem.block_mask import BlockMask
from metalgen.problem.rope import Rope

Quantized = tuple[mx.array, mx.array, mx.array] | list[mx.array]
"""What ``mx.quantize`` returns: packed words, scales, biases."""
Keys = mx.array | Quantized
"""Keys or values: rows, or quantized rows."""


class SharedOptions(TypedDict, total=False):
    """What every operation takes, as `metalgen.attention` describes it."""

    causal: bool
    window_left: int | None
    window_right: int | None
    softcap: float | None
    alibi_slopes: mx.array | None
    bias: mx.array | None
    mask: mx.array | BlockMask | Literal["causal"] | None
    sinks: mx.array | None
    dropout: float
    dropout_key: mx.array | None
    kv_lens: mx.array | None
    kv_starts: mx.array | None
    q_offset: int | mx.array | None
    seqused_q: mx.array | None
    block_table: mx.array | None
    rope: Rope | None
    deterministic: bool
    tf32: bool
    max_work: int | None
    value_head_dim: int | None
    check: bool
    device: str | None
    chip: str | None
    stream: mx.Stream | mx.Device | mx.DeviceType | None


class Options(SharedOptions, total=False):
    """And what packs sequences."""

    cu_seqlens_q: mx.array | None
    cu_seqlens_k: mx.array | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None


KNOWN_OPTIONS = Options.__optional_keys__

ELSEWHERE = {
    "attn_bias": "'bias'",
    "attn_mask": "'mask'",
    "block_mask": "'mask', or metalgen.flex_attention, which takes 'block_mask'",
    "cache_seqlens": "'kv_lens'",
    "dropout_p": "'dropout'",
    "is_causal": "'causal'",
    "cache_leftpad": "'kv_starts'",
    "learnable_sink": "'sinks'",
    "left_padding": "'kv_starts'",
    "leftpad_k": "'kv_starts'",
    "logits_soft_cap": "'softcap'",
    "mask_mod": "metalgen.flex_attention, which takes 'mask_mod'",
    "page_table": "'block_table'",
    "return_attn_probs": "'return_lse'",
    "return_softmax_lse": "'return_lse'",
    "score_mod": "metalgen.flex_attention, which takes 'score_mod'",
    "sm_scale": "'scale'",
    "softmax_scale": "'scale'",
    "window_size": "'window_left' and 'window_right'",
}
"""What other libraries call an option, and what it is called here."""


def unexpected(operation: str, options: Options) -> TypeError:
    """The error about the first option that there is not, with what was probably meant."""
    import difflib

    name = next(name for name in options if name not in KNOWN_OPTIONS)
    near = difflib.get_close_matches(name, [*KNOWN_OPTIONS, "scale", "return_lse"], 1, 0.5)
    instead = ELSEWHERE.get(name) or (repr(near[0]) if near else "")
    hint = f"; did you mean {instead}?" if instead else ""
    return TypeError(f"{operation}() got an unexpected keyword argument {name!r}{hint}")
