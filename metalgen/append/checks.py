"""Whether the arrays of an append fit each other, and what they say that it is."""

from __future__ import annotations

import itertools

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.conversions import integers
from metalgen.features.quantized import packing
from metalgen.features.triple import arrays_of, bits_of
from metalgen.plurals import counted
from metalgen.problem.config import AttentionConfig
from metalgen.problem.rope import Rope

MAX_ROWS = 1 << 31
"""There are fewer rows in a cache: the kernel counts them in 32 bits."""


def parts_of(cache: object) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
    """The arrays of keys and of values, one each, or three; raises `ArgumentError` otherwise."""
    if not isinstance(cache, (tuple, list)) or len(cache) != 2:
        raise ArgumentError("cache", "a pair, of keys and of values", type(cache).__name__)
    found = []
    for name, x in zip(("keys", "values"), cache, strict=True):
        one = isinstance(x, (tuple, list)) and len(x) == 1
        arrays = arrays_of(x[0] if one else x)
        if arrays is None or arrays[0].ndim != 4:
            expected = "an mlx.core.array of 4 axes, or the three of mx.quantize"
            raise ArgumentError(f"cache, its {name}", expected, _shapes(arrays or x))
        found.append(arrays)
    if len(found[0]) != len(found[1]):
        raise ArgumentError("cache", "keys and values both quantized, or neither", "one")
    return found[0], found[1]


def _shapes(parts: object) -> object:
    several = isinstance(parts, (tuple, list))
    return [getattr(x, "shape", x) for x in parts] if several else type(parts).__name__  # type: ignore[attr-defined]


def config_of(
    key: tuple[mx.array, ...],
    value: tuple[mx.array, ...],
    k: mx.array,
    v: mx.array,
    offset: object,
    block_table: mx.array | None,
    cu_seqlens: mx.array | None,
    rope: Rope | None,
) -> AttentionConfig:
    """What an append computes, as far as shapes and types say it.

    Raises:
        ArgumentError: naming the first argument that does not fit.
    """
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, mx.array):
            raise ArgumentError(name, "an mlx.core.array", type(x).__name__)
        if x.ndim != 4:
            raise ArgumentError(f"{name}.shape", "4 axes (B, H, T, D)", x.shape)
    if v.shape[:3] != k.shape[:3]:
        raise ArgumentError("v.shape", f"{k.shape[:3]} before the last axis, as k has", v.shape)
    if v.dtype != k.dtype:
        raise ArgumentError("v.dtype", f"{k.dtype}, as k has", str(v.dtype))
    if rope is not None and not isinstance(rope, Rope):
        raise ArgumentError("rope", "a metalgen.Rope, or None", rope)
    if rope is not None and rope.one_position:
        raise ArgumentError("rope.one_position", "False for keys, which turn as they stand", True)
    bits, group = _quantization("keys", key, k)
    value_bits, value_group = _quantization("values", value, v)
    for name, array, axes in (("block_table", block_table, 2), ("cu_seqlens", cu_seqlens, 1)):
        if array is not None:
            integers(name, array, axes)
    if cu_seqlens is not None:
        if block_table is None:
            raise ArgumentError("cu_seqlens", "None without a block_table", "an array")
        if cu_seqlens.size < 2:
            raise ArgumentError("cu_seqlens.shape", "2 elements or more", cu_seqlens.shape)
        if k.shape[0] != 1:
            raise ArgumentError("k.shape", "a first axis of 1 with cu_seqlens", k.shape)
    elif block_table is None and k.shape[0] != key[0].shape[0]:
        raise ArgumentError("k.shape", f"a batch of {key[0].shape[0]}, as the cache has", k.shape)
    if not isinstance(offset, mx.array) and (type(offset) is not int or block_table is not None):
        expected = "an mlx.core.array of integers, one for each sequence"
        if block_table is None:
            expected = f"an integer from 0, or {expected}"
        raise ArgumentError("offset", expected, offset)
    config = AttentionConfig(
        k.shape[3],
        str(k.dtype),
        value_head_dim=v.shape[3],
        varlen=cu_seqlens is not None,
        kv_lens=isinstance(offset, mx.array),
        page_size=None if block_table is None else key[0].shape[2],
        kv_bits=bits,
        kv_group=group,
        value_bits=value_bits,
        value_group=value_group,
        rope=None if rope is None else rope.style,
        rope_dims=None if rope is None else rope.dims,
        rope_tables=rope is not None and rope.tables is not None,
    )
    _check_cache(config, key, value, k, v)
    return config


def _quantization(name: str, parts: tuple[mx.array, ...], rows: mx.array) -> tuple[int | None, int]:
    """Bits and group of the cache's keys or values, as new rows of them say."""
    if len(parts) == 1:
        return None, 64
    width = rows.shape[3]
    bits = bits_of(parts[0], width)
    group = width // max(1, parts[1].shape[3])
    if bits is None:
        sizes = f"{width // 8} (4 bits) or {width // 4} (8 bits)"
        expected = f"a last axis of {sizes} for {name[0]}'s {width}"
        raise ArgumentError(f"cache, packed {name}", expected, parts[0].shape)
    return bits, group


