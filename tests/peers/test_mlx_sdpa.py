"""What MLX's own tests of `scaled_dot_product_attention` ask of it, asked of `metalgen.attention`.

After ``python/tests/test_fast_sdpa.py`` of ml-explore/mlx: its shapes and kinds of masks, not its
code. Where MLX compares with its unfused operations, this compares with float64.
"""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from peer_cases import Sizes, assert_right, at_the_end, exact, sampled, wide

import metalgen
from metalgen import ArgumentError
from metalgen.testing.devices import normal

FULL = [
    Sizes(batch, heads, kv_heads, q_len, kv_len, width, dtype=dtype)
    for (batch, q_len, kv_len, heads, kv_heads), width, dtype in itertools.product(
        [
            (1, 128, 128, 4, 4),
            (1, 64, 128, 4, 4),
            (1, 65, 128, 4, 2),
            (2, 20, 20, 3, 3),
            (1, 63, 63, 4, 1),
            (1, 129, 129, 4, 2),
            (1, 31, 128, 6, 2),
            (1, 128, 33, 4, 4),  # more queries than keys
            (1, 400, 400, 2, 1),
            (1, 1, 1, 4, 4),
        ],
        (64, 72, 80, 96, 128, 256),
        ("float32", "float16", "bfloat16"),
    )
]
DECODE = [
    Sizes(1, heads, kv_heads, q_len, kv_len, width, dtype=dtype)
    for kv_len, (heads, kv_heads), q_len, width, dtype in itertools.product(
        (1, 7, 9, 32, 63, 67, 129, 400, 2000),
        ((8, 8), (8, 2), (8, 1)),
        (1, 4, 8),
        (64, 128, 192),
        ("float32", "float16"),
    )
]


def masks(sizes: Sizes) -> dict[str, tuple[dict[str, Any], Any, Any]]:
    """Arguments of a call by kind of mask; what of that is seen, and what is added to scores."""
    s, rng = sizes, np.random.default_rng(0)
    own, j = at_the_end(s.q_len, s.kv_len)
    added = normal((s.batch, s.heads, s.q_len, s.kv_len), s.dtype, 9)
    booleans = rng.random((s.batch, s.heads, s.q_len, s.kv_len)) < 0.5
    by_head = rng.random((s.heads, 1, s.kv_len)) < 0.8
    turned = rng.random((s.kv_len, 1, s.heads)).T < 0.8
    few = j < max(1, s.kv_len - 10)
    return {
        "none": ({}, True, 0.0),
        "causal": ({"mask": "causal"}, j <= own, 0.0),
        "added": ({"mask": added}, True, wide(added)),
        "booleans": ({"mask": mx.array(booleans)}, booleans, 0.0),
        "one for all": ({"mask": mx.array(True)}, True, 0.0),
        "of keys": ({"mask": mx.array(few[0])}, few, 0.0),
        "of heads": ({"mask": mx.array(by_head)}, by_head, 0.0),
        "of heads, transposed": ({"mask": mx.array(turned)}, turned, 0.0),
    }


KINDS = tuple(masks(Sizes(1, 2, 1, 1, 1)))


def check(sizes: Sizes, kind: str, device: str, *, rows_first: bool = False) -> None:
    options, seen, bias = masks(sizes)[kind]
    q, k, v = sizes.arrays(rows_first=rows_first)
    out = metalgen.attention(q, k, v, device=device, **options)
    assert_right(out, exact(q, k, v, seen=seen, bias=bias)[0])


@pytest.mark.parametrize("case", sampled(itertools.product(FULL, KINDS[:4]), 361, 5))
def test_full_attention(case: tuple[Sizes, str], device: str) -> None:
    check(*case, device)


@pytest.mark.parametrize("case", sampled(zip(FULL[::3], itertools.cycle(KINDS[:4])), 41))
def test_full_attention_of_transposed_arrays(case: tuple[Sizes, str], device: str) -> None:
    check(*case, device, rows_first=True)


@pytest.mark.parametrize("case", sampled(zip(DECODE, itertools.cycle(KINDS)), 97))
def test_a_few_queries(case: tuple[Sizes, str], device: str) -> None:
    check(*case, device, rows_first=len(str(case[0])) % 2 == 1)


@pytest.mark.parametrize("case", sampled(itertools.product((43, 4096), KINDS[4:]), 9, 3))
def test_one_query_over_keys_whose_heads_and_rows_are_swapped(
    case: tuple[int, str], device: str
) -> None:
    length, kind = case
    check(Sizes(1, 4, 1, 1, length), kind, device, rows_first=True)


@pytest.mark.parametrize("case", sampled([43, 128, 237, 2048], 4))
def test_values_of_another_width_than_keys(case: int, device: str) -> None:
    check(Sizes(1, 4, 1, 1, case, 192, 128), "none", device)


