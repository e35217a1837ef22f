"""The slopes of ALiBi."""

from __future__ import annotations

import math

import mlx.core as mx

from metalgen.arguments import check_integer


def alibi_slopes(heads: int) -> mx.array:
    """The slopes of Press et al. (2022), section 3: ``(heads,)`` float32.

    For a power of two, ``2 ** (-8 / heads)`` and its powers. For other numbers, as in the authors'
    code: those of the power of two below, and between them those of the next one (every second).

    Raises:
        ArgumentError: not a number from 1 to 65,536.
    """
    heads = check_integer("heads", heads, 1, 1 << 16)
    below = 1 << math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (n + 1) / below) for n in range(below)]
    slopes += [2 ** (-4 * (2 * n + 1) / below) for n in range(heads - below)]
    return mx.array(slopes, mx.float32)
