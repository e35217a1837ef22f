"""A dense cache that grows."""

from __future__ import annotations

import mlx.core as mx

from metalgen.arguments import check_integer
from metalgen.caches.parts import (
    OneOrBoth,
    check_quantization,
    empty,
    rows_of,
    said,
    slots_of,
    wider,
)
from metalgen.errors import ArgumentError
from metalgen.families.sizes import MAX_LENGTH
from metalgen.features.triple import Part
from metalgen.ops.append import append_kv
from metalgen.plurals import counted
from metalgen.problem.rope import Rope


class KVCache:
    """Keys and values of a batch whose entries are equally long; it grows as rows come.

    >>> cache = metalgen.KVCache(rope=metalgen.Rope(base=10000.0))
    >>> keys, values = cache.append(k, v)  # k is turned on its way
    >>> out = metalgen.attention(q, keys, values, causal=True)

    What `append` returns are views of the cache: drop them before the next append (a loop that
    binds the names anew does), else MLX has to copy the cache to keep them as they are.

    Args:
        bits, group_size: quantize what comes, as ``mx.quantize`` does (4 or 8 bits, groups of 32,
            64 or 128); keys and values then come back as its three arrays. A pair says it of keys
            and of values. None: keep it as it is.
        rope: how keys turn; its offset, if any, is the position of the first row of all.
        step: slots that the cache grows by.
        device: as in `metalgen.attention`.

    Attributes:
        length: how many rows of each entry there are.

    Raises:
        ArgumentError: a value of the wrong type or out of range.
    """

    def __init__(
        self,
        *,
        bits: OneOrBoth | None = None,
        group_size: OneOrBoth = 64,
        rope: Rope | None = None,
        step: int = 256,
        device: str | None = None,
    ) -> None:
        packings = check_quantization(bits, group_size)
        if rope is not None and not isinstance(rope, Rope):
            raise ArgumentError("rope", "a metalgen.Rope, or None", rope)
        step = check_integer("step", step, 1, MAX_LENGTH)
        self.length = 0
        self._packings = packings
        self._rope, self._step, self._device = rope, step, device
        self._cache: tuple[Part, Part] | None = None

    def __repr__(self) -> str:
        return f"<KVCache of {counted(self.length, 'row')}{said(self._packings)}>"

    def append(self, k: mx.array, v: mx.array) -> tuple[Part, Part]:
        """All keys and values, the new ones at the end.

        Args:
            k: ``(B, Hkv, T, D)``, v: ``(B, Hkv, T, Dv)``.

        Returns:
            ``(B, Hkv, length, D)`` and ``(B, Hkv, length, Dv)``, or the three arrays of each.

        Raises:
            ArgumentError: as `append_kv`; the cache then stays as it is.
        """
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, mx.array) or x.ndim != 4:
                got = x.shape if isinstance(x, mx.array) else type(x).__name__
                raise ArgumentError(name, "an mlx.core.array (B, H, T, D)", got)
        room = self._room(k, v)
        rope = None if self._rope is None else self._rope.moved(self.length)
        self._cache = append_kv(room, k, v, offset=self.length, rope=rope, device=self._device)
        self.length += k.shape[2]
        return self.state

    @property
    def state(self) -> tuple[Part, Part]:
        """All keys and values so far, as `append` returns them."""
        if self._cache is None:
            raise ArgumentError("cache", "a cache with rows: call append() first", "an empty cache")
        keys, values = (rows_of(part, self.length) for part in self._cache)
        return keys, values

    def trim(self, rows: int) -> None:
        """Forgets the last `rows` rows of each entry."""
        self.length -= check_integer("rows", rows, 0, self.length)

    def _room(self, k: mx.array, v: mx.array) -> tuple[Part, Part]:
        """The cache with slots for rows like these."""
        needed = self.length + k.shape[2]
        slots = 0 if self._cache is None else slots_of(self._cache[0])
        if self._cache is not None and needed <= slots:
            return self._cache
        more = -(-max(needed - slots, 1) // self._step) * self._step
        if self._cache is None:
            batch, heads = k.shape[:2]
            keys, values = (
                empty(batch, heads, more, x.shape[3], x.dtype, packing)
                for x, packing in zip((k, v), self._packings, strict=True)
            )
            return keys, values
        keys, values = (wider(part, more) for part in self._cache)
        return keys, values
