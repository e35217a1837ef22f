"""The generator behind dropout."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.philox import dropped, philox4x32, threshold

# The known answers of Random123, the authors' own library: kat_vectors, philox 4x32 of 10 rounds.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("xp", [np, mx], ids=["numpy", "mlx"])
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(xp: Any, counter: list[int], key: list[int], expected: list[int]) -> None:
    words = [xp.array([word], dtype=xp.uint32) for word in counter]
    found = philox4x32(xp, (words[0], words[1], words[2], words[3]), xp.array(key, dtype=xp.uint32))
    assert [int(word[0]) for word in found] == expected


def places(xp: Any, batch: int, heads: int, q_len: int, kv_len: int) -> list[Any]:
    sizes = (batch, heads, q_len, kv_len)
    return [
        xp.arange(size, dtype=xp.int32).reshape([-1] + [1] * (3 - axis))
        for axis, size in enumerate(sizes)
    ]


def test_every_weight_has_the_word_that_its_place_says() -> None:
    key = np.array([7, 9], dtype=np.uint32)
    mask = dropped(np, key, 0.5, *places(np, 2, 3, 4, 40))
    for b, h, i, j in np.ndindex(*mask.shape):
        counter = [np.array(c, np.uint32) for c in (j // 16 * 4 + (j % 8) // 2, i, h, b)]
        words = philox4x32(np, (counter[0], counter[1], counter[2], counter[3]), key)
        assert mask[b, h, i, j] == (int(words[j % 2 + 2 * (j // 8 % 2)]) < 2**31)


def test_no_two_weights_share_a_word() -> None:
    used = {(j // 16 * 4 + (j % 8) // 2, j % 2 + 2 * (j // 8 % 2)) for j in range(1024)}
    assert len(used) == 1024


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_dropped_is_the_probability(p: float) -> None:
    mask = dropped(np, np.array([1, 2], np.uint32), p, *places(np, 2, 2, 128, 256))
    assert abs(mask.mean() - p) < 5 * (p * (1 - p) / mask.size) ** 0.5


def test_mlx_and_numpy_drop_the_same() -> None:
    key = mx.random.key(5)
    ours = dropped(mx, key, 0.3, *places(mx, 2, 2, 9, 50))
    assert np.array_equal(np.array(ours), dropped(np, np.array(key), 0.3, *places(np, 2, 2, 9, 50)))


def test_another_key_drops_others() -> None:
    at = places(np, 1, 1, 64, 64)
    masks = [dropped(np, np.array([0, n], np.uint32), 0.5, *at) for n in (0, 1)]
    assert 0.4 < (masks[0] != masks[1]).mean() < 0.6


def test_the_threshold_is_the_probability_in_words() -> None:
    assert [threshold(p) for p in (0.0, 2**-32, 0.25, 0.5)] == [0, 1, 2**30, 2**31]
    assert not dropped(np, np.array([0, 0], np.uint32), 0.0, *places(np, 1, 1, 9, 9)).any()
