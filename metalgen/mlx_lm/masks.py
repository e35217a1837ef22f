"""Masks as rules: what mlx-lm makes boolean arrays of, said in numbers.

mlx-lm's caches know which keys a query may see: those up to its own, those of a sliding window,
those after a sequence's left padding. Their ``make_mask`` writes that down as an array of booleans,
one for each query and key, which a kernel then has to read. `MaskRules` keeps the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen.mlx_lm import counts


@dataclass(eq=False)
class MaskRules:
    """Which keys the queries of a call may see.

    Query i of ``q_len`` stands at key ``kv_len - q_len + i`` and sees keys up to that one.

    Where code that does not know rules touches one (``mx.where(mask, ...)``, ``mask[..., :n]``,
    ``mask.dtype``), it turns into the boolean array that mlx-lm would have made, and that is
    counted.

    Attributes:
        q_len, kv_len: queries, and keys that the cache will hold.
        window: keys that a query sees at most, its own the last of them; None: all.
        starts: the first key of each sequence that is not padding, ``(B,)``; None: all are valid.
        ring: the slot of the oldest key, where one query meets a ring buffer; None: keys are in
            the order of time.
    """

    q_len: int
    kv_len: int
    window: int | None = None
    starts: mx.array | None = None
    ring: int | None = None

    @functools.cached_property
    def _array(self) -> mx.array:
        # One query of a ring that is full stands at the last key in time.
        queries = mx.arange(self.kv_len - self.q_len, self.kv_len)[:, None]
        keys = mx.arange(self.kv_len)[None]
        mask = queries >= keys
        if self.window is not None:
            mask = mask & (queries < keys + self.window)
        if self.starts is not None:
            mask = mask & (keys >= self.starts[:, None, None, None])
        if self.ring is not None:
            mask = mx.concatenate([mask[..., -self.ring :], mask[..., : -self.ring]], axis=-1)
        return mask

    def array(self, reason: str) -> mx.array:
        """The rules as an array of booleans that broadcasts to ``(B, H, q_len, kv_len)``.

        It is made once, for all layers. `reason` is counted.
        """
        counts.materialized[reason] += 1
        return self._array

    # What models do with arrays.

    def __mlx_array__(self) -> mx.array:
        return self.array(TOUCHED)

    def __getitem__(self, index: Any) -> mx.array:
        return self.array(TOUCHED)[index]

    def __and__(self, other: Any) -> mx.array:
        found: mx.array = self.array(TOUCHED) & other
        return found

    __rand__ = __and__

    def __or__(self, other: Any) -> mx.array:
        found: mx.array = self.array(TOUCHED) | other
        return found

    __ror__ = __or__

    def __invert__(self) -> mx.array:
        return ~self.array(TOUCHED)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.array(TOUCHED), name)


TOUCHED = "the model computes with its mask"

Mask = MaskRules | mx.array | str | None
"""What attention gets from models."""


def rules_of(cache: Any, q_len: int, window: int | None) -> Mask:
    """The mask of `q_len` new queries behind what a cache holds.

    Where mlx-lm's ``cache.make_mask(q_len, window_size=window)`` gives None or ``"causal"``, this
    does; where it gives an array, this gives rules, or ``"causal"`` where a window is longer than
    all keys. Nothing waits for the GPU.

    Args:
        cache: one of mlx-lm's or ours; None: the queries' own keys are all that there are.
        q_len: queries.
        window: keys of a sliding window; None: no window of the model's.

    Raises:
        KeyError: a cache of a class that is not known here.
    """
    if cache is None:
        return _plain(q_len, q_len, window)
    known = next(name for name in _BY_CLASS if name in _names(_class(cache)))
    return _BY_CLASS[known](cache, q_len, window)


def knows(cache: Any) -> bool:
    """Whether `rules_of` knows a cache's class."""
    return cache is None or any(name in _names(_class(cache)) for name in _BY_CLASS)


def _class(cache: Any) -> Any:
    return type(cache)


@functools.cache
def _names(kind: Any) -> tuple[str, ...]:
    """Names of a class, if it is one of mlx-lm's caches, or one of ours that stands on one."""
    if kind.__module__ == "mlx_lm.models.cache":
        return (kind.__name__,)
    own = kind.__module__.startswith("metalgen.mlx_lm")
    return tuple(base.__name__ for base in kind.__mro__) if own else ()


def _plain(q_len: int, kv_len: int, window: int | None) -> Mask:
    if window is not None and kv_len > window:
        return MaskRules(q_len, kv_len, window)
    return "causal" if q_len > 1 else None


def _growing(cache: Any, q_len: int, window: int | None) -> Mask:
    return _plain(q_len, cache.offset + q_len, window)


def _rotating(cache: Any, q_len: int, window: int | None) -> Mask:
    size = cache.max_size
    if q_len > 1:  # keys are put into the order of time then
        return _plain(q_len, min(size - 1, cache.offset) + q_len, window or size)
    if window is None or cache.offset < window or size <= window:
        return None
    kv_len = min(cache.offset + 1, size)
    return MaskRules(1, kv_len, window, ring=_oldest(cache, kv_len))


def _oldest(cache: Any, kv_len: int) -> int | None:
    """The slot behind the one that the next key takes; None where it is the first."""
    newest = cache._idx if cache._idx < cache.max_size else 0
    return (newest + 1) % kv_len or None


def _padded(cache: Any, q_len: int, window: int | None) -> Mask:
    kv_len = cache._idx + q_len
    binding = window if window is not None and kv_len > window else None
    return MaskRules(q_len, kv_len, binding, mx.maximum(cache.left_padding, 0))


def _padded_rotating(cache: Any, q_len: int, window: int | None) -> Mask:
    size = cache.max_size
    window = window or size
    kv_len = min(size - 1, cache._offset) + q_len
    starts = cache.left_padding - max(0, cache._idx - size + int(q_len > 1))
    ring = None
    if q_len == 1 and (cache.rotated or cache._idx >= size):
        # The oldest key makes room for the new one, and with it goes a row of padding.
        starts = starts - 1
        ring = _oldest(cache, kv_len)
    binding = window if kv_len > window else None
    return MaskRules(q_len, kv_len, binding, mx.maximum(starts, 0), ring)


_BY_CLASS: dict[str, Callable[[Any, int, int | None], Mask]] = {
    "BatchRotatingKVCache": _padded_rotating,
    "BatchKVCache": _padded,
    "RotatingKVCache": _rotating,
    "KVCache": _growing,
    "QuantizedKVCache": _growing,
    "ConcatenateKVCache": _growing,
}
