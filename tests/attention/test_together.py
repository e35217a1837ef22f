"""Features combined, and what holds for calls of all kinds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attention_calls import (
    LENGTHS_K,
    LENGTHS_Q,
    TABLE,
    WIDTH,
    arrays,
    assert_close,
    dequantized,
    in_pages,
    packed,
    sdpa,
    turned,
)

import metalgen
from metalgen import (
    ArgumentError,
    Rope,
    alibi_slopes,
    attention,
    create_block_mask,
    flex_attention,
)
from metalgen.calls import resolve
from metalgen.testing.devices import normal


def test_a_quantized_paged_cache_with_sinks_a_window_and_rotary_queries(where: str) -> None:
    """Everything of a gpt-oss-like decoding step at once."""
    q, k, v = arrays(1, 32, dtype="float16")
    lengths, sinks = [19, 32], normal((4,), seed=5)
    how: dict[str, Any] = {"group_size": 32, "bits": 8}
    triples = [mx.quantize(x, **how) for x in (k, v)]
    out = attention(
        q,
        *(tuple(in_pages(part) for part in triple) for triple in triples),
        causal=True,
        window_left=9,
        sinks=sinks,
        rope=Rope(base=150000.0),
        block_table=mx.array(TABLE),
        kv_lens=mx.array(lengths),
        device=where,
    )
    k, v = (dequantized(triple, **how) for triple in triples)
    for n, length in enumerate(lengths):
        first = length - 10
        query = turned(q[n : n + 1], length - 1, base=150000.0)
        own = (x[n : n + 1, :, first:length] for x in (k, v))
        assert_close(out[n : n + 1], sdpa(query, *own, sinks=sinks), tolerance=2e-3)


@pytest.mark.parametrize(("first", "count"), [(0, 5), (11, 20), (36, 1)])
def test_a_block_of_a_longer_sequence_has_the_rows_that_the_whole_has(
    where: str, first: int, count: int
) -> None:
    """Masks, slopes, dropout, functions and rotary embedding count its queries from `q_offset`."""
    q, k, v = arrays(37, 37)
    table = normal((40, 40), seed=5)
    options: dict[str, Any] = {
        "score_mod": lambda s, b, h, i, j: s + table[i, j],
        "mask_mod": lambda b, h, i, j: (i + j + b) % 5 > 0,
        "causal": True,
        "window_left": 15,
        "alibi_slopes": alibi_slopes(4),
        "dropout": 0.3,
        "dropout_key": mx.random.key(3),
        "rope": Rope(),
        "device": where,
    }
    whole = flex_attention(q, k, v, **options)[:, :, first : first + count]
    block = q[:, :, first : first + count]
    for offset in (first, mx.array([first, first])):
        assert_close(flex_attention(block, k, v, q_offset=offset, **options), whole, 3e-6)
    without = {name: x for name, x in options.items() if name not in ("score_mod", "mask_mod")}
    whole = attention(q, k, v, **without)[:, :, first : first + count]
    part = attention(block, k, v, q_offset=first, **without | {"rope": Rope(offset=first)})
    assert_close(part, whole, 3e-6)


def test_each_sequence_stands_where_its_own_offset_says(where: str) -> None:
    q, k, v, cu_q, cu_k = packed()
    offsets = mx.array([3, 0, -4, 100])
    keywords: dict[str, Any] = {"causal": True, "q_offset": offsets, "device": where}
    out = attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **keywords)
    for n, offset in enumerate(offsets.tolist()):
        (a, b), (c, d) = ((int(cu[n]), int(cu[n + 1])) for cu in (cu_q, cu_k))
        seen = mx.arange(d - c) <= mx.arange(b - a)[:, None] + offset
        none = 4 if offset == -4 else 0  # queries before all keys
        own = q[:, :, a + none : b], k[:, :, c:d], v[:, :, c:d]
        assert_close(out[:, :, a + none : b], sdpa(*own, mask=seen[none:]))
        assert not np.array(out[:, :, a : a + none]).any()


def test_a_block_mask_takes_no_offset() -> None:
    q, k, v = arrays(8, 8)
    blocks = create_block_mask(lambda b, h, i, j: j <= i, None, None, 8, 8)
    with pytest.raises(ArgumentError, match="^block_mask: expected its default with q_offset"):
        flex_attention(q, k, v, block_mask=blocks, q_offset=3)


def test_functions_of_the_users_own_combine_with_the_rest(where: str) -> None:
    q, k, v, cu_q, cu_k = packed()
    keywords: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "device": where}
    table, slopes = normal((4, 4), seed=5), alibi_slopes(4)
    out = flex_attention(
        q,
        k,
        v,
        lambda s, b, h, i, j: s + table[b, h] * (i - j),
        lambda b, h, i, j: j <= i + b,
        alibi_slopes=slopes,
        sinks=slopes,
        **keywords,
    )
    i, j = 0, 0
    for n, (rows, keys) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        if rows:
            y, x = mx.arange(rows)[:, None], mx.arange(keys)
            bias = table[n][:, None, None] * (y - x)
            bias = bias - slopes[:, None, None] * mx.abs(y + keys - rows - x)
            bias = mx.where(x <= y + n, bias, -mx.inf)
            own = q[:, :, i : i + rows], k[:, :, j : j + keys], v[:, :, j : j + keys]
            assert_close(out[:, :, i : i + rows], sdpa(*own, mask=bias, sinks=slopes))
        i, j = i + rows, j + keys


def test_a_block_mask_over_pages(where: str) -> None:
    q, k, v = arrays(20, 32)
    blocks = metalgen.create_block_mask(lambda b, h, i, j: (i // 8) == (j // 8), None, None, 20, 32)
    out = flex_attention(
        q,
        in_pages(k),
        in_pages(v),
        block_mask=blocks,
        kv_lens=mx.array([24, 32]),
        block_table=mx.array(TABLE),
        device=where,
    )
    seen = mx.arange(20)[:, None] // 8 == mx.arange(32) // 8
    assert_close(out, sdpa(q, k, v, mask=seen))


def test_bounds_on_a_dispatch_change_nothing(where: str) -> None:
    q, k, v = arrays(150, 300)
    expected = sdpa(q, k, v, mask="causal")
    assert_close(attention(q, k, v, causal=True, max_work=1 << 16, device=where), expected)


@pytest.mark.parametrize("q_len", [1, 70])
def test_a_deterministic_row_has_the_same_bits_in_any_batch(device: str, q_len: int) -> None:
    q, k, v = arrays(q_len, 300, dtype="float16", batch=3)
    keywords: dict[str, Any] = {"deterministic": True, "causal": True, "device": device}
    whole = attention(q, k, v, kv_lens=mx.array([300, 120, 7]), **keywords)
    for n, length in enumerate([300, 120, 7]):
        alone = attention(
            q[n : n + 1], k[n : n + 1], v[n : n + 1], kv_lens=mx.array([length]), **keywords
        )
        np.testing.assert_array_equal(np.array(alone), np.array(whole[n : n + 1]))


def test_a_deterministic_row_has_the_same_bits_in_any_pack(device: str) -> None:
    lengths = (70, 5, 1)
    q, k, v = (normal((1, heads, sum(lengths), WIDTH), "float16", heads) for heads in (4, 2, 1))
    v = mx.repeat(v, 2, axis=1)
    keywords: dict[str, Any] = {"deterministic": True, "causal": True, "device": device}
    starts = np.cumsum([0, *lengths]).tolist()
    whole = attention(q, k, v, cu_seqlens_q=mx.array(starts), **keywords)
    for a, b in pairwise(starts):
        own = (x[:, :, a:b] for x in (q, k, v))
        alone = attention(*own, cu_seqlens_q=mx.array([0, b - a]), **keywords)
        np.testing.assert_array_equal(np.array(alone), np.array(whole[:, :, a:b]))


def test_a_call_with_everything_stays_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, cu_q, cu_k = packed()
    keywords: dict[str, Any] = {
        "rope": Rope(),
        "sinks": alibi_slopes(4),
        "dropout": 0.5,
        "device": "reference",
    }
    expected = attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, dropout_key=mx.random.key(1), **keywords
    )
    monkeypatch.setattr(mx, "eval", lambda *_: pytest.fail("mx.eval on the way of a call"))

    def compiled(q: mx.array, cu_q: mx.array, cu_k: mx.array, key: mx.array) -> mx.array:
        return attention(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, dropout_key=key, **keywords)

    got = mx.compile(compiled)(q, cu_q.astype(mx.int64), cu_k, mx.random.key(1))
    assert_close(got, expected)


def test_one_kernel_serves_all_contents(device: str) -> None:
    q, k, v = arrays(3, 40)
    for seed in (1, 2):
        lengths = mx.array([20 * seed, 11])
        attention(q, k, v, kv_lens=lengths, sinks=normal((4,), seed=seed), device=device)
    assert len(resolve._known) == 1
    (kernel,) = resolve._known.values()
    assert kernel.backend == "metalgen", kernel.explain()


def test_a_batch_may_be_larger_than_what_tuning_knows() -> None:
    x = mx.broadcast_to(normal((1, 8, 1, 8), "float16"), (1 << 18, 8, 1, 8))
    assert_close(attention(x, x, x, device="reference")[-1:], x[-1:])  # one key: its value
