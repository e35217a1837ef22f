"""Block masks: which blocks of queries and keys a mask leaves, in part or whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError, MissingArgument
from metalgen.features.tiles import blocks_of, listed
from metalgen.problem.listed_blocks import block_sizes, from_lists, size_of

if TYPE_CHECKING:
    from metalgen.dsl.trace import Traced

USUAL_BLOCK_SIZE = 32
"""Queries and keys of a block by default: fine enough that tiles of any schedule lose little."""
MAX_ELEMENTS = 1 << 26
"""Elements of the mask that are computed at once."""
KV_BLOCK_SIZE = 128
"""The same of `BlockMask.from_kv_blocks`, as FlexAttention has it."""
Index = int | slice | Sequence[int]


class BlockMask:
    """The blocks of a mask, as `create_block_mask` finds them.

    Attributes:
        batch, heads: how many masks there are of each; 1 where the function reads no b or h (the
            array has an axis of 1), and all share one, and where it was made for one.
        q_len, kv_len: lengths that it was made for.
        block_size: queries and keys of a block.
        some, every: booleans ``(batch, heads, blocks of queries, blocks of keys)``: whether a block
            has a key that is seen, and whether it has none that is not.
        mask: the traced mask function, with the captured arrays as they were when `some` and
            `every` were computed: what is assigned into them later changes nothing here. None for
            the mask of an array.
        array: booleans ``(batch, heads, q_len or 1, kv_len or 1)``, likewise as they were; None for
            the mask of a function.
    """

    def __init__(
        self,
        mask: Traced | mx.array,
        q_len: int,
        kv_len: int,
        block_size: tuple[int, int],
        some: mx.array,
        every: mx.array,
    ) -> None:
        # Else the elements of partial blocks would follow the arrays, and full blocks would not.
        self.mask: Traced | None = None
        self.array: mx.array | None = None
        if isinstance(mask, mx.array):
            self.array = mx.array(mask)
        else:
            self.mask = replace(mask, arrays=tuple(mx.array(array) for array in mask.arrays))
        self.batch, self.heads = some.shape[:2]
        self.q_len, self.kv_len = q_len, kv_len
        self.block_size = block_size
        self.some, self.every = some, every
        self._lists: dict[tuple[int, int, bool], mx.array] = {}

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Batch entries, heads, queries and keys."""
        return self.batch, self.heads, self.q_len, self.kv_len

    def sparsity(self) -> float:
        """Percentage of the blocks that are skipped; looks at the blocks, so it waits for them."""
        return 100.0 * (1.0 - float(mx.mean(self.some.astype(mx.float32))))

    def to_dense(self) -> mx.array:
        """int32 ``(batch, heads, blocks of queries, blocks of keys)``: 1 where a key is seen."""
        return self.some.astype(mx.int32)

    def __getitem__(self, index: Index | tuple[Index, ...]) -> BlockMask:
        """The mask of some batch entries, and of some heads: ``mask[b]``, ``mask[b, h]``.

        Its function is that of the entries and heads that are left, which count from 0 in it.

        Args:
            index: an integer, a slice or a sequence of integers for each of the two axes. An
                integer leaves an axis of 1. An axis that all entries share has the index 0 only.

        Raises:
            ArgumentError: more than two axes, or an index that is out of range.
        """
        from metalgen.dsl.reindexing import reindexed

        parts = index if isinstance(index, tuple) else (index,)
        if len(parts) > 2:
            expected = "at most two indices, of batch entries and of heads"
            raise ArgumentError("block_mask[...]", expected, f"{len(parts)} of them")
        parts = (*parts, *(slice(None),) * (2 - len(parts)))
        chosen = [
            _entries(name, part, size)
            for name, part, size in zip(("b", "h"), parts, (self.batch, self.heads), strict=True)
        ]

        def taken(x: mx.array) -> mx.array:
            return mx.take(mx.take(x, mx.array(chosen[0]), axis=0), mx.array(chosen[1]), axis=1)

        some, every = taken(self.some), taken(self.every)
        if self.mask is None:
            assert self.array is not None
            mask: Traced | mx.array = taken(self.array)
        else:
            read = self.mask.graph.inputs
            names = {n: c for n, c in zip(("b", "h"), chosen, strict=True) if n in read}
            mask = reindexed(self.mask, names)
        return BlockMask(mask, self.q_len, self.kv_len, self.block_size, some, every)

    @classmethod
    def from_kv_blocks(
        cls,
        kv_num_blocks: mx.array,
        kv_indices: mx.array,
        full_kv_num_blocks: mx.array | None = None,
        full_kv_indices: mx.array | None = None,
        BLOCK_SIZE: int | tuple[int, int] = KV_BLOCK_SIZE,
        mask_mod: Callable[..., Any] | None = None,
        seq_lengths: tuple[int, int] | None = None,
    ) -> BlockMask:
        """The mask of blocks that are listed: for each block of queries, blocks of keys.

        A key is seen where its block is full, or where it is listed and `mask_mod` leaves the key.

        Args:
            kv_num_blocks: ``(B, H, R)``: how many blocks are listed for each block of queries.
            kv_indices: ``(B, H, R, C)``: their numbers, in any order; what follows them
                is not looked at.
            full_kv_num_blocks, full_kv_indices: likewise, of blocks in which no key is masked.
            BLOCK_SIZE: queries and keys of a block, or both in one number.
            mask_mod: masks the keys of the listed blocks; None: all are seen.
            seq_lengths: queries and keys; None: those of whole blocks.

        Raises:
            ArgumentError: shapes or types that do not fit, or lengths outside of the blocks.
            FunctionError: what is wrong with the function.
        """
        partial, full = (kv_num_blocks, kv_indices), (full_kv_num_blocks, full_kv_indices)
        return cls(*from_lists(partial, full, BLOCK_SIZE, mask_mod or noop_mask, seq_lengths))

    def check(self, batch: int, heads: int, q_len: int, kv_len: int) -> None:
        """Raise `ArgumentError` unless this is the mask of a call of these sizes."""
        if (self.q_len, self.kv_len) != (q_len, kv_len):
            wanted = f"one made for {q_len} queries and {kv_len} keys"
            raise ArgumentError("block_mask", wanted, self)
        for name, count, own, reads in (
            ("B", batch, self.batch, "b"),
            ("H", heads, self.heads, "h"),
        ):
            if self.mask is None:
                fits, why = own in (1, count), f"its array has {own} along that axis"
            else:
                fits = own == count or (own == 1 and reads not in self.mask.graph.inputs)
                why = f"its function reads {reads}"
            if not fits:
                wanted = f"one made with {name}={count}, because {why}"
                raise ArgumentError("block_mask", wanted, self)

    def tiles(self, bq: int, bk: int) -> tuple[mx.array, mx.array]:
        """`some` and `every` of tiles of other sizes; never less seen than there is."""
        if self.array is not None:  # which says it exactly
            return blocks_of(self.array, self.q_len, self.kv_len, bq, bk)
        found = self.some, self.every
        for axis, length, size, tile in (
            (2, self.q_len, self.block_size[0], bq),
            (3, self.kv_len, self.block_size[1], bk),
        ):
            found = _regrouped(*found, axis, length, size, tile)
        return found

    def lists(self, bq: int, bk: int, *, by_keys: bool = False) -> mx.array:
        """What a kernel with tiles of ``bq`` queries and ``bk`` keys reads.

        Args:
            bq, bk: queries and keys of a tile.
            by_keys: for a kernel that owns rows of keys and passes over the queries: lists of
                blocks of queries, for each block of keys.

        Returns:
            int32 ``(batch, heads, ceil(q_len / bq), 1 + n)``: how many tiles of keys are visited,
            then twice each one's number, in rising order, plus 1 where no element is masked. Kept
            for the next call.
        """
        if (bq, bk, by_keys) not in self._lists:
            self._lists[bq, bk, by_keys] = listed(*self.tiles(bq, bk), by_keys=by_keys)
        return self._lists[bq, bk, by_keys]

    def __repr__(self) -> str:
        return (
            f"BlockMask(batch={self.batch}, heads={self.heads}, q_len={self.q_len}, "
            f"kv_len={self.kv_len}, block_size={self.block_size})"
        )


