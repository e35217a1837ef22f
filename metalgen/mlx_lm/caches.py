"""Quantized caches of every kind that mlx-lm has: rotating, for batches, and both.

mlx-lm quantizes its growing cache only. Here the quantized row of a head is one row of 32-bit
words, packed values first, then scales and biases. To mlx-lm's own caches that is a row like any
other: they rotate, pad, merge and cut it as they always do, and what attention gets are views.

Import this after mlx-lm; `metalgen.mlx_lm` does so when one of the names is first used.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from metalgen.caches.parts import OneOrBoth, Packing, check_quantization
from metalgen.errors import ArgumentError

_cache: Any = importlib.import_module("mlx_lm.models.cache")

Triple = tuple[mx.array, mx.array, mx.array]
"""Packed words, scales and biases, as ``mx.quantize`` returns them."""
Packings = tuple[Packing, Packing]
"""How keys and values are quantized."""


def packed_rows(rows: mx.array, group_size: int, bits: int) -> mx.array:
    """Rows ``(..., D)`` quantized and packed, ``(..., words)`` uint32.

    Raises:
        ArgumentError: a width that is no multiple of the group.
    """
    if rows.shape[-1] % group_size:
        expected = f"a multiple of the group of {group_size}, as mx.quantize has it"
        raise ArgumentError("head dimension", expected, rows.shape[-1])
    words, scales, biases = mx.quantize(rows, group_size=group_size, bits=bits)
    return mx.concatenate([words, mx.concatenate([scales, biases], axis=-1).view(mx.uint32)], -1)


def unpacked_rows(rows: mx.array, group_size: int, bits: int, dtype: mx.Dtype) -> Triple:
    """Views of packed rows: what ``mx.quantize`` returned of them."""
    each = group_size * bits // 32
    groups = rows.shape[-1] // (each + dtype.size // 2)
    scales = rows[..., groups * each :].view(dtype)
    return rows[..., : groups * each], scales[..., :groups], scales[..., groups:]


def _packings(bits: object, group_size: object) -> Packings:
    """How keys and values are quantized; raises `ArgumentError`, also where they are not."""
    found = check_quantization(bits, group_size)
    if bits is None:
        raise ArgumentError("bits", "a number of bits, or a pair (keys, values)", bits)
    return found


class Packed:
    """What makes one of mlx-lm's caches hold quantized rows; see the module.

    Attributes:
        bits, group_size: of keys, as of ``mx.quantize``.
        value_bits, value_group_size: of values.
        dtype: name of the rows' type; empty before the first.
    """

    bits: int
    group_size: int
    value_bits: int
    value_group_size: int
    dtype: str

    def _quantize_by(self, packings: Packings, dtype: str = "") -> None:
        (bits, self.group_size), (value_bits, self.value_group_size) = packings
        assert bits is not None and value_bits is not None
        self.bits, self.value_bits, self.dtype = bits, value_bits, dtype

    @property
    def packings(self) -> Packings:
        """How keys and values are quantized."""
        keys = Packing(self.bits, self.group_size)
        return keys, Packing(self.value_bits, self.value_group_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Triple, Triple]:
        """Stores new rows, quantized; returns all keys and all values."""
        self.dtype = str(keys.dtype).removeprefix("mlx.core.")
        new = _packed(keys, values, self.packings)
        return self._views(super().update_and_fetch(*new))  # type: ignore[misc]

    def keys_and_values(self) -> tuple[Triple, Triple]:
        """All keys and all values."""
        return self._views(super().keys_and_values())  # type: ignore[misc]

    def _views(self, parts: Sequence[Any]) -> tuple[Triple, Triple]:
        dtype = getattr(mx, self.dtype)
        keys, values = (
            unpacked_rows(x, group, bits or 0, dtype) if isinstance(x, mx.array) else x
            for x, (bits, group) in zip(parts, self.packings, strict=True)
        )
        return keys, values

    @property
    def state(self) -> Any:
        """What mlx-lm saves of a cache."""
        bits, groups = zip(*self.packings, strict=True)
        both = [pair[0] if pair[0] == pair[1] else list(pair) for pair in (bits, groups)]
        return (*super().state, *both, self.dtype)  # type: ignore[misc]

    @state.setter
    def state(self, saved: Any) -> None:
        *own, bits, group_size, dtype = saved
        self._quantize_by(_packings(bits, group_size), dtype)
        for kind in type(self).__mro__:
            if kind.__module__ == _cache.__name__ and "state" in vars(kind):
                vars(kind)["state"].fset(self, own)
                return

    def to_quantized(self, group_size: OneOrBoth = 64, bits: OneOrBoth = 4) -> Any:
        """Itself: it is quantized."""
        return self


def _packed(keys: mx.array, values: mx.array, packings: Packings) -> list[mx.array]:
    both = zip((keys, values), packings, strict=True)
    return [packed_rows(x, group, bits or 0) for x, (bits, group) in both]


def _become(cache: Any, kind: Any, packings: Packings, dtype: str) -> Any:
    cache.__class__ = kind
    cache._quantize_by(packings, dtype)
    return cache


def _like(cache: Any, kind: Any, others: Sequence[Any]) -> Any:
    dtype = next((c.dtype for c in others if c.dtype), "")
    return _become(cache, kind, others[0].packings, dtype)


class PackedKVCache(Packed, _cache.KVCache):  # type: ignore[misc]
    """mlx-lm's ``KVCache``, quantized; it can be merged into a batch.

    Args:
        bits: 4 or 8, or a pair (keys, values).
        group_size: 32, 64 or 128, or a pair; it divides the head dimensions.
    """

    def __init__(self, bits: OneOrBoth = 8, group_size: OneOrBoth = 64) -> None:
        super().__init__()
        self._quantize_by(_packings(bits, group_size))

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """The cache of a batch."""
        return _like(_cache.BatchKVCache.merge(caches), PackedBatchKVCache, caches)


class PackedRotatingKVCache(Packed, _cache.RotatingKVCache):  # type: ignore[misc]
    """mlx-lm's ``RotatingKVCache``, quantized.

    Args:
        max_size, keep: as of ``RotatingKVCache``.
        bits, group_size: as of `PackedKVCache`.
    """

    def __init__(
        self, max_size: int, keep: int = 0, bits: OneOrBoth = 8, group_size: OneOrBoth = 64
    ) -> None:
        super().__init__(max_size, keep)
        self._quantize_by(_packings(bits, group_size))

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """The cache of a batch."""
        return _like(_cache.BatchRotatingKVCache.merge(caches), PackedBatchRotatingKVCache, caches)


class _Batch(Packed):
    _single: Any

    def extend(self, other: Any) -> None:
        """Takes another batch's sequences in."""
        self.dtype = self.dtype or other.dtype
        super().extend(other)  # type: ignore[misc]

    def extract(self, idx: int) -> Any:
        """One sequence's cache."""
        return _like(super().extract(idx), self._single, [self])  # type: ignore[misc]


