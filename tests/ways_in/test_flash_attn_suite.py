"""flash-attention's own test logic over its interface here, on plain MLX and on a device's kernels.

A sample runs always. All 300 cases on plain MLX, and 200 on the device:

    pytest -m slow tests/ways_in/test_flash_attn_suite.py

Left out is what only CUDA has: races between splits, determinism of atomic additions, fp8.
"""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from flash_cases import (
    CACHED,
    LENGTHS,
    WIDTHS,
    allowed,
    arrays,
    asked,
    assert_within,
    attention,
    attention_in,
    exact,
    mask_and_bias,
    rotated,
)

import metalgen
from metalgen.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

SHARES = {"forward": 90, "varlen": 60, "kvcache": 110, "backward": 40}
ON_DEVICE = {"forward": 60, "varlen": 50, "kvcache": 80, "backward": 10}
SAMPLE = {"reference": 7, "device": 23}
"""One case in so many runs always."""


def every(kind: str) -> list[Any]:
    found = []
    for where, counts in (("reference", SHARES), ("device", ON_DEVICE)):
        for n in range(counts[kind]):
            marks = () if n % SAMPLE[where] == 0 else (pytest.mark.slow,)
            found.append(pytest.param(where, n, id=f"{where}-{n}", marks=marks))
    return found


@pytest.fixture
def on(where: str, request: pytest.FixtureRequest) -> str:
    return "reference" if where == "reference" else str(request.getfixturevalue("device"))


def heads_of(draw: random.Random) -> tuple[int, int]:
    return draw.choice(((3, 3), (4, 2), (6, 1), (4, 4)))


@pytest.mark.parametrize(("where", "n"), every("forward"))
def test_forward(on: str, n: int) -> None:
    draw = random.Random(n)
    dtype, width = draw.choice(("float16", "bfloat16")), WIDTHS[n % len(WIDTHS)]
    batch, (heads, kv_heads) = 2, heads_of(draw)
    q_len, kv_len = draw.choice(LENGTHS)
    form = draw.choice(("apart", "apart", "kv", "qkv"))
    if form == "qkv":
        kv_heads, kv_len = heads, q_len
    shapes = (batch, q_len, heads, width), *((batch, kv_len, kv_heads, width),) * 2
    q, k, v = arrays(draw, dtype, *shapes)
    ask = asked(draw, batch, heads, kv_len)
    ask.options = {"device": on, "deterministic": draw.random() < 0.5}
    if form == "qkv":
        out = flash_attn_qkvpacked_func(mx.stack([q, k, v], 2), **ask.keywords())
        lse = None
    elif form == "kv":
        out = flash_attn_kvpacked_func(q, mx.stack([k, v], 2), **ask.keywords())
        lse = None
    else:
        out, lse, _ = flash_attn_func(q, k, v, **ask.keywords(), return_attn_probs=True)
    assert isinstance(out, mx.array)
    expected, plain, log_sums = [], [], []
    for b in range(batch):
        seen, bias = mask_and_bias(ask, b, heads, q_len, kv_len)
        own = [exact(x[b]) for x in (q, k, v)]
        o, s = attention(*own, seen, bias, ask.softcap)
        expected.append(o)
        log_sums.append(s)
        plain.append(attention_in(dtype, *own, seen, bias, ask.softcap))
    assert_within(dtype, out, np.stack(expected), np.stack(plain))
    if lse is not None:
        assert_same_log_sums(lse, np.stack(log_sums))
    assert_ran(on)


def assert_same_log_sums(lse: mx.array, expected: Any) -> None:
    got = np.array(lse)
    assert lse.dtype == mx.float32
    assert got.shape == expected.shape
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(expected))
    there = ~np.isneginf(expected)
    np.testing.assert_allclose(got[there], expected[there], atol=2e-3)


def assert_ran(on: str) -> None:
    """What was asked for computed the calls, and nothing else."""
    found = metalgen.stats()
    assert (found.plain if on == "reference" else found.metalgen) == found.calls > 0, found


