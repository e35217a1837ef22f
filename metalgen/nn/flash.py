"""Layers by the names of the first MLX flash attention scripts, doing what those promised."""

from __future__ import annotations

import functools
import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from metalgen.arguments import as_integer
from metalgen.calls.kernel import Kernel
from metalgen.calls.resolve import get_kernel, pinned_kernel
from metalgen.devices import default_device, get_device
from metalgen.devices.mlx_attention import mlx_sdpa
from metalgen.errors import ArgumentError
from metalgen.families import Limits, Schedule
from metalgen.features.conversions import booleans, scores
from metalgen.nn.multi_head import with_cache
from metalgen.ops.sdpa import attend
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs


class MLXFlashAttention:
    """Attention of ``(B, L, H, D)`` arrays, across positions, by the best known kernel.

    Args:
        head_dim: D.
        scale: factor of the scores; None means ``1 / sqrt(D)``.
        block_size: queries and keys of a tile: pins the schedule. None: what tuning chose for each
            call, which `block_size` and `explain` tell.
        device: as in `metalgen.attention`.

    Raises:
        ArgumentError: a value out of range, or a block size that no schedule has.
    """

    def __init__(
        self,
        head_dim: int,
        scale: float | None = None,
        block_size: int | None = None,
        *,
        device: str | None = None,
    ) -> None:
        AttentionConfig(head_dim)  # complains about widths that there are not
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.device = device
        self._pinned = as_integer(block_size)
        if block_size is not None and self._pinned is None:
            raise ArgumentError("block_size", "an integer, or None", block_size)
        if self._pinned is not None:
            block_schedule(AttentionConfig(head_dim), self._pinned, self._limits)

    def __repr__(self) -> str:
        how = "pinned" if self._pinned is not None else "chosen by the tuner"
        return f"MLXFlashAttention(head_dim={self.head_dim}, block_size={self.block_size} ({how}))"

    @property
    def _limits(self) -> Limits:
        return (default_device() if self.device is None else get_device(self.device)).limits

    @property
    def block_size(self) -> int:
        """Queries of a tile: the pinned number, or what tuning chose for 1,024 float16 queries."""
        if self._pinned is not None:
            return self._pinned
        return get_kernel(AttentionConfig(self.head_dim), device=self.device).schedule.bq

    def explain(self, q_len: int = 1024, kv_len: int | None = None, heads: int = 32) -> str:
        """What computes a call of such lengths in float16, and why."""
        config = AttentionConfig(self.head_dim)
        if self._pinned is not None:
            return self._kernel(config).explain()
        sizes = {"q_len": q_len, "kv_len": kv_len, "heads": heads}
        return get_kernel(config, **sizes, device=self.device).explain()  # type: ignore[arg-type]

    def __call__(
        self, queries: mx.array, keys: mx.array, values: mx.array, mask: Any = None
    ) -> mx.array:
        """``(B, Lq, H, D)`` of queries ``(B, Lq, H, D)``, keys and values ``(B, Lk, Hkv, D)``.

        Args:
            mask: ``"causal"``, or an array that broadcasts to ``(B, H, Lq, Lk)``, of booleans or of
                floats that are added.
        """
        for name, x in (("queries", queries), ("keys", keys), ("values", values)):
            if not isinstance(x, mx.array) or x.ndim != 4 or x.shape[3] != self.head_dim:
                got = x.shape if isinstance(x, mx.array) else type(x).__name__
                raise ArgumentError(name, f"an array (B, L, H, {self.head_dim})", got)
        q, k, v = (x.swapaxes(1, 2) for x in (queries, keys, values))
        if self._pinned is None:
            return attend(q, k, v, self.scale, mask, device=self.device).swapaxes(1, 2)
        array = isinstance(mask, mx.array)
        additive = array and mask.dtype != mx.bool_
        if not array and mask not in (None, "causal"):
            raise ArgumentError("mask", 'an mlx.core.array, "causal", or None', mask)
        config = AttentionConfig(
            self.head_dim,
            str(q.dtype),
            heads_per_kv=q.shape[1] // max(1, k.shape[1]),
            causal=not array and mask == "causal",
            bias=additive,
            array_mask=array and not additive,
        )
        inputs = NOTHING
        if array:
            inputs = Inputs(
                bias=scores(mask, q.dtype) if additive else None,
                array_mask=None if additive else booleans(mask),
            )
        out = self._kernel(config)(q, k, v, scale=self.scale, inputs=inputs)
        assert isinstance(out, mx.array)
        return out.swapaxes(1, 2)

    def _kernel(self, config: AttentionConfig) -> Kernel:
        assert self._pinned is not None
        device = self.device or default_device().name
        return pinned_block(config, self._pinned, device)


