"""Keys or values: an array of rows, or the triple of ``mx.quantize``: words, scales, biases."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from metalgen.features.quantized import KV_BITS, KV_GROUPS

Part = mx.array | tuple[mx.array, mx.array, mx.array]
"""Keys or values: an array, or the three that ``mx.quantize`` returns."""


def arrays_of(part: object) -> tuple[mx.array, ...] | None:
    """The arrays of keys or values: one, or three of 4 axes; None: it is neither."""
    if isinstance(part, mx.array):
        return (part,)
    if not isinstance(part, (tuple, list)) or len(part) != 3:
        return None
    whole = all(isinstance(x, mx.array) and x.ndim == 4 for x in part)
    return tuple(part) if whole else None


def part_of(arrays: Sequence[mx.array]) -> Part:
    """The keys or values that one array is, or three."""
    if len(arrays) == 1:
        return arrays[0]
    words, scales, biases = arrays
    return words, scales, biases


def bits_of(words: mx.array, width: int) -> int | None:
    """Bits per element of quantized rows of so many columns; None: of no known number."""
    return next((bits for bits in KV_BITS if words.shape[3] * 32 == width * bits), None)


def group_of(scales: mx.array, width: int) -> int | None:
    """Columns that share a scale, in rows of so many columns; None: of no known number."""
    return next((group for group in KV_GROUPS if scales.shape[3] * group == width), None)