def _check_cache(
    config: AttentionConfig,
    key: tuple[mx.array, ...],
    value: tuple[mx.array, ...],
    k: mx.array,
    v: mx.array,
) -> None:
    """Whether each array of the cache takes the rows that go there."""
    own = getattr(mx, config.dtype)
    slots = (*key[0].shape[:3],)
    if slots[1] != k.shape[1]:
        raise ArgumentError("k.shape", f"{slots[1]} heads, as the cache has", k.shape)
    if key[-1].dtype != k.dtype and mx.issubdtype(key[-1].dtype, mx.floating):
        raise ArgumentError("k.dtype", f"{key[-1].dtype}, as the cache has", str(k.dtype))
    if config.kv_bits is None:
        for name, rows, part in (("k", k, key[0]), ("v", v, value[0])):
            if rows.shape[3] != part.shape[3]:
                expected = f"a last axis of {part.shape[3]}, as the cache has"
                raise ArgumentError(f"{name}.shape", expected, rows.shape)
    for name, parts, width in (("keys", key, config.head_dim), ("values", value, config.v_dim)):
        forms = [(own, width)]
        bits, group = packing(config, name[0])
        if bits is not None:
            groups = (own, width // group)
            forms = [(mx.uint32, width * bits // 32), groups, groups]
        for part, (dtype, columns) in zip(parts, forms, strict=True):
            if part.dtype != dtype or part.shape != (*slots, columns):
                expected = f"{str(dtype).removeprefix('mlx.core.')} {(*slots, columns)}"
                got = f"{str(part.dtype).removeprefix('mlx.core.')} {part.shape}"
                raise ArgumentError(f"cache, its {name}", expected, got)


def check_sizes(
    config: AttentionConfig,
    cached: mx.array,
    k: mx.array,
    block_table: mx.array | None,
    sequences: int,
) -> None:
    """Whether there are slots for the rows, and tables for the sequences.

    Raises:
        ArgumentError: what there are too few or too many of.
    """
    for name, x in (("cache", cached), ("k", k)):
        if x.shape[0] * x.shape[1] * x.shape[2] >= MAX_ROWS:
            raise ArgumentError(f"{name}.shape", "fewer than 2**31 rows", x.shape)
    if config.has_lengths and 0 in cached.shape:
        raise ArgumentError("cache", "slots, the last of them spare", cached.shape)
    if not config.has_lengths and k.shape[2] > cached.shape[2]:
        expected = f"at most {cached.shape[2]} rows, the slots of the cache"
        raise ArgumentError("k.shape", expected, k.shape)
    if block_table is not None and (block_table.shape[0] != sequences or not block_table.shape[1]):
        expected = f"2 axes, ({sequences}, pages of a sequence)"
        raise ArgumentError("block_table.shape", expected, block_table.shape)


def check_turns(config: AttentionConfig, rope: Rope) -> None:
    """Raises `ArgumentError` unless there is one period for each pair of columns."""
    if rope.tables is not None:
        cosines = rope.tables[0]
        if cosines.shape[1] != config.rotary_dim // 2:
            expected = f"(positions, {config.rotary_dim // 2}), half the columns that turn"
            raise ArgumentError("rope.tables[0].shape", expected, cosines.shape)
        return
    freqs = rope.turns(config.head_dim)
    if freqs.shape != (config.rotary_dim // 2,):
        expected = f"({config.rotary_dim // 2},), half the columns that turn"
        raise ArgumentError("rope.freqs.shape", expected, freqs.shape)


def vector(name: str, x: object, sequences: int) -> mx.array:
    """One integer for each sequence, as int32; raises `ArgumentError` for anything else."""
    if type(x) is int:
        return mx.broadcast_to(mx.array(x, mx.int32), (sequences,))
    array = integers(name, x, 0, 1)
    assert array is not None
    if array.ndim and array.shape != (sequences,):
        raise ArgumentError(f"{name}.shape", f"({sequences},), one for each sequence", array.shape)
    return mx.broadcast_to(array, (sequences,))


def check_contents(
    config: AttentionConfig, given: dict[str, mx.array], slots: int, length: int
) -> None:
    """Looks at the arrays; raises `ArgumentError` for a row that would be dropped."""
    if not config.has_lengths:
        return
    offsets: list[int] = given["offset"].tolist()  # type: ignore[assignment]
    counts = [length] * len(offsets)
    if "cu_seqlens" in given:
        cu: list[int] = given["cu_seqlens"].tolist()  # type: ignore[assignment]
        ordered = all(x <= y for x, y in itertools.pairwise(cu))
        if cu[0] != 0 or cu[-1] != length or not ordered:
            raise ArgumentError("cu_seqlens", f"numbers that ascend from 0 to {length}", cu)
        counts = [y - x for x, y in itertools.pairwise(cu)]
    page = config.page_size
    table: list[list[int]] = given["table"].tolist() if page else []  # type: ignore[assignment]
    room = len(table[0]) * page if page and table else slots - 1
    for n, (start, count) in enumerate(zip(offsets, counts, strict=True)):
        if count and not 0 <= start <= room - count:
            rows = counted(count, "row")
            expected = f"a number from 0 to {room - count}, for {rows} in {room} slots"
            raise ArgumentError(f"offset[{n}]", expected, start)
        if page and count:
            for column in range(start // page, (start + count - 1) // page + 1):
                if not 0 <= table[n][column] < slots - 1:
                    expected = f"a page from 0 to {slots - 2} (the last of {slots} is spare)"
                    raise ArgumentError(f"block_table[{n}, {column}]", expected, table[n][column])
