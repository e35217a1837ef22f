"""Multi-head latent attention (DeepSeek-AI, 2024) for mlx-lm, without an array of scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from metalgen.mlx_lm import attention
from metalgen.problem.config import MAX_HEAD_DIM

LATENT = {
    "deepseek_v2": "DeepseekV2Attention",
    "deepseek_v3": "DeepseekV3Attention",
    "glm4_moe_lite": "Glm4MoeLiteAttention",
    "kimi_linear": "KimiMLAAttention",
    "longcat_flash": "LongcatFlashMLA",
    "bailing_hybrid": "MultiLatentAttention",
    "minicpm3": "Attention",
    "youtu_llm": "YoutuLLMAttention",
}
"""By a model's module: its class of latent attention. They are alike but for names."""

_LAYERS: Any = nn  # which has no types
_WEIGHTS = {"weight", "scales", "biases"}  # of a linear layer that adds nothing


@dataclass(frozen=True)
class HeadMaps:
    """What a layer makes of rows, in each head by a matrix of its own."""

    absorb: Callable[[mx.array], mx.array]
    """Of queries (B, H, L, own part): what meets a latent row, (B, H, L, rank)."""
    output: Callable[[mx.array], mx.array]
    """Of attention's output in latent columns (B, H, L, rank): (B, H, L, value columns)."""
    expand: Callable[[mx.array], tuple[mx.array, mx.array]]
    """Of latent rows (B, 1, L, rank): each head's keys, without the rotary part, and values."""


