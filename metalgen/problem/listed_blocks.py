"""Block masks of lists of blocks, as FlexAttention's `BlockMask.from_kv_blocks` takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError

if TYPE_CHECKING:
    from metalgen.dsl.trace import Traced

Parts = tuple["Traced", int, int, tuple[int, int], mx.array, mx.array]
"""The arguments of a `metalgen.problem.block_mask.BlockMask`."""
Lists = tuple[mx.array | None, mx.array | None]
"""How many blocks of keys are listed for each block of queries, and their numbers."""
NONE, LISTED, FULL = 0, 1, 2


def from_lists(
    partial: Lists,
    full: Lists,
    block_size: int | tuple[int, int],
    mask_mod: Callable[..., Any],
    lengths: tuple[int, int] | None,
) -> Parts:
    """The parts of the block mask that `BlockMask.from_kv_blocks` describes."""
    from metalgen.dsl.trace import trace

    rows, columns = block_sizes("BLOCK_SIZE", block_size)
    listed = _flags("kv_num_blocks", "kv_indices", *partial)
    every = mx.zeros(listed.shape, mx.bool_)
    if (full[0] is None) != (full[1] is None):
        name = "full_kv_indices" if full[1] is None else "full_kv_num_blocks"
        raise ArgumentError(name, "an array, as the other of the two", None)
    if full[0] is not None:
        every = _flags("full_kv_num_blocks", "full_kv_indices", *full)
        if every.shape != listed.shape:
            expected = f"blocks {listed.shape}, as kv_indices has"
            raise ArgumentError("full_kv_indices.shape", expected, every.shape)
    q_len, kv_len = _lengths(lengths, (listed.shape[2] * rows, listed.shape[3] * columns))
    if -(-q_len // rows) != listed.shape[2] or -(-kv_len // columns) != listed.shape[3]:
        expected = f"lengths of {listed.shape[2]} x {listed.shape[3]} blocks"
        raise ArgumentError("seq_lengths", expected, lengths)
    state = mx.where(every, FULL, mx.where(listed, LISTED, NONE)).astype(mx.int32)
    batch, heads = state.shape[:2]

    def seen(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        entry = 0 if batch == 1 else b
        head = 0 if heads == 1 else h
        here = state[entry, head, q_idx // rows, kv_idx // columns]
        return (here == FULL) | ((here == LISTED) & mask_mod(b, h, q_idx, kv_idx))

    return trace(seen, "mask_mod"), q_len, kv_len, (rows, columns), state > NONE, every


def _flags(number: str, name: str, counts: Any, indices: Any) -> mx.array:
    """Booleans of which blocks are listed."""
    for argument, x, axes in ((number, counts, 3), (name, indices, 4)):
        if not isinstance(x, mx.array) or not mx.issubdtype(x.dtype, mx.integer):
            got = x.dtype if isinstance(x, mx.array) else type(x).__name__
            raise ArgumentError(argument, "an mlx.core.array of integers", got)
        if x.ndim != axes or 0 in x.shape:
            raise ArgumentError(f"{argument}.shape", f"{axes} axes, none empty", x.shape)
    if counts.shape != indices.shape[:3]:
        raise ArgumentError(f"{number}.shape", f"{indices.shape[:3]}, as {name} has", counts.shape)
    columns = indices.shape[3]
    valid = mx.arange(columns) < counts[..., None]
    places = mx.where(valid, indices, columns)[..., None]
    return (places == mx.arange(columns)).any(axis=3)


def _lengths(given: object, whole: tuple[int, int]) -> tuple[int, int]:
    if given is None:
        return whole
    expected = "two positive integers, queries and keys"
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise ArgumentError("seq_lengths", expected, given)
    q_len, kv_len = map(as_integer, given)
    if q_len is None or kv_len is None or min(q_len, kv_len) < 1:
        raise ArgumentError("seq_lengths", expected, given)
    return q_len, kv_len


def block_sizes(name: str, given: object) -> tuple[int, int]:
    """Queries and keys of a block, from a number or a pair; raises `ArgumentError`."""
    sizes = given if isinstance(given, Sequence) else (given, given)
    if len(sizes) != 2:
        raise ArgumentError(name, "a number, or one for queries and one for keys", given)
    return size_of(name, sizes[0]), size_of(name, sizes[1])


def size_of(name: str, size: object, otherwise: str = "") -> int:
    """A length or a count as an integer; raises `ArgumentError` that names it."""
    number = as_integer(size)
    if number is None or not 1 <= number <= 1 << 24:
        raise ArgumentError(name, f"an integer from 1 to 16777216{otherwise}", size)
    return number
