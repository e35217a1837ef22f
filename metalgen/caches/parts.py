"""Keys or values of a cache: an array, or the three of ``mx.quantize``."""

from __future__ import annotations

import mlx.core as mx

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError
from metalgen.features.quantized import KV_BITS, KV_GROUPS
from metalgen.features.triple import Part, part_of


def check_quantization(bits: object, group: object) -> tuple[int | None, int]:
    """Bits and group as plain integers; raises `ArgumentError` if caches cannot be so."""
    plain_bits, plain_group = as_integer(bits), as_integer(group)
    if bits is not None and plain_bits not in KV_BITS:
        raise ArgumentError("bits", f"one of {', '.join(map(str, KV_BITS))}, or None", bits)
    if plain_group is None or plain_group not in KV_GROUPS:
        raise ArgumentError("group_size", f"one of {', '.join(map(str, KV_GROUPS))}", group)
    return plain_bits, plain_group


def empty(
    first: int, heads: int, slots: int, width: int, dtype: mx.Dtype, bits: int | None, group: int
) -> Part:
    """Zeros, ``(first, heads, slots, width)``, or what ``mx.quantize`` would need for them.

    Raises:
        ArgumentError: a width that is no multiple of the group.
    """
    slot = (first, heads, slots)
    if bits is None:
        return mx.zeros((*slot, width), dtype)
    if width % group:
        expected = f"a multiple of group_size={group}, as mx.quantize has it"
        raise ArgumentError("head dimension", expected, width)
    words = mx.zeros((*slot, width * bits // 32), mx.uint32)
    scales, biases = (mx.zeros((*slot, width // group), dtype) for _ in range(2))
    return words, scales, biases


def _arrays(part: Part) -> tuple[mx.array, ...]:
    return part if isinstance(part, tuple) else (part,)


def slots_of(part: Part) -> int:
    """How many slots each entry has."""
    return _arrays(part)[0].shape[2]


def rows_of(part: Part, stop: int) -> Part:
    """The slots before `stop`, as views."""
    return part_of([x[:, :, :stop] for x in _arrays(part)])


def wider(part: Part, more: int) -> Part:
    """The same with further slots, of zeros."""
    found = []
    for x in _arrays(part):
        first, heads, _, width = x.shape
        found.append(mx.concatenate([x, mx.zeros((first, heads, more, width), x.dtype)], axis=2))
    return part_of(found)
