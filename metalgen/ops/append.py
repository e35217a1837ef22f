"""Appending new keys and values to a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen.append.checks import (
    check_contents,
    check_sizes,
    check_turns,
    config_of,
    parts_of,
    vector,
)
from metalgen.append.launch import row_maker, store_places, store_slice
from metalgen.arguments import as_integer
from metalgen.calls.options import Keys
from metalgen.devices import default_device, get_device
from metalgen.errors import ArgumentError
from metalgen.families import APPEND, Schedule, append_schedule
from metalgen.families.append import inputs, outputs
from metalgen.features.conversions import as_int32
from metalgen.features.triple import Part, part_of
from metalgen.plurals import counted
from metalgen.problem.config import AttentionConfig
from metalgen.problem.rope import Rope

_SCHEDULE = append_schedule()


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
    schedule: Schedule | None = None,
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
        schedule: threads and elements of the kernel (`metalgen.families.append_schedule`).

    Returns:
        Keys and values in the form of `cache`.

    Raises:
        ArgumentError: shapes, types or, with `check`, contents that cannot be used.
        DeviceError: the device is not available here.
    """
    key, value = parts_of(cache)
    if (slot := as_integer(offset)) is not None:
        offset = slot
    if schedule is not None and getattr(schedule, "family", None) != APPEND.name:
        raise ArgumentError("schedule", "a schedule of the append family, or None", schedule)
    try:
        form = _form((*key, *value, k, v), (offset, block_table, cu_seqlens), rope)
        plan = _known.get(form)
    except (AttributeError, TypeError):  # arguments to be complained about
        form = plan = None
    if plan is None:
        config = config_of(key, value, k, v, offset, block_table, cu_seqlens, rope)
        plan = _Plan.of(config, key[0], k, block_table, cu_seqlens, rope)
        _remember(form, plan)
    config = plan.config
    if plan.limit is None and not 0 <= offset <= plan.slots - k.shape[2]:
        room = plan.slots - k.shape[2]
        expected = f"a number from 0 to {room}: {counted(k.shape[2], 'row')} in {plan.slots} slots"
        raise ArgumentError("offset", expected, offset)
    given = {"k": k, "v": v}
    if plan.limit is not None:
        given["offset"] = vector("offset", offset, plan.sequences)
        given["limit"] = plan.limit
    for name, array in (("cu_seqlens", cu_seqlens), ("table", block_table)):
        if array is not None:
            given[name] = as_int32(array)
    if rope is not None:
        given |= rope.arrays(config.head_dim)
        turn = offset if rope.offset is None else rope.offset
        given["rope_offset"] = vector("rope.offset", turn, plan.sequences)
    if check:
        check_contents(config, given, plan.slots, k.shape[2])
    if k.size == 0:
        return part_of(key), part_of(value)
    maker = row_maker(config, _device_name(device), _SCHEDULE if schedule is None else schedule)
    made = maker({name: given[name] for name in plan.inputs})
    stored = []
    for parts, new, names in ((key, k, plan.key_rows), (value, v, plan.value_rows)):
        rows = [made[name] for name in names] or [new]
        if plan.limit is not None:
            places = made["places"]
            found = [store_places(x, y, places) for x, y in zip(parts, rows, strict=True)]
        else:
            found = [store_slice(x, y, int(offset)) for x, y in zip(parts, rows, strict=True)]
        stored.append(part_of(found))
    return stored[0], stored[1]


def _device_name(device: str | None) -> str:
    """The name of a device; of MLX's default one, which may change, where none is named."""
    if device is None:
        return default_device().name
    return device if isinstance(device, str) else get_device(device).name


@dataclass(frozen=True, eq=False)
class _Plan:
    """What calls of one form have in common, so that it is worked out and checked once.

    Args:
        slots: slots of a dense cache, or pages.
        limit: the same as an array, where rows are placed; None where they go behind one slot.
        inputs: names of the kernel's inputs.
        key_rows, value_rows: names of its outputs that are stored as keys and as values.
    """

    config: AttentionConfig
    sequences: int
    slots: int
    limit: mx.array | None
    inputs: tuple[str, ...]
    key_rows: tuple[str, ...]
    value_rows: tuple[str, ...]

    @classmethod
    def of(
        cls,
        config: AttentionConfig,
        cached: mx.array,
        k: mx.array,
        block_table: mx.array | None,
        cu_seqlens: mx.array | None,
        rope: Rope | None,
    ) -> _Plan:
        """The plan of a call; raises `ArgumentError` where its shapes do not fit."""
        sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.size - 1
        slots = cached.shape[2] if block_table is None else cached.shape[0]
        check_sizes(config, cached, k, block_table, sequences)
        if rope is not None:
            check_turns(config, rope)
        names = outputs(config)
        return cls(
            config,
            sequences,
            slots,
            mx.array([slots], mx.int32) if config.has_lengths else None,
            inputs(config),
            tuple(name for name in names if name[:2] == "k_"),
            tuple(name for name in names if name[:2] == "v_"),
        )


_known: dict[Any, _Plan] = {}
_MOST_KNOWN = 4096


def _remember(form: Any, plan: _Plan) -> None:
    if form is None:
        return
    if len(_known) >= _MOST_KNOWN:  # caches that grow, prompts of every length
        _known.clear()
    _known[form] = plan


def _form(arrays: Sequence[mx.array], others: Sequence[Any], rope: Rope | None) -> Any:
    """What of a call decides whether it is a good one, without the values of numbers."""
    if rope is not None and type(rope) is not Rope:
        raise TypeError
    forms: list[Any] = [(x.shape, x.dtype) for x in arrays]
    forms += [(x.shape, x.dtype) if isinstance(x, mx.array) else type(x) for x in others]
    if rope is not None:
        forms += [rope.style, rope.dims, None if rope.freqs is None else rope.freqs.shape]
        forms += [None if rope.tables is None else rope.tables[0].shape]
    return tuple(forms)
