"""Models of mlx-lm that compute attention by hand, taught to call ours."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx

from metalgen.mlx_lm import attention
from metalgen.mlx_lm.masks import MaskRules
from metalgen.problem.config import MAX_HEAD_DIM, MIN_HEAD_DIM

Replacement = tuple[Any, str, Any]
"""An object, the name of one of its attributes, and what to put there."""

TOUCHING = frozenset({"minimax_m3_vl", "olmo"})
"""Models that look at their mask in ways that rules cannot answer: they get mlx-lm's own masks."""

FAULTS = {
    "olmo": "mlx-lm 0.32.2 adds the mask to the scores: prompts raise ValueError, and padding in a "
    "batch is seen",
    "phi3small": "mlx-lm 0.32.2 adds the boolean mask to the scores of block-sparse layers as 0 "
    "and 1: those layers see future tokens",
    "gemma2": "mlx-lm 0.32.2 itself lines the masks of a padded batch up with the wrong axis, so "
    "that it fails, or is wrong where there are as many sequences as KV heads, and it fails with a "
    "quantized cache; patched both work",
    "deepseek_v3": "mlx-lm 0.32.2 itself fails with a quantized cache; patched it works",
    "glm4_moe_lite": "mlx-lm 0.32.2 itself fails with a quantized cache; patched it works",
    "gpt_oss": "mlx-lm 0.32.2 itself refuses a quantized cache, because of the sinks; patched it "
    "works",
}
"""What is wrong with a model, whether it is patched or not, unless said otherwise."""


def replacements(name: str, module: ModuleType) -> list[Replacement]:
    """What to put where in a model's module, by the module's last name; empty for most models."""
    found: list[Replacement] = []
    if name == "gemma2":
        found.append((module.Attention, "__call__", _capped(module.Attention.__call__)))
    if name == "gear":
        found.append((module, "_softcap_attention", _softcap_function))
    if name in _LATENT:
        kind = getattr(module, _LATENT[name])
        found.append((kind, "__call__", _latent(kind.__call__)))
    if name in ("plamo2", "muse_spark", "deepseek_v41"):
        found.append((module, "mx", _WithOurs(mx, fast=_WithOurs(mx.fast, **_FAST))))
    return found


def takes_rules(name: str) -> bool:
    """Whether a model that asks for an array of booleans is one that `replacements` changes."""
    return name == "gemma2" or name in _LATENT


class _WithOurs:
    """A module with some names of ours in place of its own."""

    def __init__(self, module: Any, **ours: Any) -> None:
        self._module = module
        vars(self).update(ours)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _fast(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
    **others: Any,
) -> mx.array:
    """``mx.fast.scaled_dot_product_attention`` of models that call it by themselves."""
    if others:
        if isinstance(mask, MaskRules):
            mask = mask.array(f"{', '.join(others)} of mx.fast's function")
        return mx.fast.scaled_dot_product_attention(
            q, k, v, scale=scale, mask=mask, sinks=sinks, **others
        )
    return attention.compute(q, k, v, None, scale, mask, sinks)


_FAST = {"scaled_dot_product_attention": _fast}


def _softcap_function(
    queries: mx.array, keys: Any, values: Any, scale: float, softcap: float, mask: Any
) -> mx.array:
    return attention.compute(queries, keys, values, None, scale, mask, None, softcap)


def _capped(own: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Gemma 2's attention: scores are capped, which needs no array of scores or of a mask."""

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not attention.is_ours() or not MIN_HEAD_DIM <= self.head_dim <= MAX_HEAD_DIM:
            return own(self, x, mask, cache)
        batch, length, _ = x.shape

        def heads(rows: mx.array, count: int) -> mx.array:
            return rows.reshape(batch, length, count, self.head_dim).swapaxes(1, 2)

        queries = heads(self.q_proj(x), self.n_heads)
        keys: Any = heads(self.k_proj(x), self.n_kv_heads)
        values: Any = heads(self.v_proj(x), self.n_kv_heads)
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        cap = self.attn_logit_softcapping
        out = attention.compute(queries, keys, values, cache, self.scale, mask, None, cap)
        return self.o_proj(out.swapaxes(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    return __call__


_LATENT = {
    "deepseek_v3": "DeepseekV3Attention",
    "glm4_moe_lite": "Glm4MoeLiteAttention",
    "kimi_linear": "KimiMLAAttention",
    "longcat_flash": "LongcatFlashMLA",
    "bailing_hybrid": "MultiLatentAttention",
}
"""Classes of multi-head latent attention (DeepSeek-AI, 2024) that are alike but for names."""


def _latent(own: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Multi-head latent attention without an array of scores.

    mlx-lm computes the scores of the rotary part apart and adds them as a mask. Here a query is
    both of its parts side by side, and so is a key. Few queries meet the latent rows themselves
    (the absorbed form: all heads share one key of ``kv_lora_rank + qk_rope_head_dim``, whose first
    ``kv_lora_rank`` are its value); many meet the keys and values that each head makes of them,
    which takes less work, as `absorbs` says.

    The cache holds a key as one row, and, as mlx-lm has it, the rotary part as its value. A cache
    that mlx-lm filled by itself goes on as it is.
    """

    def __call__(self: Any, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        rank, rotary = self.kv_lora_rank, self.qk_rope_head_dim
        if not attention.is_ours() or rank + rotary > MAX_HEAD_DIM:
            return own(self, x, mask, cache)
        count = _first(self, "num_heads", "num_attention_heads")
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
            q = mx.concatenate([self.embed_q(q_own), q_rope], axis=-1)
            values = _columns(rows, rank, cache)
            out = attention.compute(q, rows, values, cache, self.scale, mask)
            out = self.unembed_out(out)
        else:
            rows = _plain(rows, cache)
            latent, k_rope = mx.split(rows, [rank], axis=-1)
            k_rope = mx.broadcast_to(k_rope, (batch, count, *k_rope.shape[2:]))
            keys = mx.concatenate([self.embed_q(latent, transpose=False), k_rope], axis=-1)
            q = mx.concatenate([q_own, q_rope], axis=-1)
            values = self.unembed_out(latent)
            out = attention.compute(q, keys, values, None, self.scale, mask)
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
