"""What flash-attention's tests ask of its functions, asked of metalgen's.

After ``tests/test_flash_attn.py`` of Dao-AILab/flash-attention: its cases of the forward pass, of
packed sequences and of caches, not its code; values are float64, not its rule of twice the error
of a 16-bit computation.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from peer_cases import Sizes, Values, assert_right, at_the_end, exact, sampled, wide

import metalgen
from metalgen.testing.devices import normal

LENGTHS = (
    *((113, 203), (128, 217), (113, 211), (108, 256), (256, 128), (64, 64)),
    *((1, 147), (3, 199), (16, 256), (203, 113), (1, 1), (2, 1)),
)
WIDTHS = (32, 40, 59, 64, 96, 111, 128, 160, 192, 224, 256)
GROUPS = {"mha": (4, 4), "gqa": (6, 2), "mqa": (4, 1)}
MASKS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window_left": 20, "window_right": 11},
    {"window_left": 0, "causal": True},
    {"window_left": 33},
    {"window_right": 5},
)
EXTRAS: tuple[dict[str, Any], ...] = ({}, {"softcap": 30.0}, {"alibi": True})


def seen_by(q_len: int, kv_len: int, options: dict[str, Any]) -> Any:
    """Aligned at the lower right, as flash-attention's masks are from 2.1 on."""
    own, j = at_the_end(q_len, kv_len)
    seen = np.ones((q_len, kv_len), dtype=bool)
    if options.get("causal"):
        seen &= j <= own
    if (left := options.get("window_left")) is not None:
        seen &= j >= own - left
    if (right := options.get("window_right")) is not None:
        seen &= j <= own + right
    return seen


def called(options: dict[str, Any], heads: int) -> dict[str, Any]:
    given = {name: x for name, x in options.items() if name != "alibi"}
    return given | ({"alibi_slopes": metalgen.alibi_slopes(heads)} if "alibi" in options else {})


def expected_of(
    q: mx.array, k: mx.array, v: mx.array, options: dict[str, Any]
) -> tuple[Values, Values]:
    heads, q_len, kv_len = q.shape[1], q.shape[2], k.shape[2]
    own, j = at_the_end(q_len, kv_len)
    bias: Any = 0.0
    if "alibi" in options:
        bias = -wide(metalgen.alibi_slopes(heads))[:, None, None] * np.abs(own - j)
    seen = seen_by(q_len, kv_len, options)
    return exact(q, k, v, seen=seen, bias=bias, softcap=options.get("softcap"))


def cases() -> list[Any]:
    """Every length with every mask; widths, groups, extras and types go around."""
    around = zip(
        *(
            itertools.cycle(x)
            for x in (WIDTHS, GROUPS, EXTRAS, ("float16", "bfloat16", "float16", "float32"))
        ),
        strict=False,
    )
    found = []
    for _ in range(3):
        for (q_len, kv_len), mask in itertools.product(LENGTHS, MASKS):
            width, group, extra, dtype = next(around)
            sizes = Sizes(1, *GROUPS[group], q_len, kv_len, width, dtype=dtype)
            found.append((sizes, mask | extra))
        next(around)  # another partner for each
    return found


@pytest.mark.parametrize("case", sampled(cases(), 79, 25))
def test_forward(case: tuple[Sizes, dict[str, Any]], device: str) -> None:
    """Also the log-sum-exp, in flash-attention's layout (B, L, H, D)."""
    sizes, options = case
    q, k, v = sizes.arrays(rows_first=True)
    out, lse = metalgen.attention(
        q, k, v, return_lse=True, device=device, **called(options, sizes.heads)
    )
    expected, expected_lse = expected_of(q, k, v, options)
    assert_right(out, expected)
    np.testing.assert_allclose(np.array(lse), expected_lse, rtol=2e-5, atol=2e-5)
    blind = ~seen_by(sizes.q_len, sizes.kv_len, options).any(axis=1)
    assert not np.array(out.astype(mx.float32))[:, :, blind].any()
    assert np.isneginf(np.array(lse)[:, :, blind]).all()


def test_dropout_keeps_the_mean_and_a_key_its_weights(device: str) -> None:
    q, k, v = Sizes(1, 4, 2, 64, 128, 32).arrays()
    key = mx.random.key(3)
    ones = mx.ones_like(v)
    out = metalgen.attention(q, k, ones, dropout=0.17, dropout_key=key, device=device)
    again = metalgen.attention(q, k, ones, dropout=0.17, dropout_key=key, device=device)
    assert mx.array_equal(out, again)
    assert abs(out.mean().item() - 1) < 0.05  # 256 rows of some 128 weights each
    assert out.var(axis=-1).max().item() < 1e-10  # a row's weights are dropped for all columns


def test_the_same_call_gives_the_same_bits(device: str) -> None:
    q, k, v = Sizes(1, 4, 2, 113, 203, 64, dtype="float16").arrays()
    first = metalgen.attention(q, k, v, causal=True, device=device)
    for _ in range(3):
        assert mx.array_equal(first, metalgen.attention(q, k, v, causal=True, device=device))


