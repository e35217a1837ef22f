"""Models of mlx-lm that compute attention by hand, taught to call ours."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import mlx.core as mx

from metalgen.mlx_lm import attention
from metalgen.mlx_lm.latent import LATENT, latent_attention
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
    if name in LATENT:
        kind = getattr(module, LATENT[name])
        found.append((kind, "__call__", latent_attention(kind.__call__)))
    if name in ("plamo2", "muse_spark", "deepseek_v41"):
        found.append((module, "mx", _WithOurs(mx, fast=_WithOurs(mx.fast, **_FAST))))
    return found


def takes_rules(name: str) -> bool:
    """Whether a model that asks for an array of booleans is one that `replacements` changes."""
    return name == "gemma2" or name in LATENT


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
