"""The options of a call, in one place for every function that users call."""

from __future__ import annotations

from typing import Literal, TypedDict

import mlx.core as mx

from metalgen.ops.rope import Rope

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
    mask: mx.array | Literal["causal"] | None
    sinks: mx.array | None
    dropout: float
    dropout_key: mx.array | None
    kv_lens: mx.array | None
    block_table: mx.array | None
    rope: Rope | None
    deterministic: bool
    tf32: bool
    max_work: int | None
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
