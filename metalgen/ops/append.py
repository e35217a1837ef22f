"""Appending new keys and values to a cache."""

from __future__ import annotations

import itertools

import mlx.core as mx

from metalgen.cache.launch import row_maker, store_places, store_slice
from metalgen.cache.parts import Part, part_of
from metalgen.cache.render import AppendSchedule, inputs, operands
from metalgen.config import KV_BITS, AttentionConfig
from metalgen.errors import ArgumentError
from metalgen.ops.conversions import integers
from metalgen.ops.options import Keys
from metalgen.ops.rope import Rope

_SCHEDULE = AppendSchedule()


def append_kv(
    cache: tuple[Keys, Keys],
    k: mx.array,
    v: mx.array,
    *,
    offset: int | mx.array,
    block_table: mx.array | None = None,
    cu_seqlens: mx.array | None = None,
    rope: Rope | None = None,
    check: bool = False,
    device: str | None = None,
    schedule: AppendSchedule | None = None,
) -> tuple[Part, Part]:
    """The cache with new keys and values behind those that it holds; keys turned on the way.

    One kernel rotates, quantizes and finds the places of all rows; MLX then stores them, **in
    place** where nothing else holds the cache's buffers: write ``cache = append_kv(cache, ...)``
    and keep no other reference. All stays lazy, and nothing is looked at (but with `check`).
    Not differentiable.

    Args:
        cache: keys and values, each an array, or quantized the three of ``mx.quantize`` (4 or 8
            bits, groups of 32, 64 or 128). Dense: ``(B, Hkv, L, D)``. With a `block_table`: pages
            ``(pages, Hkv, page_size, D)``. Where rows find their places by arrays (an `offset` for
            each sequence, or a `block_table`) **the last slot, or page, is a spare one**: what has
            no place of its own goes there, so nothing may be kept there.
        k: ``(B, Hkv, T, D)``, v: ``(B, Hkv, T, Dv)``, of the cache's type, any strides.
        offset: how many keys there are already, so where the first row of `k` goes: a number for
            all entries of a dense cache, or ``(N,)`` integers, one for each sequence.
        block_table: ``(N, M)`` integers; keys ``n * page_size`` and on of a sequence stand in page
            ``block_table[sequence, n]``. A row whose page is not one of the first ``pages - 1``
            (-1, say) is dropped, as is one before slot 0 or beyond the table.
        cu_seqlens: ``(N + 1,)``: k and v are packed, ``(1, Hkv, T, D)``, and sequence n owns rows
            ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``; others are dropped. With pages only.
        rope: how keys turn; without an offset of its own, the first at position `offset`.
        check: look at the contents of `offset`, `block_table` and `cu_seqlens` first, and refuse
            what would be dropped. It waits for the GPU.
        device: as in `metalgen.attention`.
        schedule: threads and elements of the kernel.

    Returns:
        Keys and values in the form of `cache`.

    Raises:
        ArgumentError: shapes, types or, with `check`, contents that cannot be used.
        DeviceError: the device is not available here.
    """
    key, value = _parts(cache)
    config = _config(key, value, k, v, offset, block_table, cu_seqlens, rope)
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.size - 1
    given: dict[str, mx.array] = {"k": k, "v": v}
    slots = key[0].shape[0 if config.page_size else 2]
    if config.has_lengths:
        given["offset"] = _vector("offset", offset, sequences)
        given["limit"] = mx.array([slots])
    elif k.shape[2] > slots:
        raise ArgumentError("k.shape", f"at most {slots} rows, the slots of the cache", k.shape)
    elif not 0 <= offset <= slots - k.shape[2]:
        expected = f"a number from 0 to {slots - k.shape[2]}: {k.shape[2]} rows in {slots} slots"
        raise ArgumentError("offset", expected, offset)
    if cu_seqlens is not None:
        given["cu_seqlens"] = cu_seqlens.astype(mx.int32)
    if block_table is not None:
        given["table"] = _table(block_table, sequences)
    if rope is not None:
        given["rope_freqs"] = _freqs(rope, config)
        turn = offset if rope.offset is None else rope.offset
        given["rope_offset"] = _vector("rope.offset", turn, sequences)
    _check_sizes(config, key[0], k)
    if check:
        _check_contents(config, given, slots, k.shape[2])
    if k.size == 0:
        return part_of(key), part_of(value)
    maker = row_maker(config, device, schedule or _SCHEDULE)
    made = maker({name: given[name] for name in inputs(config)})
    stored = []
    for name, parts, new in (("k", key, k), ("v", value, v)):
        rows = [new]
        if name in operands(config):
            names = ("rows",) if config.kv_bits is None else ("words", "scales", "biases")
            rows = [made[f"{name}_{part}"] for part in names]
        if config.has_lengths:
            places = made["places"]
            found = [store_places(x, y, places) for x, y in zip(parts, rows, strict=True)]
        else:
            found = [store_slice(x, y, int(offset)) for x, y in zip(parts, rows, strict=True)]
        stored.append(part_of(found))
    return stored[0], stored[1]


