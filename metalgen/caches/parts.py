"""Keys or values of a cache: an array, or the three of ``mx.quantize``."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError
from metalgen.features.quantized import KV_BITS, KV_GROUPS
from metalgen.features.triple import Part, part_of


class Packing(NamedTuple):
    """How keys or values are quantized: bits of an element (None: not at all), and the group."""

    bits: int | None
    group: int


OneOrBoth = int | tuple[int, int]
"""A number for keys and values alike, or one for keys and one for values."""


def check_quantization(bits: object, group: object) -> tuple[Packing, Packing]:
    """How keys and values are quantized.

    Args:
        bits: a number for both, a pair of numbers (keys, values), or None: not quantized.
        group: a number for both, or a pair.

    Raises:
        ArgumentError: what caches cannot be.
    """
    both_bits = (None, None) if bits is None else _both("bits", bits, KV_BITS, ", or None")
    both_groups = _both("group_size", group, KV_GROUPS)
    keys, values = map(Packing, both_bits, both_groups)
    return keys, values


def _both(name: str, given: object, choices: tuple[int, ...], more: str = "") -> tuple[int, int]:
    pair = given if isinstance(given, (tuple, list)) else (given, given)
    found = [as_integer(each) for each in pair]
    if len(found) != 2 or any(each not in choices for each in found):
        known = ", ".join(map(str, choices))
        expected = f"one of {known}, or a pair of them (keys, values){more}"
        raise ArgumentError(name, expected, given)
    keys, values = (int(each) for each in found if each is not None)
    return keys, values


def said(packings: tuple[Packing, Packing]) -> str:
    """The bits of a cache, as its ``repr`` says them; empty where nothing is quantized."""
    (keys, _), (values, _) = packings
    if keys is None:
        return ""
    return f", {keys} bits" if keys == values else f", {keys} bits (keys) and {values} (values)"


def empty(
    first: int, heads: int, slots: int, width: int, dtype: mx.Dtype, packing: Packing
) -> Part:
    """Zeros, ``(first, heads, slots, width)``, or what ``mx.quantize`` would need for them.

    Raises:
        ArgumentError: a width that is no multiple of the group.
    """
    slot = (first, heads, slots)
    bits, group = packing
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