class OptimizedMLXMultiHeadAttention(nn.Module):  # type: ignore[misc, name-defined]
    """Multi-head self-attention with projections ``q_proj``, ``k_proj``, ``v_proj``, ``out_proj``.

    Args:
        dims, num_heads, bias: widths, heads, and whether projections have biases.
        use_flash_attention: False: MLX's own function computes it, for comparison.
        block_size, device: as of `MLXFlashAttention`.

    Raises:
        ValueError: `num_heads` does not divide `dims`.
    """

    def __init__(
        self,
        dims: int,
        num_heads: int,
        bias: bool = False,
        use_flash_attention: bool = True,
        block_size: int | None = None,
        *,
        device: str | None = None,
    ) -> None:
        super().__init__()
        if dims % num_heads:
            raise ArgumentError("num_heads", f"a number that divides dims, {dims}", num_heads)
        self.dims, self.num_heads, self.head_dim = dims, num_heads, dims // num_heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self[name] = nn.Linear(dims, dims, bias=bias)  # type: ignore[attr-defined]
        self.use_flash_attention = use_flash_attention
        self._flash = MLXFlashAttention(self.head_dim, None, block_size, device=device)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """``(B, L, dims)`` of the same; `mask` as of `MLXFlashAttention`.

        Args:
            cache: keys and values so far: a `metalgen.KVCache`, or one of mlx-lm's.
        """
        batch, length, _ = x.shape
        q, k, v = (
            self[name](x).reshape(batch, length, self.num_heads, -1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if cache is not None:
            k, v = (y.swapaxes(1, 2) for y in with_cache(cache, k.swapaxes(1, 2), v.swapaxes(1, 2)))
        if self.use_flash_attention:
            out = self._flash(q, k, v, mask)
        else:
            own = (y.swapaxes(1, 2) for y in (q, k, v))
            out = mlx_sdpa(*own, scale=self.head_dim**-0.5, mask=mask).swapaxes(1, 2)
        return self.out_proj(out.reshape(batch, length, -1))  # type: ignore[no-any-return]


def block_schedule(config: AttentionConfig, block: int, limits: Limits) -> Schedule:
    """The schedule with tiles of `block` queries and keys that is most like the default one.

    Raises:
        ArgumentError: there is none; it names those that there are.
    """
    from metalgen.families.space import enumerate_valid

    default, *others = enumerate_valid(config, limits)
    every = [default, *others]
    fit = [s for s in every if s.bq == s.bk == block]
    if not fit:
        blocks = sorted({s.bq for s in every if s.bq == s.bk})
        expected = f"one of {', '.join(map(str, blocks))}, for head dimension {config.head_dim}"
        raise ArgumentError("block_size", expected, block)

    def distance(schedule: Schedule) -> float:
        warps: float = abs(math.log2(schedule.simdgroups / default.simdgroups))
        names = ("bd", "q_source", "k_source", "v_source", "buffers", "load_width")
        return float(warps + sum(getattr(schedule, n) != getattr(default, n) for n in names))

    return min(fit, key=distance)


@functools.lru_cache(maxsize=256)
def pinned_block(config: AttentionConfig, block: int, device: str) -> Kernel:
    """The kernel of a config with `block_schedule`'s schedule, on a device by name."""
    schedule = block_schedule(config, block, get_device(device).limits)
    return pinned_kernel(config, schedule, device=device)
