"""The modifications of attention-gym, written anew for MLX, against themselves in float64.

After meta-pytorch/attention-gym: which masks and scores it has, not its code. Each runs as a mask
function alone, by a block mask, and on queries, keys and values of several types.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from peer_cases import assert_right, sampled

import metalgen
from metalgen.testing.devices import normal
from metalgen.testing.functions import Case, definition

BATCH, HEADS, LENGTH, WIDTH = 2, 4, 96, 32


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def window(width: int) -> Callable[..., Any]:
    return lambda b, h, i, j: (j <= i) & (i - j <= width)


def dilated(width: int, step: int) -> Callable[..., Any]:
    """A window of every `step`-th key."""
    return lambda b, h, i, j: (mx.abs(i - j) <= width) & ((i - j) % step == 0)


def prefix(lengths: list[int]) -> Callable[..., Any]:
    """A prefix, for each sequence of its own length, that sees itself."""
    ends = mx.array(lengths)
    return lambda b, h, i, j: (j < ends[b]) | (j <= i)


def documents(lengths: list[int], inner: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Documents one after the other; inside, a mask of positions counted from their start."""
    number = mx.array(np.repeat(np.arange(len(lengths)), lengths), mx.int32)
    starts = mx.array(np.concatenate([[0], np.cumsum(lengths)[:-1]]), mx.int32)

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        same = number[i] == number[j]
        start = starts[number[i]]
        return same if inner is None else same & inner(b, h, i - start, j - start)

    return mask


