"""Random bits of dropout: Philox4x32-10, a function of a key and a counter.

J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Ten
rounds; constants and order of words as there. A weight's counter is its place in the call, so its
bits depend on no tile, target or device.
"""

from __future__ import annotations

from typing import Any

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW = 0xFFFFFFFF


def philox4x32(xp: Any, counter: tuple[Any, Any, Any, Any], key: Any) -> tuple[Any, Any, Any, Any]:
    """Four words of 32 random bits for each counter.

    Args:
        xp: `numpy` or `mlx.core`, whose arrays the others are.
        counter: four arrays of integers below 2^32, which broadcast together.
        key: two such words, ``(2,)``.

    Returns:
        Four arrays of uint64 (of which the upper halves are 0).
    """
    c0, c1, c2, c3 = (_word(xp, x) for x in counter)
    k0, k1 = (_word(xp, key[n]) for n in (0, 1))
    m0, m1, w0, w1, low, half = (
        xp.array(x, dtype=xp.uint64) for x in (*MULTIPLIERS, *WEYL, LOW, 32)
    )
    for step in range(ROUNDS):
        if step:
            k0, k1 = (k0 + w0) & low, (k1 + w1) & low
        p0, p1 = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
    return c0, c1, c2, c3


def threshold(p: float) -> int:
    """What a word must be below for a weight to be dropped with probability p, to 2^-32."""
    return round(p * 2**32)


def dropped(xp: Any, key: Any, p: float, b: Any, h: Any, i: Any, j: Any) -> Any:
    """Whether the weight of query i and key j is dropped.

    One Philox block serves four keys: ``j``, ``j + 1``, ``j + 8`` and ``j + 9`` for an even j with
    ``j % 16 < 8``, the elements that a lane holds of two 8x8 tiles beside each other.

    Args:
        xp: `numpy` or `mlx.core`, whose arrays the others are.
        key: ``(2,)`` uint32.
        p: the probability, from 0 to below 1.
        b, h, i, j: int32 arrays that broadcast together: batch entry or packed sequence, query
            head, query and key, each counted from 0.

    Returns:
        Booleans of the shape that they broadcast to.
    """
    words = philox4x32(xp, (j // 16 * 4 + j % 8 // 2, i, h, b), key)
    upper = j // 8 % 2 == 1
    even = xp.where(upper, words[2], words[0])
    odd = xp.where(upper, words[3], words[1])
    word = xp.where(j % 2 == 1, odd, even)
    return word < xp.array(threshold(p), dtype=xp.uint64)


def _word(xp: Any, x: Any) -> Any:
    return x.astype(xp.uint64) & xp.array(LOW, dtype=xp.uint64)
