"""Calls made up for a config: what kernels are checked and timed with."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.features.functions import graphs
from metalgen.features.quantized import packing
from metalgen.problem.inputs import NOTHING, Inputs, max_kv_len

if TYPE_CHECKING:
    from metalgen.problem.config import AttentionConfig

Call = tuple[mx.array, mx.array, mx.array, Inputs]


def sample_call(
    config: AttentionConfig,
    *,
    batch: int = 1,
    kv_heads: int = 2,
    q_len: int,
    kv_len: int,
    seed: int = 0,
    ragged: bool = True,
) -> Call:
    """Arrays of a call that use everything a config asks for.

    Args:
        config: what asks.
        batch: batch entries, or packed sequences.
        kv_heads: key/value heads.
        q_len, kv_len: lengths; of the longest sequence where they differ.
        seed: the same arrays for a seed.
        ragged: where the config has lengths, they are any up to these, 0 and 1 among them, some
            pages are none, and NaN lies wherever no kernel may look; keys and values are views into
            larger caches, bias and mask broadcast. Otherwise everything is as long as it may be, in
            one piece: what a timing wants.

    Returns:
        q, k, v and the other arrays, of unit variance, not evaluated.
    """
    return _Sampler(config, batch, kv_heads, q_len, kv_len, seed, ragged).call()


class _Sampler:
    """The arguments of `sample_call`, and its random choices in a fixed order."""

    def __init__(
        self,
        config: AttentionConfig,
        batch: int,
        kv_heads: int,
        q_len: int,
        kv_len: int,
        seed: int,
        ragged: bool,
    ) -> None:
        self.config, self.batch, self.kv_heads = config, batch, kv_heads
        self.q_len, self.kv_len, self.seed, self.ragged = q_len, kv_len, seed, ragged
        self.heads = kv_heads * config.heads_per_kv
        self.dtype: mx.Dtype = getattr(mx, config.dtype)
        self.choices = random.Random(seed)
        self.layout = dict[str, mx.array]()
        self.scores = (0, 0, 0, 0)
        self.keys = iter(mx.random.split(mx.random.key(seed), 16))

    def call(self) -> Call:
        config, layout = self.config, self.layout
        rows, entries = self.q_len, self.batch
        kv_lens = self.lengths(self.kv_len) if config.varlen or config.has_lengths else None
        queries = self.lengths(self.q_len) if config.varlen else [rows] * entries
        if config.varlen:
            starts = self.starts(queries)
            layout["cu_q"] = mx.array(starts, mx.int32)
            entries, rows = 1, starts[-1] + (3 if self.ragged else 0)
        q = self.normal((entries, self.heads, rows, config.head_dim)).astype(self.dtype)
        if config.varlen:
            q = mx.where((mx.arange(rows) < starts[-1])[:, None], q, self.outside)
        if config.seqused_q:
            q = self.used(q, queries)
        k, v = self.caches(kv_lens)
        known = Inputs(block_table=layout.get("block_table"))
        self.scores = (entries, self.heads, rows, max_kv_len(config, k, known))
        captured, named = dict[str, Any](), dict[str, mx.array]()
        for feature in config.features:
            (captured if feature.captures else named).update(feature.sample(self))
        return q, k, v, NOTHING.having(named, **captured)

    @property
    def outside(self) -> mx.array:
        """What lies where nothing is looked at."""
        return mx.array(float("nan") if self.ragged else 0.0, self.dtype)

    def lengths(self, longest: int) -> list[int]:
        """One for each sequence: the longest, 0, 1, then any, in any order."""
        if not self.ragged:
            return [longest] * self.batch
        some = [longest, 0, min(1, longest)]
        more = [self.choices.randint(0, longest) for _ in range(self.batch - len(some))]
        found = (some + more)[: self.batch]
        self.choices.shuffle(found)
        return found

    def starts(self, lengths: list[int]) -> list[int]:
        return [sum(lengths[:n]) for n in range(len(lengths) + 1)]

    def caches(self, kv_lens: list[int] | None) -> tuple[mx.array, mx.array]:
        """Keys and values; how long they are, and where, goes to the layout."""
        config, layout = self.config, self.layout
        lengths = [self.kv_len] * self.batch if kv_lens is None else kv_lens
        first = self.firsts(lengths) if config.kv_starts else [0] * self.batch
        if config.page_size is not None:
            assert kv_lens is not None
            table, used = self.table(kv_lens, first, config.page_size)
            layout["kv_lens"] = mx.array(kv_lens, mx.int32)
            layout["block_table"] = mx.array(table, mx.int32).reshape(self.batch, -1)
            seen = mx.array(used)
        elif config.varlen:
            assert kv_lens is not None
            starts = self.starts(kv_lens)
            layout["cu_k"] = mx.array(starts, mx.int32)
            packed = [False] * (starts[-1] + (5 if self.ragged else 0))
            for start, before, length in zip(starts, first, lengths, strict=False):
                packed[start + before : start + length] = [True] * (length - before)
            seen = mx.array(packed, mx.bool_)[None]
        else:
            places = mx.arange(self.kv_len)[None]
            if kv_lens is not None:
                layout["kv_lens"] = mx.array(kv_lens, mx.int32)
            seen = (places < mx.array(lengths)[:, None]) & (places >= mx.array(first)[:, None])
        return (
            self.cache("k", seen, config.head_dim),
            self.cache("v", seen, config.v_dim),
        )

    def used(self, q: mx.array, queries: list[int]) -> mx.array:
        """Queries of which each sequence uses some: none, one, then any; or all."""
        some = [0, *(min(1, count) for count in queries[1:2])]
        more = [self.choices.randint(0, count) for count in queries[len(some) :]]
        used = (some + more)[: len(queries)] if self.ragged and len(queries) > 1 else queries
        self.layout["seqused_q"] = mx.array(used, mx.int32)
        rows = [n < most for count, most in zip(queries, used, strict=True) for n in range(count)]
        if self.config.varlen:
            rows += [False] * (q.shape[2] - len(rows))
        seen = mx.array(rows, mx.bool_).reshape(q.shape[0], 1, q.shape[2], 1)
        return mx.where(seen, q, self.outside)

    def firsts(self, lengths: list[int]) -> list[int]:
        """The first key of each sequence: 0, none, half of them before it, then any."""
        some = [0, *lengths[1:2], *(length // 2 for length in lengths[2:3])]
        more = [self.choices.randint(0, length) for length in lengths[len(some) :]]
        found = some + more if self.ragged else [0] * self.batch
        self.layout["kv_starts"] = mx.array(found, mx.int32)
        return found

    def table(
        self, kv_lens: list[int], first: list[int], size: int
    ) -> tuple[list[list[int]], list[list[bool]]]:
        """A block table, its pages in any order, and which keys of which page are some."""
        width = -(-self.kv_len // size)
        needed = [-(-length // size) for length in kv_lens]
        spare = 2 if self.ragged else 0
        numbers = list(range(sum(needed) + spare))
        if self.ragged:
            self.choices.shuffle(numbers)
        used = [[False] * size for _ in numbers]
        table = [[-1] * width for _ in kv_lens]
        for n, length in enumerate(kv_lens):
            for place in range(needed[n]):
                if self.ragged and needed[n] > 1 and self.choices.random() < 0.15:
                    continue  # a page of keys that are not seen
                page = table[n][place] = numbers.pop()
                used[page] = [first[n] <= place * size + slot < length for slot in range(size)]
        return table, used or [[False] * size]

    def cache(self, name: str, seen: mx.array, width: int) -> mx.array:
        """``(B, Hkv, keys, width)`` or pages of that, perhaps a view; quantized if asked for."""
        first, keys = seen.shape
        extra = self.choices.choice([0, 7]) if self.ragged else 0
        heads_last = self.ragged and self.choices.random() < 0.7
        shape = (first, keys + extra, self.kv_heads, width)
        if not heads_last:
            shape = (first, self.kv_heads, keys + extra, width)
        x = self.normal(shape).astype(self.dtype)
        if extra:
            seen = mx.pad(seen, [(0, 0), (2, extra - 2)])
        mask = seen[:, :, None, None] if heads_last else seen[:, None, :, None]

        def view(part: mx.array) -> mx.array:
            if heads_last:
                part = part.swapaxes(1, 2)
            return part[:, :, 2 : 2 + keys] if extra else part

        bits, group = packing(self.config, name)
        if bits is None:
            return view(mx.where(mask, x, self.outside))
        if x.size:
            words, scales, biases = mx.quantize(x, group_size=group, bits=bits)
        else:  # mx.quantize takes no empty array
            words = mx.zeros((*x.shape[:3], width * bits // 32), mx.uint32)
            scales = biases = mx.zeros((*x.shape[:3], width // group), self.dtype)
        for kind, part in (("scales", scales), ("biases", biases)):
            self.layout[f"{name}_{kind}"] = view(mx.where(mask, part, self.outside))
        return view(words)

    def functions(self) -> dict[str, Any]:
        """Captured arrays of the config's functions, and the blocks of its mask."""
        found = graphs(self.config)
        arrays: dict[str, tuple[mx.array, ...]] = {"score": (), "mask": ()}
        for role, graph in found.items():
            seeds = range(self.seed, self.seed + len(graph.arrays))
            arrays[role] = tuple(
                _synthetic(a.dtype, a.shape, s) for a, s in zip(graph.arrays, seeds, strict=True)
            )
        if not self.config.block_mask or "mask" not in found:
            return arrays
        from metalgen.dsl.trace import Traced
        from metalgen.problem.block_mask import BlockMask, _computed

        batch, heads, q_len, kv_len = self.scores
        traced = Traced(found["mask"], arrays["mask"])
        some, every = _computed(traced, batch, heads, q_len, kv_len, 8, 8)
        return arrays | {"blocks": BlockMask(traced, q_len, kv_len, (8, 8), some, every)}

    def bernoulli(self, share: float, shape: tuple[int, ...]) -> mx.array:
        return mx.random.bernoulli(share, shape, key=next(self.keys))

    def broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to another: any axis 1."""
        if not self.ragged:
            return 1, *shape[1:]
        return tuple(1 if self.choices.random() < 0.3 else size for size in shape)

    def normal(self, shape: tuple[int, ...]) -> mx.array:
        return mx.random.normal(shape, key=next(self.keys))


def _synthetic(dtype: str, shape: tuple[int, ...], seed: int) -> mx.array:
    """Normal floats, or small integers."""
    key = mx.random.key(1000 + seed)
    kind: Any = getattr(mx, "bool_" if dtype == "bool" else dtype)
    if "float" in dtype:
        return mx.random.normal(shape, key=key).astype(kind)
    return mx.random.randint(0, 2 if dtype == "bool" else 4, shape, key=key).astype(kind)