def neighbourhood(width: int, reach: int) -> Callable[..., Any]:
    """The pixels of a square around a pixel, which the image's edge moves inside."""
    last = width - 1 - reach

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        def near(a: Any, c: Any) -> Any:
            return mx.abs(mx.minimum(mx.maximum(a, reach), last) - c) <= reach

        return near(i // width, j // width) & near(i % width, j % width)

    return mask


def tiled(width: int, tile: int, reach: int) -> Callable[..., Any]:
    """Whole tiles of an image around a tile; pixels are stored tile by tile."""

    def place(x: Any) -> tuple[Any, Any]:
        number = x // (tile * tile)
        return number // (width // tile), number % (width // tile)

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        (a, c), (e, f) = place(i), place(j)
        return (mx.abs(a - e) <= reach) & (mx.abs(c - f) <= reach)

    return mask


def first_and_window(first: int, width: int) -> Callable[..., Any]:
    """The first keys, which serve as sinks, and a window."""
    return lambda b, h, i, j: (j <= i) & ((j < first) | (i - j < width))


def media(per_image: int, starts: list[int]) -> Callable[..., Any]:
    """Text that sees the image before it: keys are the tokens of images, one after the other."""
    image = np.zeros(LENGTH, np.int32) - 1
    for n, start in enumerate(starts):
        image[start:] = n
    own = mx.array(image)
    return lambda b, h, i, j: own[i] == j // per_image


def frames(size: int, prompt: int) -> Callable[..., Any]:
    """Video: a frame sees itself and its two neighbours, and everything sees the prompt."""

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        near = mx.abs((i - prompt) // size - (j - prompt) // size) <= 1
        return (i < prompt) | (j < prompt) | near

    return mask


def by_entry(masks: list[Callable[..., Any]]) -> Callable[..., Any]:
    """Another mask for each entry of the batch."""

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        found = masks[0](b, h, i, j)
        for n, each in enumerate(masks[1:], 1):
            found = mx.where(b == n, each(b, h, i, j), found)
        return found

    return mask


def alibi(heads: int) -> Callable[..., Any]:
    slopes = metalgen.alibi_slopes(heads)
    return lambda s, b, h, i, j: s - slopes[h] * mx.abs(i - j)


def softcap(cap: float) -> Callable[..., Any]:
    return lambda s, b, h, i, j: cap * mx.tanh(s / cap)


def by_key_and_query(table: mx.array) -> Callable[..., Any]:
    """A learnt bias of the distance, cut off at the table's ends."""
    reach = (table.shape[1] - 1) // 2

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + table[h, mx.minimum(mx.maximum(i - j, -reach), reach) + reach]

    return score


def latent(q_turned: mx.array, k_turned: mx.array) -> Callable[..., Any]:
    """Multi-head latent attention: the score of columns that are kept apart is added."""

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        found = s
        for c in range(4):
            found = found + q_turned[b, h, i, c] * k_turned[b, j, c]
        return found

    return score


MASKS = {
    "causal": causal,
    "sliding window": window(17),
    "dilated window": dilated(20, 3),
    "prefix": prefix([9, 40]),
    "documents": documents([30, 1, 41, 24]),
    "causal documents": documents([30, 1, 41, 24], causal),
    "windows in documents": documents([50, 46], window(8)),
    "prefixes in documents": documents([50, 46], prefix([5, 11])),
    "neighbourhood": neighbourhood(8, 2),
    "tiles": tiled(8, 4, 1),
    "first keys and a window": first_and_window(4, 12),
    "images before text": media(16, [3, 30, 31, 70]),
    "frames": frames(20, 16),
    "another for each entry": by_entry([causal, window(5)]),
    "any of two": metalgen.or_masks(window(3), prefix([20, 2])),
    "all of two": metalgen.and_masks(causal, documents([64, 32])),
    "every second head": lambda b, h, i, j: (h % 2 == 0) | (j <= i),
}
SCORES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "ALiBi": alibi(HEADS),
    "softcap": softcap(5.0),
    "distances": by_key_and_query(normal((HEADS, 41), seed=21)),
    "latent": latent(
        normal((BATCH, HEADS, LENGTH, 4), seed=22), normal((BATCH, LENGTH, 4), seed=23)
    ),
    "a position added": lambda s, b, h, i, j: s + 0.01 * (i - j) * (h + 1),
    "a score squared": lambda s, b, h, i, j: s * mx.abs(s),
    "a checkerboard": lambda s, b, h, i, j: mx.where((i - j) % 2 == 0, s, s - 1.5),
}
CASES = list(itertools.product(MASKS, SCORES, ("float32", "float16", "bfloat16")))


def arrays(mask: str, dtype: str) -> list[mx.array]:
    length = 64 if mask in ("neighbourhood", "tiles") else LENGTH
    shapes = ((HEADS, length), (HEADS // 2, length), (HEADS // 2, length))
    return [normal((BATCH, h, n, WIDTH), dtype, seed) for seed, (h, n) in enumerate(shapes, 1)]


@pytest.mark.parametrize("by_blocks", [True, False], ids=["blocks", "elements"])
@pytest.mark.parametrize("case", sampled(CASES, 205, 1))
def test_a_modification(case: tuple[str, str, str], by_blocks: bool, device: str) -> None:
    mask, score, dtype = case
    q, k, v = arrays(mask, dtype)
    expected, expected_lse = definition(Case(SCORES[score], MASKS[mask]), q, k, v, WIDTH**-0.5)
    given: dict[str, Any] = {"mask_mod": MASKS[mask]}
    if by_blocks:
        sizes = (BATCH, HEADS, q.shape[2], k.shape[2])
        given = {"block_mask": metalgen.create_block_mask(MASKS[mask], *sizes)}
    out, lse = metalgen.flex_attention(
        q, k, v, SCORES[score], return_lse=True, device=device, **given
    )
    assert_right(out, expected)
    np.testing.assert_allclose(np.array(lse), expected_lse, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", sampled(MASKS, 11, 4))
def test_a_mask_for_one_query_of_a_decoding_step(case: str, device: str) -> None:
    """The function with the query's offset captured, over the keys so far."""
    q, k, v = arrays(case, "float32")
    at = k.shape[2] - 1
    offset = mx.array(at)
    inner = MASKS[case]

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return inner(b, h, i + offset, j)

    one = q[:, :, -1:]
    expected, _ = definition(Case(None, inner), q, k, v, WIDTH**-0.5)
    out = metalgen.flex_attention(one, k, v, mask_mod=mask, device=device)
    assert isinstance(out, mx.array)
    assert_right(out, expected[:, :, -1:])


def test_gradients_of_a_learnt_bias_of_distances() -> None:
    q, k, v = arrays("causal", "float32")
    table = normal((HEADS, 41), seed=21)

    def loss(table: mx.array) -> mx.array:
        out = metalgen.flex_attention(q, k, v, by_key_and_query(table), causal, device="reference")
        assert isinstance(out, mx.array)
        return (out**2).sum()

    def exactly(values: Any) -> float:
        def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s + mx.array(values)[h, mx.clip(i - j, -20, 20) + 20]

        with mx.stream(mx.cpu):
            out, _ = definition(Case(score, causal), q, k, v, WIDTH**-0.5)
        return float((out**2).sum())

    found = np.array(mx.grad(loss)(table))
    values = np.array(table).astype(np.float32)
    for place in ((0, 20), (2, 25), (3, 40)):  # a difference of the definition itself
        up, down = values.copy(), values.copy()
        up[place] += 0.125
        down[place] -= 0.125
        slope = (exactly(up) - exactly(down)) / 0.25
        assert abs(found[place] - slope) <= 2e-2 * max(1.0, abs(slope))
    assert not found[:, :20].any()  # keys behind the query are hidden