def _parts(cache: object) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
    if not isinstance(cache, (tuple, list)) or len(cache) != 2:
        raise ArgumentError("cache", "a pair, of keys and of values", type(cache).__name__)
    found = []
    for name, x in zip(("keys", "values"), cache, strict=True):
        parts = (x,) if isinstance(x, mx.array) else x
        whole = isinstance(parts, (tuple, list)) and len(parts) in (1, 3)
        if not whole or not all(isinstance(y, mx.array) and y.ndim == 4 for y in parts):
            expected = "an mlx.core.array of 4 axes, or the three of mx.quantize"
            raise ArgumentError(f"cache, its {name}", expected, _shapes(parts))
        found.append(tuple(parts))
    if len(found[0]) != len(found[1]):
        raise ArgumentError("cache", "keys and values both quantized, or neither", "one")
    return found[0], found[1]


def _shapes(parts: object) -> object:
    several = isinstance(parts, (tuple, list))
    return [getattr(x, "shape", x) for x in parts] if several else type(parts).__name__  # type: ignore[attr-defined]


def _config(
    key: tuple[mx.array, ...],
    value: tuple[mx.array, ...],
    k: mx.array,
    v: mx.array,
    offset: object,
    block_table: mx.array | None,
    cu_seqlens: mx.array | None,
    rope: Rope | None,
) -> AttentionConfig:
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
    bits, group = _quantization(key, k)
    for name, array, axes in (("block_table", block_table, 2), ("cu_seqlens", cu_seqlens, 1)):
        if array is not None:
            integers(name, array, axes)
    if cu_seqlens is not None:
        if block_table is None:
            raise ArgumentError("cu_seqlens", "None without a block_table", "an array")
        if cu_seqlens.size < 2:
            raise ArgumentError("cu_seqlens.shape", "2 elements or more", cu_seqlens.shape)
        if k.shape[0] != 1:
            raise ArgumentError("k.shape", "a first axis of 1 beside cu_seqlens", k.shape)
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
        rope=None if rope is None else rope.style,
        rope_dims=None if rope is None else rope.dims,
    )
    _check_cache(config, key, value, k, v)
    return config


def _quantization(key: tuple[mx.array, ...], k: mx.array) -> tuple[int | None, int]:
    if len(key) == 1:
        return None, 64
    width = k.shape[3]
    bits = next((b for b in KV_BITS if key[0].shape[3] * 32 == width * b), None)
    group = width // max(1, key[1].shape[3])
    if bits is None:
        expected = f"a last axis of {width // 8} (4 bits) or {width // 4} (8 bits) for k's {width}"
        raise ArgumentError("cache, packed keys", expected, key[0].shape)
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
    for name, parts, width in (("keys", key, config.head_dim), ("values", value, config.v_dim)):
        forms = [(own, width)]
        if config.kv_bits is not None:
            groups = (own, width // config.kv_group)
            forms = [(mx.uint32, width * config.kv_bits // 32), groups, groups]
        for part, (dtype, columns) in zip(parts, forms, strict=True):
            if part.dtype != dtype or part.shape != (*slots, columns):
                expected = f"{str(dtype).removeprefix('mlx.core.')} {(*slots, columns)}"
                got = f"{str(part.dtype).removeprefix('mlx.core.')} {part.shape}"
                raise ArgumentError(f"cache, its {name}", expected, got)


def _check_sizes(config: AttentionConfig, key: mx.array, k: mx.array) -> None:
    """Rows are counted in 32 bits."""
    for name, x in (("cache", key), ("k", k)):
        if x.shape[0] * x.shape[1] * x.shape[2] >= 1 << 31:
            raise ArgumentError(f"{name}.shape", "fewer than 2**31 rows", x.shape)
    if config.has_lengths and 0 in key.shape:
        raise ArgumentError("cache", "slots, the last of them spare", key.shape)


def _vector(name: str, x: object, sequences: int) -> mx.array:
    """One integer for each sequence."""
    if type(x) is int:
        return mx.broadcast_to(mx.array(x, mx.int32), (sequences,))
    array = integers(name, x, 0, 1)
    assert array is not None
    if array.ndim and array.shape != (sequences,):
        raise ArgumentError(f"{name}.shape", f"({sequences},), one for each sequence", array.shape)
    return mx.broadcast_to(array, (sequences,))


def _table(block_table: mx.array, sequences: int) -> mx.array:
    if block_table.shape[0] != sequences or block_table.shape[1] == 0:
        wanted = f"2 axes, ({sequences}, pages of a sequence)"
        raise ArgumentError("block_table.shape", wanted, block_table.shape)
    return block_table.astype(mx.int32)


def _freqs(rope: Rope, config: AttentionConfig) -> mx.array:
    freqs = rope.turns(config.head_dim)
    if freqs.shape != (config.turned // 2,):
        wanted = f"({config.turned // 2},), half the columns that turn"
        raise ArgumentError("rope.freqs.shape", wanted, freqs.shape)
    return freqs


def _check_contents(
    config: AttentionConfig, given: dict[str, mx.array], slots: int, length: int
) -> None:
    """Refuses a row that would be dropped; looks at the arrays."""
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
            expected = f"a number from 0 to {room - count}, for {count} rows in {room} slots"
            raise ArgumentError(f"offset[{n}]", expected, start)
        if page and count:
            for column in range(start // page, (start + count - 1) // page + 1):
                if not 0 <= table[n][column] < slots - 1:
                    expected = f"a page from 0 to {slots - 2} (the last of {slots} is spare)"
                    raise ArgumentError(f"block_table[{n}, {column}]", expected, table[n][column])