def _regrouped(
    some: mx.array, every: mx.array, axis: int, length: int, size: int, tile: int
) -> tuple[mx.array, mx.array]:
    """Blocks of `size` along an axis regrouped to those of `tile`: any of some, all of every."""
    if size == tile:
        return some, every
    count = -(-length // tile)
    starts = mx.arange(count) * tile
    first = starts // size
    last = (mx.minimum(starts + tile, length) - 1) // size  # the tile's last block
    reach = -(-tile // size) + (1 if tile % size else 0)
    seen, whole = None, None
    for step in range(reach):
        index = mx.minimum(first + step, last)
        a, b = mx.take(some, index, axis=axis), mx.take(every, index, axis=axis)
        seen = a if seen is None else seen | a
        whole = b if whole is None else whole & b
    assert seen is not None and whole is not None
    return seen, whole


def noop_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    """The mask function that leaves every key."""
    return kv_idx >= 0


def _entries(name: str, index: Index, size: int) -> list[int]:
    """The entries of an axis that an index names."""
    if isinstance(index, slice):
        found = list(range(size))[index]
    else:
        numbers = [index] if as_integer(index) is not None else list(index)  # type: ignore[arg-type]
        found = []
        for number in map(as_integer, numbers):
            if number is None or not -size <= number < size:
                expected = f"integers from {-size} to {size - 1} for {name}"
                raise ArgumentError("block_mask[...]", expected, index)
            found.append(number % size)
    if not found:
        raise ArgumentError("block_mask[...]", f"at least one entry of {name}", index)
    return found


def create_mask(
    mod_fn: Callable[..., Any], B: int | None, H: int | None, Q_LEN: int, KV_LEN: int
) -> mx.array:
    """The mask of a function as an array, for looking at it or for other attention functions.

    Args:
        mod_fn: ``mask_mod(b, h, q_idx, kv_idx)``, or ``score_mod(score, b, h, q_idx, kv_idx)``,
            whose mask is where a score of 0 does not become minus infinity.
        B, H: batch entries and query heads; None: 1.
        Q_LEN, KV_LEN: lengths.

    Returns:
        booleans ``(B, H, Q_LEN, KV_LEN)``.

    Raises:
        ArgumentError: a size below 1.
        FunctionError: what is wrong with the function, and what to write instead.
    """
    import inspect

    from metalgen.dsl.trace import trace

    sizes = [1 if x is None else size_of(n, x, ", or None") for n, x in (("B", B), ("H", H))]
    sizes += [size_of("Q_LEN", Q_LEN), size_of("KV_LEN", KV_LEN)]
    try:
        count = len(inspect.signature(mod_fn).parameters)
    except (TypeError, ValueError):
        count = 4
    scored = count == 5
    traced = trace(mod_fn, "score_mod" if scored else "mask_mod")
    axes = [mx.arange(size, dtype=mx.int32) for size in sizes]
    places = {
        name: x.reshape([-1 if n == axis else 1 for axis in range(4)])
        for n, (name, x) in enumerate(zip(("b", "h", "q", "kv"), axes, strict=True))
    }
    found = traced.graph.evaluate(mx, places | {"score": mx.zeros((1, 1, 1, 1))}, traced.arrays)
    return mx.broadcast_to(found != -mx.inf if scored else found, sizes)


def create_block_mask(
    mask_mod: Callable[..., Any] | mx.array,
    B: int | None,
    H: int | None,
    Q_LEN: int,
    KV_LEN: int,
    block_size: int | tuple[int, int] | None = None,
    *,
    BLOCK_SIZE: int | tuple[int, int] | None = None,
    device: object = None,
) -> BlockMask:
    """The block mask of ``mask_mod(b, h, q_idx, kv_idx)``, or of an array of booleans.

    `flex_attention` takes it as `block_mask`, `attention` as `mask`. The mask of a function is
    computed once, whole, in pieces of 64 million elements; that of an array stays lazy. Keep the
    result for as long as the function, its captured arrays and the lengths stay the same.

    Args:
        mask_mod: a function of scalar arrays that returns a boolean: whether the key is seen; or
            booleans that broadcast to ``(B, H, Q_LEN, KV_LEN)``, which say so themselves.
        B, H: batch entries and query heads of the calls; None, or any number, where the mask does
            not depend on them.
        Q_LEN, KV_LEN: lengths.
        block_size: queries and keys of a block, or both in one number; at most the lengths. Any
            serves any schedule; tiles of the kernel that are not made of whole blocks are skipped
            less often. None: 32.
        BLOCK_SIZE: FlexAttention's name of the same.
        device: FlexAttention's; taken and not used, because MLX's arrays belong to no device.

    Raises:
        ArgumentError: a size below 1, or an array of another type or shape.
        MissingArgument: B or H is None although the mask depends on it.
        FunctionError: what is wrong with the function, and what to write instead.
    """
    from metalgen.dsl.trace import trace

    q_len, kv_len = size_of("Q_LEN", Q_LEN), size_of("KV_LEN", KV_LEN)
    entries, each = (
        None if x is None else size_of(n, x, ", or None") for n, x in (("B", B), ("H", H))
    )
    name, chosen = ("block_size", block_size) if BLOCK_SIZE is None else ("BLOCK_SIZE", BLOCK_SIZE)
    if block_size is not None and BLOCK_SIZE is not None:
        raise ArgumentError("BLOCK_SIZE", "None with block_size, which is the same", BLOCK_SIZE)
    sizes = block_sizes(name, USUAL_BLOCK_SIZE if chosen is None else chosen)
    # A block that is larger than all there is would be padded with what is not there.
    rows, columns = (min(size, most) for size, most in zip(sizes, (q_len, kv_len), strict=True))
    if isinstance(mask_mod, mx.array):
        array = _mask_array(mask_mod, entries, each, q_len, kv_len)
        found = blocks_of(array, q_len, kv_len, rows, columns)
        return BlockMask(array, q_len, kv_len, (rows, columns), *found)
    mask = trace(mask_mod, "mask_mod")
    for name, size, reads in (("B", B, "b"), ("H", H, "h")):
        if size is None and reads in mask.graph.inputs:
            what = "batch entries" if name == "B" else "query heads"
            raise MissingArgument(name, f"(the number of {what}): mask_mod reads {reads}")
    batch = entries if entries is not None and "b" in mask.graph.inputs else 1
    heads = each if each is not None and "h" in mask.graph.inputs else 1
    some, every = _computed(mask, batch, heads, q_len, kv_len, rows, columns)
    return BlockMask(mask, q_len, kv_len, (rows, columns), some, every)


def _mask_array(
    array: mx.array, batch: int | None, heads: int | None, q_len: int, kv_len: int
) -> mx.array:
    """An array of booleans with four axes, each of which is 1 or that of the calls.

    Raises:
        ArgumentError: not booleans, or a shape that does not broadcast to
            ``(batch, heads, q_len, kv_len)``; None stands for any number.
    """
    if array.dtype != mx.bool_:
        expected = "bool (True: the key is seen); floats are a bias, and have no blocks"
        raise ArgumentError("mask_mod.dtype", expected, str(array.dtype))
    shape = (1,) * (4 - array.ndim) + tuple(array.shape)
    whole = (batch, heads, q_len, kv_len)
    fits = len(shape) == 4 and all(
        size == 1 or size == most or (most is None and size > 0)
        for size, most in zip(shape, whole, strict=True)
    )
    if not fits:
        names = ("B", "H")
        sizes = ", ".join(names[n] if x is None else str(x) for n, x in enumerate(whole))
        expected = f"at most 4 axes, which broadcast to ({sizes})"
        raise ArgumentError("mask_mod.shape", expected, tuple(array.shape))
    return array.reshape(shape)


def _computed(
    mask: Traced, batch: int, heads: int, q_len: int, kv_len: int, bq: int, bk: int
) -> tuple[mx.array, mx.array]:
    columns = -(-kv_len // bk)
    rows = max(1, MAX_ELEMENTS // (batch * heads * kv_len * bq)) * bq
    inputs = {
        "b": mx.arange(batch, dtype=mx.int32)[:, None, None, None],
        "h": mx.arange(heads, dtype=mx.int32)[:, None, None],
        "kv": mx.arange(kv_len, dtype=mx.int32),
    }
    some, every = [], []
    for start in range(0, q_len, rows):
        end = min(start + rows, q_len)
        blocks = -(-(end - start) // bq)
        q = mx.arange(start, end, dtype=mx.int32)[:, None]
        seen = mask.graph.evaluate(mx, inputs | {"q": q}, mask.arrays)
        seen = mx.broadcast_to(seen, (batch, heads, end - start, kv_len))
        pad = [(0, 0), (0, 0), (0, blocks * bq - (end - start)), (0, columns * bk - kv_len)]
        shape = (batch, heads, blocks, bq, columns, bk)
        found = [
            mx.pad(seen, pad, constant_values=mx.array(fill)).reshape(shape)
            for fill in (False, True)
        ]
        some.append(found[0].any(axis=(3, 5)))
        every.append(found[1].all(axis=(3, 5)))
        if end < q_len:  # one piece at a time
            mx.eval(some[-1], every[-1])
    return mx.concatenate(some, axis=2), mx.concatenate(every, axis=2)