@pytest.mark.parametrize(("where", "n"), every("varlen"))
def test_varlen(on: str, n: int) -> None:
    draw = random.Random(1000 + n)
    dtype, width = draw.choice(("float16", "bfloat16")), draw.choice(WIDTHS)
    batch, (heads, kv_heads) = 3, heads_of(draw)
    most_q, most_k = draw.choice(LENGTHS)
    form = draw.choice(("apart", "apart", "pages", "used", "kv", "qkv"))
    lens_q = [draw.randrange(0, most_q + 1) for _ in range(batch)]
    lens_k = [draw.randrange(0, most_k + 1) for _ in range(batch)]
    if form == "qkv":
        kv_heads, lens_k, most_k = heads, lens_q, most_q
    starts_q, starts_k = (np.cumsum([0, *x]) for x in (lens_q, lens_k))
    shapes = (int(starts_q[-1]), heads, width), *((int(starts_k[-1]), kv_heads, width),) * 2
    q, k, v = arrays(draw, dtype, *shapes)
    ask = asked(draw, batch, heads, most_k)
    ask.options = {"device": on}
    cu_q, cu_k = (mx.array(x.tolist(), mx.int32) for x in (starts_q, starts_k))
    sizes = (cu_q, cu_k, max(lens_q), max(lens_k))
    used_q, used_k = lens_q, lens_k
    if form == "qkv":
        packed = mx.stack([q, k, v], 1)
        out: Any = flash_attn_varlen_qkvpacked_func(packed, cu_q, max(lens_q), **ask.keywords())
    elif form == "kv":
        out = flash_attn_varlen_kvpacked_func(q, mx.stack([k, v], 1), *sizes, **ask.keywords())
    elif form == "pages":
        size = draw.choice((8, 16, 12, 64, 256, 272, 512))
        pages, table = in_pages(draw, [k, v], starts_k, size)
        out = flash_attn_varlen_func(q, *pages, *sizes, **ask.keywords(), block_table=table)
    else:
        if form == "used":
            used_q = [draw.randrange(0, x + 1) for x in lens_q]
            used_k = [draw.randrange(0, x + 1) for x in lens_k]
            some = {"q": (used_q,), "k": (used_k,), "both": (used_q, used_k)}
            which = draw.choice(("q", "k", "both"))
            used_q = used_q if which != "k" else lens_q
            used_k = used_k if which != "q" else lens_k
            assert some[which]
            ask.options |= {"seqused_q": mx.array(used_q)} if which != "k" else {}
            ask.options |= {"seqused_k": mx.array(used_k)} if which != "q" else {}
        out = flash_attn_varlen_func(q, k, v, *sizes, **ask.keywords())
    expected, plain = np.zeros(q.shape), np.zeros(q.shape)
    for b in range(batch):
        seen, bias = mask_and_bias(ask, b, heads, used_q[b], used_k[b])
        rows, keys = (slice(s[b], s[b] + u[b]) for s, u in ((starts_q, used_q), (starts_k, used_k)))
        own = exact(q)[rows], exact(k)[keys], exact(v)[keys]
        expected[rows] = attention(*own, seen, bias, ask.softcap)[0]
        if used_k[b]:
            plain[rows] = attention_in(dtype, *own, seen, bias, ask.softcap)
    assert_within(dtype, out, expected, plain)
    if q.size and k.size:
        assert_ran(on)


