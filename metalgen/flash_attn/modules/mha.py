"""Multi-head attention by flash-attn's names and weight names (``flash_attn.modules.mha``)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError
from metalgen.flash_attn.flash_attn_interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from metalgen.flash_attn.kvcache import flash_attn_with_kvcache
from metalgen.flash_attn.layers.rotary import RotaryEmbedding
from metalgen.flash_attn.sequences import write_rows
from metalgen.ops.alibi import alibi_slopes as usual_slopes


@dataclass
class InferenceParams:
    """What layers share while text is generated (``flash_attn.utils.generation``).

    Args:
        max_seqlen, max_batch_size: of the caches.
        seqlen_offset: tokens that there are already.
        batch_size_offset: the first entry of the caches that a call uses.
        key_value_memory_dict: the cache of each layer, ``(max_batch_size, max_seqlen, 2, Hk, D)``.
        lengths_per_sample: ``(B,)``, tokens of each sequence, where they differ.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, mx.array] = field(default_factory=dict)
    lengths_per_sample: mx.array | None = None


class _Attention(nn.Module):  # type: ignore[misc, name-defined]
    """What both inner attentions have in common."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: mx.array | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal, self.softmax_scale = causal, softmax_scale
        self.attention_dropout, self.window_size = attention_dropout, window_size
        self._alibi_slopes, self.deterministic = alibi_slopes, deterministic

    def _keywords(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.attention_dropout if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self._alibi_slopes,
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Attention):
    """Attention of packed queries, keys and values; dropout while training.

    Args:
        causal, softmax_scale, window_size, alibi_slopes, deterministic: as in
            `metalgen.flash_attn.flash_attn_func`.
        attention_dropout: its `dropout_p`.
    """

    def __call__(
        self,
        qkv: mx.array,
        causal: bool | None = None,
        cu_seqlens: mx.array | None = None,
        max_seqlen: int | None = None,
    ) -> Any:
        """``(B, L, H, D)`` of ``(B, L, 3, H, D)``; packed rows, ``(T, ...)``, with `cu_seqlens`."""
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **self._keywords(causal))
        return flash_attn_varlen_qkvpacked_func(
            qkv, cu_seqlens, max_seqlen, **self._keywords(causal)
        )


class FlashCrossAttention(_Attention):
    """Attention of queries over packed keys and values; arguments as of `FlashSelfAttention`."""

    def __call__(
        self,
        q: mx.array,
        kv: mx.array,
        causal: bool | None = None,
        cu_seqlens: mx.array | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: mx.array | None = None,
        max_seqlen_k: int | None = None,
    ) -> Any:
        """``(B, Lq, H, D)`` of q and kv ``(B, Lk, 2, Hk, D)``; packed rows with `cu_seqlens`."""
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **self._keywords(causal))
        starts = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
        sizes = (cu_seqlens, starts, max_seqlen, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, *sizes, **self._keywords(causal))


class MHA(nn.Module):  # type: ignore[misc, name-defined]
    """Multi-head self- or cross-attention with flash-attn's constructor and weights.

    Weights are ``Wqkv`` (or ``Wq`` and ``Wkv`` where `cross_attn`) and ``out_proj``, so that a
    checkpoint of flash-attn's loads.

    Args:
        embed_dim, num_heads, num_heads_kv: widths; None: as many KV heads as heads.
        cross_attn: keys and values are of another input.
        qkv_proj_bias, out_proj_bias: whether the projections have biases.
        dropout, softmax_scale, causal, window_size: as in `FlashSelfAttention`.
        layer_idx: number of the layer, which generation needs.
        dwconv: not supported.
        rotary_emb_dim: columns that rotate; 0: none. `rotary_emb_base`, `rotary_emb_scale_base` and
            `rotary_emb_interleaved` are those of `RotaryEmbedding`.
        use_alibi: the usual slopes; with `causal` only.
        return_residual: also return the input.
        checkpointing: recompute attention in the backward pass (``mx.checkpoint``).
        fused_bias_fc, use_flash_attn, device: no effect.
        dtype: of the weights; None: float32.

    Raises:
        ArgumentError: values that do not fit each other.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: Any = None,
        dtype: mx.Dtype | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_heads_kv is None else num_heads_kv
        for name, value, of in (
            ("num_heads", num_heads, embed_dim),
            ("num_heads_kv", kv_heads, num_heads),
        ):
            number = as_integer(value)
            if number is None or number < 1 or of % number:
                raise ArgumentError(name, f"a number that divides {of}", value)
        if dwconv:
            raise ArgumentError("dwconv", "False: metalgen has no such layer", dwconv)
        if use_alibi and not causal:
            raise ArgumentError("use_alibi", "False without causal", use_alibi)
        if cross_attn and rotary_emb_dim:
            raise ArgumentError("rotary_emb_dim", "0 with cross_attn", rotary_emb_dim)
        self.embed_dim, self.num_heads, self.num_heads_kv = embed_dim, num_heads, kv_heads
        self.head_dim = embed_dim // num_heads
        self.cross_attn, self.layer_idx, self.causal = cross_attn, layer_idx, causal
        self.return_residual, self.checkpointing = return_residual, checkpointing
        widths = self.head_dim * num_heads, 2 * self.head_dim * kv_heads
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, widths[0], bias=qkv_proj_bias)  # type: ignore[attr-defined]
            self.Wkv = nn.Linear(embed_dim, widths[1], bias=qkv_proj_bias)  # type: ignore[attr-defined]
        else:
            self.Wqkv = nn.Linear(embed_dim, sum(widths), bias=qkv_proj_bias)  # type: ignore[attr-defined]
        self.out_proj = nn.Linear(widths[0], embed_dim, bias=out_proj_bias)  # type: ignore[attr-defined]
        self._rotary: RotaryEmbedding | None = None
        if rotary_emb_dim:
            self._rotary = RotaryEmbedding(
                *(rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base)
            )
        slopes = usual_slopes(num_heads) if use_alibi else None
        self._inner = FlashCrossAttention(causal, softmax_scale, dropout, window_size, slopes)
        if dtype is not None:
            self.set_dtype(dtype)

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: mx.Dtype | None = None
    ) -> mx.array:
        """Zeros for keys and values, ``(batch_size, max_seqlen, 2, Hk, D)``."""
        dtype = self.out_proj.weight.dtype if dtype is None else dtype
        return mx.zeros((batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim), dtype)

    def __call__(
        self,
        x: mx.array,
        x_kv: mx.array | None = None,
        key_padding_mask: mx.array | None = None,
        cu_seqlens: mx.array | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Any = None,
        inference_params: InferenceParams | None = None,
    ) -> Any:
        """Attention of `x`, ``(B, L, embed_dim)``, or of packed rows ``(T, embed_dim)``.

        Args:
            x_kv: input of keys and values, where `cross_attn`; None: `x`.
            key_padding_mask: ``(B, L)`` booleans, True where a key is there; not with `cu_seqlens`
                or a cache.
            cu_seqlens, max_seqlen: where packed sequences start, and the longest.
            mixer_subset: rows of x that are queries, where `cross_attn`.
            inference_params: caches, for generation.

        Returns:
            The input's shape; with `return_residual` a pair with the input.
        """
        if key_padding_mask is not None and (cu_seqlens is not None or inference_params):
            expected = "None with packed sequences or a cache"
            raise ArgumentError("key_padding_mask", expected, "an array")
        if cu_seqlens is not None and (self._rotary is not None or inference_params):
            raise ArgumentError("cu_seqlens", "None with rotary embedding or a cache", "an array")
        q, kv = self._projected(x, x_kv, mixer_subset)
        if self._rotary is not None:
            offset: Any = 0
            most = None
            if inference_params is not None:
                offset = inference_params.seqlen_offset
                if inference_params.lengths_per_sample is not None:
                    offset = inference_params.lengths_per_sample
                most = inference_params.max_seqlen
            q, kv = self._rotary(q, kv, offset, most)
        if inference_params is not None:
            context = self._generating(q, kv, inference_params)
        elif key_padding_mask is not None:
            context = self._padded(q, kv, key_padding_mask)
        else:
            inner = mx.checkpoint(self._inner) if self.checkpointing else self._inner
            context = inner(q, kv, None, cu_seqlens, max_seqlen, None, max_seqlen)
        out = self.out_proj(context.reshape(*context.shape[:-2], -1))
        return (out, x) if self.return_residual else out

    def _projected(
        self, x: mx.array, x_kv: mx.array | None, subset: Any
    ) -> tuple[mx.array, mx.array]:
        if self.cross_attn:
            q = self.Wq(x if subset is None else x[:, subset])
            kv = self.Wkv(x if x_kv is None else x_kv)
        else:
            if x_kv is not None or subset is not None:
                raise ArgumentError("x_kv, mixer_subset", "None without cross_attn", "an array")
            qkv, width = self.Wqkv(x), self.num_heads * self.head_dim
            q, kv = qkv[..., :width], qkv[..., width:]
        q = q.reshape(*q.shape[:-1], self.num_heads, self.head_dim)
        return q, kv.reshape(*kv.shape[:-1], 2, self.num_heads_kv, self.head_dim)

    def _padded(self, q: mx.array, kv: mx.array, there: mx.array) -> mx.array:
        from metalgen.ops.attention import attention

        inner = self._inner
        keywords = inner._keywords(None)
        left, right = keywords["window_size"]
        out = attention(
            *(x.swapaxes(1, 2) for x in (q, kv[:, :, 0], kv[:, :, 1])),
            scale=keywords["softmax_scale"],
            causal=keywords["causal"],
            window_left=None if left < 0 else left,
            window_right=None if right < 0 else right,
            alibi_slopes=keywords["alibi_slopes"],
            dropout=keywords["dropout_p"],
            mask=there.astype(mx.bool_)[:, None, None],
        )
        assert isinstance(out, mx.array)
        return out.swapaxes(1, 2)

    def _generating(self, q: mx.array, kv: mx.array, params: InferenceParams) -> Any:
        if self.layer_idx is None:
            raise ArgumentError("layer_idx", "a number, for generation", None)
        caches = params.key_value_memory_dict
        if self.layer_idx not in caches:
            caches[self.layer_idx] = self.allocate_inference_cache(
                params.max_batch_size, params.max_seqlen, kv.dtype
            )
        batch, first = kv.shape[0], params.batch_size_offset
        lengths = params.lengths_per_sample
        if lengths is None:
            lengths = mx.full((batch,), params.seqlen_offset, mx.int32)
        entries = mx.arange(first, first + batch, dtype=mx.int32)
        write_rows(caches[self.layer_idx], kv, entries[:, None], lengths.astype(mx.int32))
        cache = caches[self.layer_idx]
        inner = self._inner
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            cache_seqlens=lengths + kv.shape[1],
            cache_batch_idx=entries,
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=inner._alibi_slopes,
        )