def latent_attention(own: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """What replaces the call of a layer; ``own`` is mlx-lm's.

    A query is both of its parts side by side, and so is a key: mlx-lm computes the scores of the
    rotary part apart and adds them as a mask, or keeps the keys and values of every head. Few
    queries meet the latent rows themselves (the absorbed form: all heads share one key of
    ``kv_lora_rank + qk_rope_head_dim`` columns, whose first ``kv_lora_rank`` are its value). Many
    queries meet the keys and values that each head makes of those rows, if that takes less work,
    as `absorbs` says.

    The cache holds a key as one row, and the rotary part as its value. A cache that mlx-lm filled
    by itself goes on as it is.
    """

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rank, rotary = self.kv_lora_rank, self.qk_rope_head_dim
        maps = _maps(self, cache)
        if maps is None or not attention.is_ours() or rank + rotary > MAX_HEAD_DIM:
            return own(self, x, mask, cache)
        count = _first(self, "num_heads", "num_attention_heads")
        scale = _first(self, "scale", "softmax_scale")
        batch, length, _ = x.shape
        if getattr(self, "q_lora_rank", None) is None:
            q = self.q_proj(x)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q = q.reshape(batch, length, count, -1).swapaxes(1, 2)
        latent, k_rope = mx.split(self.kv_a_proj_with_mqa(x), [rank], axis=-1)
        latent = self.kv_a_layernorm(latent)
        if getattr(self, "mla_scale_q_lora", None) is not None:
            q = q * self.mla_scale_q_lora
        if getattr(self, "mla_scale_kv_lora", None) is not None:
            latent = latent * self.mla_scale_kv_lora
        q_own, q_rope = mx.split(q, [self.qk_nope_head_dim], axis=-1)
        latent, k_rope = mx.expand_dims(latent, 1), mx.expand_dims(k_rope, 1)
        if (rope := getattr(self, "rope", None)) is not None:
            offset = 0 if cache is None else cache.offset
            q_rope, k_rope = rope(q_rope, offset), rope(k_rope, offset)
        rows = _rows(cache, latent, k_rope)
        if length == 1 or absorbs(length, rank, rotary, self.qk_nope_head_dim, self.v_head_dim):
            q = mx.concatenate([maps.absorb(q_own), q_rope], axis=-1)
            values = _columns(rows, rank, cache)
            out = maps.output(attention.compute(q, rows, values, cache, scale, mask))
        else:
            latent, k_rope = mx.split(_plain(rows, cache), [rank], axis=-1)
            k_own, values = maps.expand(latent)
            k_rope = mx.broadcast_to(k_rope, (batch, count, *k_rope.shape[2:]))
            keys = mx.concatenate([k_own, k_rope], axis=-1)
            q = mx.concatenate([q_own, q_rope], axis=-1)
            out = attention.compute(q, keys, values, None, scale, mask)
        out = out.swapaxes(1, 2).reshape(batch, length, -1)
        return _first(self, "o_proj", "dense")(out)  # type: ignore[no-any-return]

    return __call__


def absorbs(length: int, rank: int, rotary: int, own: int, value: int) -> bool:
    """Whether the absorbed form takes less work for so many queries than keys for each head.

    For each key and head, queries cost ``rank + rotary + rank`` multiplications in the absorbed
    form, and ``own + rotary + value`` in the other, which first makes the head's key and value of
    a latent row: ``rank * (own + value)``. With DeepSeek V3's widths that is up to 170 queries.
    """
    return length * (2 * rank - own - value) <= rank * (own + value)


def _maps(self: Any, cache: Any) -> HeadMaps | None:
    """A layer's maps; None if mlx-lm's own call has to compute.

    Some models have two layers, each with a matrix for every head. In the others ``kv_b_proj`` has
    the rows of both, and mlx-lm caches the keys and values that it makes: such a layer is ours
    only with a cache that mlx-lm has not begun, and while its weights are plain or quantized (not,
    say, with an adapter).
    """
    if (embed := getattr(self, "embed_q", None)) is not None:
        by_head = partial(embed, transpose=False)
        return HeadMaps(embed, self.unembed_out, lambda x: (by_head(x), self.unembed_out(x)))
    joint = self.kv_b_proj
    if cache is None or _keeps_heads(cache) or not {*joint.parameters()} <= _WEIGHTS:
        return None
    if type(joint) is _LAYERS.Linear:
        keys, values = _halves(self, joint.weight)
        return HeadMaps(
            lambda x: x @ keys, lambda x: x @ values.swapaxes(-1, -2), partial(_expand, self)
        )
    if type(joint) is _LAYERS.QuantizedLinear:
        parts = [joint.weight, joint.scales, joint.get("biases")]
        halves = [(None, None) if x is None else _halves(self, x) for x in parts]

        def multiply(x: mx.array, half: int, transpose: bool) -> mx.array:
            words, scales, biases = (cast(Any, each[half]) for each in halves)
            kept = {"group_size": joint.group_size, "bits": joint.bits, "mode": joint.mode}
            found: mx.array = mx.quantized_matmul(
                x, words, scales=scales, biases=biases, transpose=transpose, **kept
            )
            return found

        return HeadMaps(
            lambda x: multiply(x, 0, False), lambda x: multiply(x, 1, True), partial(_expand, self)
        )
    return None


def _halves(self: Any, joint: mx.array) -> tuple[mx.array, mx.array]:
    """The rows of keys and of values in an array of ``kv_b_proj``: each (H, rows, columns)."""
    by_head = joint.reshape(-1, self.qk_nope_head_dim + self.v_head_dim, joint.shape[-1])
    first, second = mx.split(by_head, [self.qk_nope_head_dim], axis=1)
    return first, second


def _expand(self: Any, latent: mx.array) -> tuple[mx.array, mx.array]:
    """Keys, without the rotary part, and values of every head, by ``kv_b_proj``."""
    batch, _, length, _ = latent.shape
    both = self.kv_b_proj(latent.squeeze(1)).reshape(batch, length, self.num_heads, -1)
    keys, values = mx.split(both.swapaxes(1, 2), [self.qk_nope_head_dim], axis=-1)
    return keys, values


def _keeps_heads(cache: Any) -> bool:
    """Whether a cache holds keys of every head, as mlx-lm fills it by itself."""
    held = getattr(cache, "keys", None)
    first = held[0] if isinstance(held, (tuple, list)) and held else held
    return isinstance(first, mx.array) and first.shape[1] > 1


def _first(self: Any, *names: str) -> Any:
    return next(getattr(self, name) for name in names if hasattr(self, name))


def _rows(cache: Any, latent: mx.array, k_rope: mx.array) -> Any:
    """All keys, latent and rotary part side by side: an array, or quantized."""
    both = mx.concatenate([latent, k_rope], axis=-1)
    if cache is None:
        return both
    held = getattr(cache, "keys", None)
    if isinstance(held, mx.array) and held.shape[-1] == latent.shape[-1]:  # filled by mlx-lm itself
        return mx.concatenate(cache.update_and_fetch(latent, k_rope), axis=-1)
    return cache.update_and_fetch(both, k_rope)[0]


def _columns(rows: Any, stop: int, cache: Any) -> Any:
    """The first columns of rows, as views; of quantized ones, those of each part."""
    if isinstance(rows, mx.array):
        return rows[..., :stop]
    words, *others = rows
    scales, biases = (x[..., : stop // cache.group_size] for x in others)
    return attention.KeyColumns(words[..., : stop * cache.bits // 32], scales, biases)


def _plain(rows: Any, cache: Any) -> mx.array:
    if isinstance(rows, mx.array):
        return rows
    words, scales, biases = rows
    return mx.dequantize(words, scales, biases, group_size=cache.group_size, bits=cache.bits)