class PackedBatchKVCache(_Batch, _cache.BatchKVCache):  # type: ignore[misc]
    """mlx-lm's ``BatchKVCache``, quantized.

    Args:
        left_padding: as of ``BatchKVCache``.
        bits, group_size: as of `PackedKVCache`.
    """

    _single = PackedKVCache

    def __init__(
        self, left_padding: list[int], bits: OneOrBoth = 8, group_size: OneOrBoth = 64
    ) -> None:
        super().__init__(left_padding)
        self._quantize_by(_packings(bits, group_size))

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """The cache of a batch."""
        return PackedKVCache.merge(caches)


class PackedBatchRotatingKVCache(_Batch, _cache.BatchRotatingKVCache):  # type: ignore[misc]
    """mlx-lm's ``BatchRotatingKVCache``, quantized.

    Args:
        max_size, left_padding: as of ``BatchRotatingKVCache``.
        bits, group_size: as of `PackedKVCache`.
    """

    _single = PackedRotatingKVCache

    def __init__(
        self,
        max_size: int,
        left_padding: list[int],
        bits: OneOrBoth = 8,
        group_size: OneOrBoth = 64,
    ) -> None:
        super().__init__(max_size, left_padding)
        self._quantize_by(_packings(bits, group_size))

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Any:
        """The cache of a batch."""
        return PackedRotatingKVCache.merge(caches)


TWINS = {
    "KVCache": PackedKVCache,
    "RotatingKVCache": PackedRotatingKVCache,
    "BatchKVCache": PackedBatchKVCache,
    "BatchRotatingKVCache": PackedBatchRotatingKVCache,
}
"""mlx-lm's caches, and what holds the same, quantized."""


def quantized(cache: Any, bits: OneOrBoth = 8, group_size: OneOrBoth = 64) -> Any:
    """The quantized twin of one of mlx-lm's caches, which is taken over; others as they are."""
    if type(cache) not in [getattr(_cache, name) for name in TWINS]:
        return cache
    dtype, packings = "", _packings(bits, group_size)
    if cache.keys is not None:
        dtype = str(cache.keys.dtype).removeprefix("mlx.core.")
        cache.keys, cache.values = _packed(cache.keys, cache.values, packings)
    return _become(cache, TWINS[type(cache).__name__], packings, dtype)


def to_quantized(self: Any, group_size: OneOrBoth = 64, bits: OneOrBoth = 4) -> Any:
    """What mlx-lm's rotating and batch caches lack; `metalgen.mlx_lm.patch` gives it to them."""
    return quantized(self, bits, group_size)


def make_prompt_cache(
    model: Any,
    max_kv_size: int | None = None,
    *,
    kv_bits: OneOrBoth | None = None,
    group_size: OneOrBoth = 64,
) -> list[Any]:
    """mlx-lm's ``make_prompt_cache``, with quantized caches from the first token on.

    They can be handed to ``generate_step`` and, one list for each prompt, to ``batch_generate`` and
    ``BatchGenerator.insert``, which merge them.

    Args:
        model: one of mlx-lm's.
        max_kv_size: most keys of a layer that has no cache of its own kind; None: no bound.
        kv_bits: 4 or 8, or a pair (keys, values); None: not quantized.
        group_size: 32, 64 or 128, or a pair.

    Raises:
        ArgumentError: bits or groups that cannot be used.
    """
    check_quantization(kv_bits, group_size)
    found: list[Any] = _cache.make_prompt_cache(model, max_kv_size)
    if kv_bits is None:
        return found
    return [quantized(cache, kv_bits, group_size) for cache in found]