def test_a_slice_of_longer_values_is_read_where_it_lies(device: str) -> None:
    q, k = Sizes(1, 4, 4, 1, 32).arrays()[:2]
    v = normal((1, 4, 128, 64), seed=5)[:, :, :32]
    assert_right(metalgen.attention(q, k, v, device=device), exact(q, k, v)[0])


def test_keys_of_a_cache_that_is_longer_than_they_are(device: str) -> None:
    q, k, v = Sizes(2, 4, 2, 5, 256).arrays()
    for length in (57, 255):
        keys, values = k[:, :, :length], v[:, :, :length]
        out = metalgen.attention(q[:, :, :1], keys, values, device=device)
        assert_right(out, exact(q[:, :, :1], keys, values)[0])


def test_a_mask_that_was_made_of_numbers_is_the_boolean_one(device: str) -> None:
    """Causal by booleans, by the lowest float32 and by minus infinity."""
    x = normal((1, 2, 8, 32))
    seen = mx.arange(8)[:, None] >= mx.arange(8)
    expected, _ = exact(x, x, x, seen=np.array(seen))
    for low in (mx.finfo(mx.float32).min, -mx.inf):
        added = mx.where(seen, 0.0, low)
        assert_right(metalgen.attention(x, x, x, mask=added, device=device), expected)
    assert_right(metalgen.attention(x, x, x, mask=seen, device=device), expected)


def test_a_mask_for_each_entry_of_the_batch(device: str) -> None:
    sizes = Sizes(2, 8, 2, 4, 8, 32)
    q, k, v = sizes.arrays()
    added = 10 * normal((2, 1, 4, 8), seed=7)
    out = metalgen.attention(q, k, v, mask=added, device=device)
    assert_right(out, exact(q, k, v, bias=wide(added))[0])


@pytest.mark.parametrize("case", sampled(["float16", "float32", "bfloat16"], 3))
def test_an_added_mask_of_another_type_is_taken(case: str, device: str) -> None:
    """MLX refuses a float32 mask for float16 queries; the kernel adds it in float32."""
    q, k, v = Sizes(1, 4, 2, 9, 21, dtype=case).arrays()
    added = normal((9, 21), seed=4)
    out = metalgen.attention(q, k, v, mask=added, device=device)
    assert_right(out, exact(q, k, v, bias=wide(added))[0])


def test_masks_that_do_not_broadcast_are_refused(device: str) -> None:
    q, k, v = Sizes(1, 4, 1, 1, 43).arrays()
    with pytest.raises(ArgumentError, match="mask.shape: expected 4 axes that broadcast"):
        metalgen.attention(q, k, v, mask=mx.zeros((4, 2, 43), mx.bool_), device=device)


SINKS = [
    (Sizes(2, 8, kv_heads, q_len, kv_len, 64, dtype=dtype), kind)
    for kv_heads, (q_len, kv_len), dtype, kind in itertools.product(
        (2, 8),
        ((1, 128), (8, 43), (37, 128), (128, 128)),
        ("float32", "float16"),
        ("none", "causal", "booleans"),
    )
]


@pytest.mark.parametrize("case", sampled(SINKS, 29))
def test_sinks(case: tuple[Sizes, str], device: str) -> None:
    sizes, kind = case
    options, seen, bias = masks(sizes)[kind]
    q, k, v = sizes.arrays()
    sinks = 4 * normal((8,), seed=6)
    out = metalgen.attention(q, k, v, sinks=sinks, device=device, **options)
    assert_right(out, exact(q, k, v, seen=seen, bias=bias, sinks=wide(sinks))[0])


@pytest.mark.parametrize("case", sampled([1, 8, 64], 3))
def test_large_scores_do_not_overflow(case: int, device: str) -> None:
    q, k, v = Sizes(1, 2, 2, case, 64, dtype="float16").arrays()
    q = q * 30
    assert_right(metalgen.attention(q, k, v, device=device), exact(q, k, v)[0])


@pytest.mark.parametrize("case", sampled([True, False], 2))
def test_gradients_are_those_of_mlx(case: bool, device: str) -> None:
    q, k, v = Sizes(2, 4, 2, 40, 40, 32).arrays()

    def loss(of: Any) -> Any:
        return lambda *x: (of(*x) ** 2).sum()

    mask = "causal" if case else None
    own = mx.grad(
        loss(lambda q, k, v: metalgen.attention(q, k, v, mask=mask, device=device)), (0, 1, 2)
    )
    mlx = mx.grad(
        loss(
            lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=32**-0.5, mask=mask)
        ),
        (0, 1, 2),
    )
    for got, wanted in zip(own(q, k, v), mlx(q, k, v), strict=True):
        np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=1e-4, atol=1e-5)