def packed(lengths: list[int], heads: int, width: int, dtype: str, seed: int) -> mx.array:
    return normal((sum(lengths), heads, width), dtype, seed)


def starts_of(lengths: list[int]) -> mx.array:
    return mx.array([0, *np.cumsum(lengths).tolist()], mx.int32)


def varlen_cases() -> list[Any]:
    rng = np.random.default_rng(5)
    found = []
    for n in range(72):
        count = int(rng.integers(1, 6))
        most = [int(rng.choice([1, 20, 97, 130])), int(rng.choice([1, 33, 128, 211]))]
        q_lens, kv_lens = (rng.integers(0, m + 1, count).tolist() for m in most)
        same = n % 3 == 0  # self-attention
        mask, extra = MASKS[n % len(MASKS)], EXTRAS[n // 2 % len(EXTRAS)]
        dtype = ("float16", "bfloat16", "float32")[n // 3 % 3]
        group = ("mha", "gqa", "mqa")[n // 5 % 3]
        width = WIDTHS[n % len(WIDTHS)]
        found.append((q_lens, q_lens if same else kv_lens, group, width, dtype, mask | extra))
    return found


@pytest.mark.parametrize("case", sampled(varlen_cases(), 37, 1))
def test_packed_sequences(case: Any, device: str) -> None:
    q_lens, kv_lens, group, width, dtype, options = case
    heads, kv_heads = GROUPS[group]
    q = packed(q_lens, heads, width, dtype, 1)
    k, v = (packed(kv_lens, kv_heads, width, dtype, seed) for seed in (2, 3))
    out, lse = metalgen.varlen_attention(
        q,
        k,
        v,
        starts_of(q_lens),
        starts_of(kv_lens),
        max(q_lens),
        max(kv_lens),
        return_lse=True,
        device=device,
        **called(options, heads),
    )
    assert out.shape == q.shape and lse.shape == (heads, sum(q_lens))
    expected, expected_lse = np.zeros(out.shape), np.full(lse.shape, -np.inf)
    row = key = 0
    for q_len, kv_len in zip(q_lens, kv_lens, strict=True):
        rows, keys = slice(row, row + q_len), slice(key, key + kv_len)
        of = [x.swapaxes(0, 1)[None] for x in (q[rows], k[keys], v[keys])]
        if q_len and kv_len:
            own, own_lse = expected_of(*of, options)
            expected[rows], expected_lse[:, rows] = own[0].swapaxes(0, 1), own_lse[0]
        row, key = row + q_len, key + kv_len
    if out.size:
        assert_right(out, expected)
    np.testing.assert_allclose(np.array(lse), expected_lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("case", sampled(itertools.product((8, 16, 64), (False, True)), 6, 1))
def test_packed_queries_over_pages(case: tuple[int, bool], device: str) -> None:
    page, causal = case
    q_lens, kv_lens = [5, 1, 17], [40, 7, 100]
    q = packed(q_lens, 4, 32, "float16", 1)
    counts = [-(-n // page) for n in kv_lens]
    pages = [normal((sum(counts) + 2, page, 2, 32), "float16", seed) for seed in (2, 3)]
    order = np.random.default_rng(0).permutation(sum(counts) + 2)
    table = np.full((3, max(counts)), -1)
    for n, count in enumerate(counts):
        table[n, :count] = order[sum(counts[:n]) : sum(counts[: n + 1])]
    out = metalgen.varlen_attention(
        q,
        *pages,
        starts_of(q_lens),
        starts_of(kv_lens),
        block_table=mx.array(table),
        causal=causal,
        device=device,
    )
    row = 0
    for n, (q_len, kv_len) in enumerate(zip(q_lens, kv_lens, strict=True)):
        rows = mx.array(table[n, : counts[n]])
        k, v = (x[rows].reshape(-1, 2, 32)[:kv_len].swapaxes(0, 1)[None] for x in pages)
        own = q[row : row + q_len].swapaxes(0, 1)[None]
        expected, _ = exact(own, k, v, seen=seen_by(q_len, kv_len, {"causal": causal}))
        assert_right(out[row : row + q_len], expected[0].swapaxes(0, 1))
        row += q_len


def turned(x: Values, first: Any, dims: int, style: str) -> Values:
    """Rows turned by their position; entry b's first row stands at ``first[b]``."""
    half = dims // 2
    at = np.asarray(first)[:, None] + np.arange(x.shape[2])
    angles = (at[..., None] / 10000.0 ** (np.arange(half) / half))[:, None]
    found = x.copy()
    one, two = (
        (slice(0, half), slice(half, dims))
        if style == "half"
        else (slice(0, dims, 2), slice(1, dims, 2))
    )
    a, b = x[..., one], x[..., two]
    found[..., one] = a * np.cos(angles) - b * np.sin(angles)
    found[..., two] = a * np.sin(angles) + b * np.cos(angles)
    return found


CACHES = [
    {
        "new": new,
        "mask": mask,
        "group": group,
        "paged": paged,
        "rotary": rotary,
        "dtype": dtype,
        "width": width,
    }
    for new, mask, (group, width), paged, rotary, dtype in itertools.product(
        (0, 1, 5),
        ({}, {"causal": True}, {"causal": True, "window_left": 9}),
        (("mha", 59), ("gqa", 128), ("mqa", 64)),
        (None, 16),
        (None, "half", "pairs"),
        ("float32", "float16"),
    )
    if new or rotary is None
]


@pytest.mark.parametrize("case", sampled(CACHES, 83, 40))
def test_a_cache(case: dict[str, Any], device: str) -> None:
    """Queries over a cache to which keys were appended, rotated on the way, at each length."""
    heads, kv_heads = GROUPS[case["group"]]
    new, page, dtype = case["new"], case["paged"], case["dtype"]
    width = case["width"]
    room, lengths, q_len = 96, [31, 70, 0], max(1, new)
    if not new:
        lengths[2] = 1
    q = normal((3, heads, q_len, width), dtype, 1)
    fresh = [normal((3, kv_heads, new, width), dtype, seed) for seed in (2, 3)]
    held = [normal((3, kv_heads, room, width), dtype, seed) for seed in (4, 5)]
    rope = metalgen.Rope(dims=32, style=case["rotary"]) if case["rotary"] else None
    offsets, ends = mx.array(lengths), mx.array([n + new for n in lengths])

    options: dict[str, Any] = {"kv_lens": ends, "device": device, **case["mask"]}
    given: dict[str, Any] = {"offset": offsets, "rope": rope, "device": device}
    if page is None:
        spare = [mx.zeros((3, kv_heads, 1, width), held[0].dtype)] * 2
        cache: Any = tuple(mx.concatenate([x, y], axis=2) for x, y in zip(held, spare, strict=True))
    else:
        table = np.random.default_rng(1).permutation(3 * room // page).reshape(3, -1)
        options["block_table"] = given["block_table"] = mx.array(table)
        cache = tuple(in_pages(x, table, page) for x in held)
    if new:
        cache = metalgen.append_kv(cache, *fresh, **given)
    out = metalgen.attention(q, *cache, rope=rope, **options)

    for n, length in enumerate(lengths):
        end = length + new
        keys, values = (
            np.concatenate([wide(x[n : n + 1, :, :length]), wide(y[n : n + 1])], axis=2)
            for x, y in zip(held, fresh, strict=True)
        )
        queries = wide(q[n : n + 1])
        if rope is not None:
            keys[:, :, length:] = turned(keys[:, :, length:], [length], 32, case["rotary"])
            queries = turned(queries, [end - q_len], 32, case["rotary"])
        arrays = [as_stored(x, dtype) for x in (queries, keys, values)]
        expected, _ = exact(*arrays, seen=seen_by(q_len, end, case["mask"]))
        assert_right(out[n : n + 1], expected)


def as_stored(x: Values, dtype: str) -> mx.array:
    return mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))


def in_pages(x: mx.array, table: Any, page: int) -> mx.array:
    """Rows (B, H, L, D) in pages, as a table has them, and a spare page."""
    pages = mx.zeros((table.size + 1, x.shape[1], page, x.shape[3]), x.dtype)
    for n, row in enumerate(table):
        for m, number in enumerate(row):
            pages[int(number)] = x[n, :, m * page : (m + 1) * page]
    return pages


@pytest.mark.parametrize("case", sampled([(1, 147), (3, 200), (16, 97)], 3))
def test_entries_of_a_larger_cache_by_their_numbers(case: tuple[int, int], device: str) -> None:
    """flash-attention's `cache_batch_idx`: a dense cache is pages, and its entries a table."""
    q_len, length = case
    k, v = (normal((5, 2, 256, 64), "float16", seed) for seed in (2, 3))
    q = normal((3, 4, q_len, 64), "float16", 1)
    entries, page = [4, 0, 2], 64
    table = mx.array(entries)[:, None] * (256 // page) + mx.arange(256 // page)
    pages = [
        x.reshape(5, 2, 256 // page, page, 64).swapaxes(1, 2).reshape(-1, 2, page, 64)
        for x in (k, v)
    ]
    lengths = mx.full((3,), length)
    out = metalgen.attention(
        q, *pages, block_table=table, kv_lens=lengths, causal=True, device=device
    )
    chosen = [x[mx.array(entries)][:, :, :length] for x in (k, v)]
    seen = seen_by(q_len, length, {"causal": True})
    assert_right(out, exact(q, *chosen, seen=seen)[0])


@pytest.mark.parametrize("case", sampled([1, 4], 2))
def test_keys_that_start_after_padding_at_the_left(case: int, device: str) -> None:
    """flash-attention's `cache_leftpad`, by a mask function."""
    q, k, v = replace(Sizes(3, 4, 2, case, 80), dtype="float16").arrays()
    starts = [0, 11, 79]
    first = mx.array(starts)
    out = metalgen.flex_attention(
        q, k, v, mask_mod=lambda b, h, i, j: j >= first[b], causal=True, device=device
    )
    assert isinstance(out, mx.array)
    seen = seen_by(case, 80, {"causal": True}) & (
        np.arange(80) >= np.array(starts)[:, None, None, None]
    )
    assert_right(out, exact(q, k, v, seen=seen)[0])