def in_pages(
    draw: random.Random, caches: list[mx.array], starts: Any, size: int
) -> tuple[list[mx.array], mx.array]:
    """Packed rows as pages in any order, and the table; what is no row is 7."""
    lengths = np.diff(starts)
    columns = max(1, int(-(-lengths.max() // size)))
    count = len(lengths) * columns + 2
    order = draw.sample(range(count), len(lengths) * columns)
    table = np.array(order).reshape(len(lengths), columns)
    found = []
    for x in caches:
        pages = np.full((count, size, *x.shape[1:]), 7.0)
        for b, length in enumerate(lengths):
            rows = exact(x)[starts[b] : starts[b + 1]]
            for j in range(length):
                pages[table[b, j // size], j % size] = rows[j]
        found.append(mx.array(np.float32(pages)).astype(x.dtype))
    return found, mx.array(table.tolist(), mx.int32)


@pytest.mark.parametrize(("where", "n"), every("kvcache"))
def test_kvcache(on: str, n: int) -> None:
    draw = random.Random(2000 + n)
    dtype, width = draw.choice(("float16", "bfloat16")), draw.choice((59, 64, 96, 128, 160, 256))
    batch, (heads, kv_heads) = 2, heads_of(draw)
    q_len, kv_len = draw.choice(CACHED)
    paged = draw.random() < 0.4
    by_index = not paged and draw.random() < 0.4
    fresh = draw.random() < 0.7
    new = (q_len if draw.random() < 0.6 else draw.randrange(1, q_len + 2)) if fresh else 0
    entries = batch * 2 if by_index else batch
    kv_len = max(kv_len, new + 1)
    ask = asked(draw, batch, heads, kv_len)
    shape = (entries, kv_len, kv_heads, width)
    q, k_cache, v_cache, k, v = arrays(
        *(draw, dtype, (batch, q_len, heads, width), shape, shape),
        *((batch, new, kv_heads, width),) * 2,
    )
    index = draw.sample(range(entries), batch)
    lengths = [draw.randrange(0, kv_len - new + 1) for _ in range(batch)]
    pads = [draw.randrange(0, x + 1) for x in lengths] if draw.random() < 0.4 else None
    keywords: dict[str, Any] = {**ask.keywords(), "device": on, "num_splits": draw.choice((0, 1))}
    turned = draw.choice((0, width // 2, width)) // 16 * 16 if fresh else 0
    before = [exact(x) for x in (k_cache, v_cache)]
    rows_q, rows_k, rows_v = (exact(x) for x in (q, k, v))
    if turned:
        angle = np.random.default_rng(n).random((kv_len + q_len, turned // 2)) * 2 * np.pi
        tables = mx.array(np.float32(np.cos(angle))), mx.array(np.float32(np.sin(angle)))
        keywords |= {"rotary_cos": tables[0], "rotary_sin": tables[1]}
        interleaved = keywords["rotary_interleaved"] = draw.random() < 0.5
        one = not ask.causal and max(ask.window_size) < 0
        for b in range(batch):
            how = *(exact(x) for x in tables), interleaved, dtype
            cos, sin = how[:2]
            at = lengths[b] + np.arange(q_len) * (not one)
            rows_q[b] = rotated(rows_q[b], cos, sin, at, interleaved, dtype)
            at = lengths[b] + np.arange(new)
            rows_k[b] = rotated(rows_k[b], cos, sin, at, interleaved, dtype)
    if fresh:
        keywords |= {"k": k, "v": v}
    keywords["cache_seqlens"] = mx.array(lengths)
    if len(set(lengths)) == 1 and draw.random() < 0.5:
        keywords["cache_seqlens"] = lengths[0]
    if pads is not None:
        keywords["cache_leftpad"] = mx.array(pads)
    if by_index:
        keywords["cache_batch_idx"] = mx.array(index)
    caches, table = [k_cache, v_cache], None
    if paged:
        size = draw.choice((16, 8, 12, 64, 256, 512))
        starts = np.arange(batch + 1) * kv_len
        flat = [x.reshape(-1, *x.shape[2:]) for x in caches]
        caches, table = in_pages(draw, flat, starts, size)
        keywords["block_table"] = table
    out, lse = flash_attn_with_kvcache(q, *caches, **keywords, return_softmax_lse=True)

    owner = index if by_index else list(range(batch))
    expected, plain, log_sums = [], [], []
    for b in range(batch):
        for cache, rows in zip(before, (rows_k, rows_v), strict=True):
            cache[owner[b], lengths[b] : lengths[b] + new] = rows[b]
        stop = lengths[b] + new
        seen, bias = mask_and_bias(ask, b, heads, q_len, stop, 0 if pads is None else pads[b])
        own = rows_q[b], *(cache[owner[b], :stop] for cache in before)
        o, s = attention(*own, seen, bias, ask.softcap)
        expected.append(o)
        log_sums.append(s)
        empty = not stop
        plain.append(o if empty else attention_in(dtype, *own, seen, bias, ask.softcap))
    assert_within(dtype, out, np.stack(expected), np.stack(plain), 3.0)
    assert_same_log_sums(lse, np.stack(log_sums))
    for got, cache in zip(caches, before, strict=True):  # in place, and nothing else has changed
        if table is not None:
            numbers: Any = table.tolist()
            whole = exact(got)[numbers].reshape(batch, -1, *cache.shape[2:])[:, :kv_len]
        else:
            whole = exact(got)
        step = {"float16": 2e-3, "bfloat16": 2e-2}[dtype] if turned else 0
        np.testing.assert_allclose(whole, cache, rtol=step, atol=step)
    assert_ran(on)


@pytest.mark.parametrize(("where", "n"), every("backward"))
def test_backward(on: str, n: int) -> None:
    draw = random.Random(3000 + n)
    dtype, width = draw.choice(("float16", "bfloat16")), draw.choice((32, 59, 64, 96, 128))
    batch, (heads, kv_heads) = 2, heads_of(draw)
    q_len, kv_len = draw.choice(LENGTHS)
    shapes = (batch, q_len, heads, width), *((batch, kv_len, kv_heads, width),) * 2
    q, k, v = arrays(draw, dtype, *shapes)
    (g,) = arrays(draw, dtype, shapes[0])
    ask = asked(draw, batch, heads, kv_len)

    def call(q: mx.array, k: mx.array, v: mx.array) -> Any:
        return flash_attn_func(q, k, v, **ask.keywords(), device=on)

    _, got = mx.vjp(call, [q, k, v], [g])
    expected, plain = gradients(ask, dtype, q, k, v, g)
    for x, y, z in zip(got, expected, plain, strict=True):
        error = np.abs(exact(x) - y).max()
        assert error <= allowed(dtype, y, z, 3.0), f"{error:.1e}"


def gradients(ask: Any, dtype: str, *arrays: mx.array) -> tuple[list[Any], list[Any]]:
    """By the chain rule, written out in float64; and by MLX of plain operations that round."""
    q, k, v, g = (exact(x) for x in arrays)
    batch, q_len, heads, width = q.shape
    each, kv_len = heads // k.shape[2], k.shape[1]
    found = [np.zeros_like(x) for x in (q, k, v)]
    scale = width**-0.5
    masks = [mask_and_bias(ask, b, heads, q_len, kv_len) for b in range(batch)]
    for b, (seen, bias) in enumerate(masks):
        for h in range(heads):
            own_q, own_k, own_v = q[b, :, h], k[b, :, h // each], v[b, :, h // each]
            s = own_q @ own_k.T * scale
            slope = np.ones_like(s)
            if ask.softcap:
                t = np.tanh(s / ask.softcap)
                s, slope = ask.softcap * t, 1 - t**2
            s = np.where(seen, s + bias[h], -np.inf)
            peak = s.max(axis=1, keepdims=True)
            p = np.exp(s - np.where(np.isneginf(peak), 0, peak))
            total = p.sum(axis=1, keepdims=True)
            p = p / np.where(total == 0, 1, total)
            dp = g[b, :, h] @ own_v.T
            ds = p * (dp - (p * dp).sum(axis=1, keepdims=True)) * slope * scale
            found[0][b, :, h] = ds @ own_k
            found[1][b, :, h // each] += ds.T @ own_q
            found[2][b, :, h // each] += p.T @ g[b, :, h]

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        keys, values = (mx.repeat(x, each, axis=2).swapaxes(1, 2) for x in (k, v))
        s = (q.swapaxes(1, 2) * scale) @ keys.swapaxes(2, 3)
        if ask.softcap:
            s = mx.tanh(s / ask.softcap) * ask.softcap
        s = s + mx.array(np.float32([bias for _, bias in masks])).astype(q.dtype)
        there = mx.array(np.array([seen for seen, _ in masks]))[:, None]
        s = mx.where(there, s, mx.array(-1e4, q.dtype))
        p = mx.where(there, mx.softmax(s, axis=-1), mx.array(0, q.dtype))
        return (p @ values).swapaxes(1, 2)

    _, rough = mx.vjp(plain, list(arrays[:3]), [arrays[3]])
    return found, [exact(x) for x in rough]
