"""A drop-in for ``mlx.nn.MultiHeadAttention``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError
from metalgen.ops.alibi import alibi_slopes
from metalgen.ops.attention import attention
from metalgen.ops.sdpa import attend
from metalgen.problem.rope import Rope


@dataclass(frozen=True)
class Options:
    """What `MultiHeadAttention` takes by name alone; as its docstring says."""

    num_kv_heads: int | None = None
    causal: bool = False
    rope: Rope | None = None
    window: tuple[int | None, int | None] | None = None
    softcap: float | None = None
    dropout: float = 0.0
    slopes: mx.array | None = None
    device: str | None = None

    @property
    def plain(self) -> bool:
        """Whether MLX's signature says all of a call."""
        special = self.window, self.softcap, self.slopes
        return all(x is None for x in special) and not self.dropout


class MultiHeadAttention(nn.MultiHeadAttention):  # type: ignore[misc, name-defined]
    """Multi-head attention with ``mlx.nn``'s constructor, weights and calls, and more options.

    A model's ``mlx.nn.MultiHeadAttention`` may be replaced by it as it stands, with its weights;
    see `metalgen.nn.optimize`. Rows that see no key are zeros where a kernel of metalgen's runs.

    Args:
        dims, num_heads, query_input_dims, key_input_dims, value_input_dims, value_dims,
            value_output_dims, bias: as of ``mlx.nn.MultiHeadAttention``.
        num_kv_heads: heads of keys and values, a number that divides `num_heads`; None: as many.
        causal: every call is causal, whatever its mask.
        rope: how queries and keys rotate: a ``mlx.nn.RoPE`` or a `metalgen.Rope`.
        window: ``(left, right)``, keys that a query sees to each side of its own; None: no bound.
        softcap: C; a scaled score x becomes ``C * tanh(x / C)``.
        dropout: probability that a weight is dropped, in training.
        alibi: scores fall with the distance, by the usual slopes.
        device: as in `metalgen.attention`.

    Raises:
        ValueError: numbers of heads that do not divide.
    """

    _options = Options()

    def __init__(
        self,
        dims: int,
        num_heads: int,
        query_input_dims: int | None = None,
        key_input_dims: int | None = None,
        value_input_dims: int | None = None,
        value_dims: int | None = None,
        value_output_dims: int | None = None,
        bias: bool = False,
        *,
        num_kv_heads: int | None = None,
        causal: bool = False,
        rope: Any = None,
        window: tuple[int | None, int | None] | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        alibi: bool = False,
        device: str | None = None,
    ) -> None:
        super().__init__(
            *(dims, num_heads, query_input_dims, key_input_dims, value_input_dims),
            *(value_dims, value_output_dims, bias),
        )
        if num_kv_heads is not None:
            heads = as_integer(num_kv_heads)
            if heads is None or heads < 1 or num_heads % heads:
                expected = f"a number that divides the {num_heads} heads, or None"
                raise ArgumentError("num_kv_heads", expected, num_kv_heads)
            for name, width in (("key_proj", dims), ("value_proj", value_dims or dims)):
                inputs = self[name].weight.shape[1]
                self[name] = nn.Linear(inputs, width // num_heads * heads, bias=bias)  # type: ignore[attr-defined]
        self._options = Options(
            num_kv_heads,
            causal,
            as_rope(rope),
            window,
            softcap,
            dropout,
            alibi_slopes(num_heads) if alibi else None,
            device,
        )

    def __call__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: Any = None,
        cache: Any = None,
    ) -> mx.array:
        """Attention of inputs ``(B, L, dims)``.

        Args:
            queries, keys, values: the three inputs; for self-attention the same one.
            mask: ``"causal"``, or an array that broadcasts to ``(B, H, Lq, Lk)``: booleans (True:
                the key is seen) or floats of any type, which are added to the scores.
            cache: keys and values so far: a `metalgen.KVCache`, or one of mlx-lm's.

        Returns:
            ``(B, Lq, value_output_dims)``.
        """
        o = self._options
        kv_heads = self.num_heads if o.num_kv_heads is None else o.num_kv_heads
        q = _heads(self.query_proj(queries), self.num_heads)
        k = _heads(self.key_proj(keys), kv_heads)
        v = _heads(self.value_proj(values), kv_heads)
        if o.rope is not None:
            first = _offset(cache)
            q, k = (o.rope.turned(x, first) for x in (q, k))
        k, v = with_cache(cache, k, v)
        out = self._attend(q, k, v, mask)
        return self.out_proj(out.swapaxes(1, 2).reshape(*out.shape[::2], -1))  # type: ignore[no-any-return]

    def _attend(self, q: mx.array, k: mx.array, v: mx.array, mask: Any) -> mx.array:
        o, scale = self._options, q.shape[-1] ** -0.5
        if o.plain and not (o.causal and mask is not None):
            return attend(q, k, v, scale, "causal" if o.causal else mask, device=o.device)
        left, right = o.window or (None, None)
        return attention(
            *(q, k, v),
            scale=scale,
            causal=o.causal,
            window_left=left,
            window_right=right,
            softcap=o.softcap,
            alibi_slopes=o.slopes,
            dropout=o.dropout if self.training else 0.0,
            mask=mask,
            device=o.device,
        )


def as_rope(rope: Any) -> Rope | None:
    """A `metalgen.Rope` of ``mlx.nn``'s module, or as it is; raises `ArgumentError`."""
    if rope is None or isinstance(rope, Rope):
        return rope
    if isinstance(rope, nn.RoPE):  # type: ignore[attr-defined]
        style = "pairs" if rope.traditional else "half"
        return Rope(rope.dims, rope.base, style=style, scale=rope.scale)
    raise ArgumentError("rope", "a mlx.nn.RoPE, a metalgen.Rope, or None", type(rope).__name__)


def with_cache(cache: Any, k: mx.array, v: mx.array) -> tuple[Any, Any]:
    """Keys and values with those of a cache in front; raises `ArgumentError` for an unknown one."""
    if cache is None:
        return k, v
    for method in ("append", "update_and_fetch"):
        if hasattr(cache, method):
            keys, values = getattr(cache, method)(k, v)
            return keys, values
    expected = "a metalgen.KVCache, one of mlx-lm's caches, or None"
    raise ArgumentError("cache", expected, type(cache).__name__)


def _offset(cache: Any) -> Any:
    return 0 if cache is None else getattr(cache, "length", getattr(cache, "offset", 0))


def _heads(x: mx.array, heads: int) -> mx.array:
    return x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
