"""A cache of pages that sequences share out."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence

import mlx.core as mx

from metalgen.append.checks import MAX_ROWS
from metalgen.arguments import as_integer, check_integer, check_positive
from metalgen.caches.parts import OneOrBoth, check_quantization, empty
from metalgen.errors import ArgumentError, MetalgenError
from metalgen.features.fields import DTYPES
from metalgen.features.pages import MAX_PAGE, MIN_PAGE
from metalgen.ops.append import append_kv
from metalgen.plurals import counted
from metalgen.problem.config import MAX_HEAD_DIM, MIN_HEAD_DIM
from metalgen.problem.rope import Rope


class CacheFull(MetalgenError, MemoryError):
    """No pages are left for rows that were to be appended; the cache is as it was before."""


class PagedKVCache:
    """Keys and values of many sequences, of any lengths, in pages of one pool (vLLM's scheme).

    >>> cache = metalgen.PagedKVCache(pages=1024, kv_heads=8, head_dim=128)
    >>> chat = cache.add()
    >>> cache.append([chat], k, v)  # k (1, 8, T, 128)
    >>> table, lengths = cache.tables([chat])
    >>> out = metalgen.attention(q, cache.keys, cache.values, block_table=table, kv_lens=lengths)

    Lengths and tables are kept in Python, so nothing waits for a GPU. ``copy.copy`` gives a cache
    that goes its own way.

    Args:
        pages: pages of the pool (one more is allocated, where rows go that have no place).
        kv_heads, head_dim, value_head_dim, dtype: what rows look like; values are as wide as keys
            where `value_head_dim` is None.
        page_size: rows of a page: a multiple of 8 from 8 to 65,536.
        bits, group_size, rope, device: as in `metalgen.KVCache`.

    Attributes:
        keys, values: the pages, ``(pages + 1, Hkv, page_size, D)``, or the three arrays of each.

    Raises:
        ArgumentError: a value of the wrong type or out of range.
    """

    def __init__(
        self,
        pages: int,
        kv_heads: int,
        head_dim: int,
        *,
        value_head_dim: int | None = None,
        dtype: mx.Dtype = mx.float16,
        page_size: int = 16,
        bits: OneOrBoth | None = None,
        group_size: OneOrBoth = 64,
        rope: Rope | None = None,
        device: str | None = None,
    ) -> None:
        pages, kv_heads = check_positive("pages", pages), check_positive("kv_heads", kv_heads)
        head_dim = check_integer("head_dim", head_dim, MIN_HEAD_DIM, MAX_HEAD_DIM)
        value_dim = head_dim
        if value_head_dim is not None:
            value_dim = check_integer("value_head_dim", value_head_dim, MIN_HEAD_DIM, MAX_HEAD_DIM)
        rows = as_integer(page_size)
        if rows is None or rows % 8 or not MIN_PAGE <= rows <= MAX_PAGE:
            raise ArgumentError(
                "page_size", f"a multiple of 8 from {MIN_PAGE} to {MAX_PAGE}", page_size
            )
        page_size = rows
        most = (MAX_ROWS - 1) // (kv_heads * page_size) - 1  # and the spare one
        if pages > most:
            expected = f"at most {most} of {page_size} rows for {kv_heads} heads"
            raise ArgumentError("pages", expected, pages)
        if dtype not in [getattr(mx, name) for name in DTYPES]:
            raise ArgumentError("dtype", f"one of {', '.join(DTYPES)}", dtype)
        packings = check_quantization(bits, group_size)
        if rope is not None and not isinstance(rope, Rope):
            raise ArgumentError("rope", "a metalgen.Rope, or None", rope)
        self.keys, self.values = (
            empty(pages + 1, kv_heads, page_size, width, dtype, packing)
            for width, packing in zip((head_dim, value_dim), packings, strict=True)
        )
        self.page_size = page_size
        self._rope, self._device = rope, device
        self._free = list(range(pages - 1, -1, -1))
        self._pages: dict[int, list[int]] = {}
        self._lengths: dict[int, int] = {}
        self._next = 0
        self._last: tuple[tuple[int, ...], mx.array] | None = None

    def __repr__(self) -> str:
        rows = counted(sum(self._lengths.values()), "row")
        sequences = counted(len(self._lengths), "sequence")
        pages = counted(self.free_pages, "page")
        return f"<PagedKVCache of {rows} of {sequences}, {pages} of {self.page_size} free>"

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def add(self) -> int:
        """A new sequence without rows; the number stands for it in the other methods."""
        sequence, self._next = self._next, self._next + 1
        self._pages[sequence], self._lengths[sequence] = [], 0
        return sequence

    def remove(self, sequence: int) -> None:
        """Forgets a sequence; its pages are free."""
        self._known([sequence])
        self._last = None
        self._free += reversed(self._pages.pop(sequence))
        del self._lengths[sequence]

    def trim(self, sequence: int, rows: int) -> None:
        """Forgets the last `rows` rows of a sequence; pages that hold none of it are free."""
        self._known([sequence])
        length = self._lengths[sequence]
        rows = check_integer("rows", rows, 0, length)
        self._lengths[sequence] = length - rows
        kept = -(-(length - rows) // self.page_size)
        self._last = None
        self._free += reversed(self._pages[sequence][kept:])
        del self._pages[sequence][kept:]

    def length(self, sequence: int) -> int:
        """How many rows a sequence has."""
        self._known([sequence])
        return self._lengths[sequence]

    def append(
        self,
        sequences: Sequence[int],
        k: mx.array,
        v: mx.array,
        counts: Sequence[int] | None = None,
    ) -> None:
        """Rows behind those of some sequences.

        Args:
            sequences: what `add` returned, none of them twice.
            k: ``(N, Hkv, T, D)``, v: ``(N, Hkv, T, Dv)``: T rows for each of N sequences.
            counts: how many rows each sequence gets, where they are packed one sequence after the
                other: k is ``(1, Hkv, sum(counts), D)``, v alike.

        Raises:
            CacheFull: too few pages are free.
            ArgumentError: as `append_kv`. Either way the cache stays as it is.
        """
        sequences = self._known(sequences)
        for name, x in (("k", k), ("v", v)):
            if not isinstance(x, mx.array) or x.ndim != 4:
                got = x.shape if isinstance(x, mx.array) else type(x).__name__
                raise ArgumentError(name, "an mlx.core.array (B, H, T, D)", got)
        many = len(sequences)
        if counts is None and k.shape[0] != many:
            raise ArgumentError("k.shape", f"a first axis of {many}, one a sequence", k.shape)
        new = [k.shape[2]] * many
        if counts is not None:
            found = [as_integer(n) for n in counts] if isinstance(counts, Iterable) else []
            new = [n for n in found if n is not None and n >= 0]
            if not len(new) == len(found) == many:
                raise ArgumentError("counts", f"{many} numbers of rows", counts)
        if counts is not None and sum(new) != k.shape[2]:
            raise ArgumentError("counts", f"a sum of {k.shape[2]}, the rows of k", counts)
        if not many:
            return
        pages, needed = self._with_room(sequences, new)
        table = _table(pages) if needed else self._table(sequences)
        start = [self._lengths[sequence] for sequence in sequences]
        offset = mx.array(start, mx.int32)
        rope = None if self._rope is None else self._rope.moved(offset)
        ends = [0, *itertools.accumulate(new)]
        keys, values = append_kv(
            (self.keys, self.values),
            k,
            v,
            offset=offset,
            block_table=table,
            cu_seqlens=None if counts is None else mx.array(ends, mx.int32),
            rope=rope,
            device=self._device,
        )
        self.keys, self.values = keys, values
        if needed:
            del self._free[-needed:]
            self._last = (tuple(sequences), table)
        for sequence, own, count in zip(sequences, pages, new, strict=True):
            self._pages[sequence] = own
            self._lengths[sequence] += count

    def tables(self, sequences: Sequence[int]) -> tuple[mx.array, mx.array]:
        """What attention needs to find the rows of some sequences.

        Returns:
            Block table ``(N, M)``, -1 where a sequence has no page, and lengths ``(N,)``; int32.
        """
        sequences = self._known(sequences)
        lengths = mx.array([self._lengths[sequence] for sequence in sequences], mx.int32)
        return self._table(sequences), lengths

    def __copy__(self) -> PagedKVCache:
        twin = object.__new__(type(self))
        twin.__dict__ |= self.__dict__
        twin._free, twin._lengths = list(self._free), dict(self._lengths)
        twin._pages = {sequence: list(own) for sequence, own in self._pages.items()}
        return twin

    def _known(self, sequences: Iterable[int]) -> list[int]:
        """Sequences in a list; raises `ArgumentError` unless each is one, and there once."""
        found = list(sequences) if isinstance(sequences, Iterable) else [sequences]
        for sequence in found:
            if not isinstance(sequence, Hashable) or sequence not in self._pages:
                raise ArgumentError("sequences", "what add() returned", sequence)
        if len(set(found)) < len(found):
            raise ArgumentError("sequences", "each sequence once", found)
        return found

    def _with_room(self, sequences: Sequence[int], new: list[int]) -> tuple[list[list[int]], int]:
        """The pages of sequences, enough for new rows, and how many of them are from the free."""
        more = [
            max(0, -(-(self._lengths[n] + count) // self.page_size) - len(self._pages[n]))
            for n, count in zip(sequences, new, strict=True)
        ]
        needed = sum(more)
        if needed > len(self._free):
            raise CacheFull(f"{counted(needed, 'more page')} needed, {len(self._free)} free")
        free = iter(self._free[: -needed - 1 : -1])
        own = [self._pages[n] for n in sequences]
        return [[*x, *itertools.islice(free, y)] for x, y in zip(own, more, strict=True)], needed

    def _table(self, sequences: Sequence[int]) -> mx.array:
        """The block table of sequences; kept, since most steps need no further page."""
        if self._last is None or self._last[0] != tuple(sequences):
            table = _table([self._pages[sequence] for sequence in sequences])
            self._last = (tuple(sequences), table)
        return self._last[1]


def _table(pages: list[list[int]]) -> mx.array:
    widest = max(1, *(len(own) for own in pages)) if pages else 1
    return mx.array([own + [-1] * (widest - len(own)) for own in pages], mx.int32)
