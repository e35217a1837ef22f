"""Every feature as users call it, against MLX's own attention of what the feature stands for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import Rope, alibi_slopes, attention, dispatch, flex_attention, varlen_attention
from metalgen.testing.devices import normal
from metalgen.verify import relative_error

WIDTH, SCALE = 32, 32**-0.5


@pytest.fixture(params=["reference", "kernel"])
def where(request: pytest.FixtureRequest, device: str) -> str:
    """Both ways: by plain MLX, and by the kernels of the device under test."""
    return "reference" if request.param == "reference" else device


@pytest.fixture(autouse=True)
def no_fallback() -> Iterator[None]:
    """What a device with kernels was asked for, its kernels computed."""
    dispatch.forget_kernels()
    yield
    for kernel in dispatch._known.values():
        assert (kernel.backend == "plain") == (kernel.device == "reference"), kernel.explain()


def arrays(
    q_len: int = 21, kv_len: int = 37, *, dtype: str = "float32", batch: int = 2
) -> tuple[mx.array, mx.array, mx.array]:
    q = normal((batch, 4, q_len, WIDTH), dtype, 1)
    k, v = (normal((batch, 2, kv_len, WIDTH), dtype, seed) for seed in (2, 3))
    return q, k, v


def sdpa(q: mx.array, k: mx.array, v: mx.array, **keywords: Any) -> mx.array:
    """MLX's own attention, in float32."""
    if isinstance(keywords.get("mask"), mx.array) and keywords["mask"].dtype != mx.bool_:
        keywords["mask"] = keywords["mask"].astype(mx.float32)
    if keywords.get("sinks") is not None:
        keywords["sinks"] = keywords["sinks"].astype(mx.float32)
    q, k, v = (x.astype(mx.float32) for x in (q, k, v))
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, **keywords)


def assert_close(got: mx.array, expected: mx.array, tolerance: float | None = None) -> None:
    tolerance = tolerance or {mx.float32: 3e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[got.dtype]
    assert got.shape == expected.shape
    error = relative_error(got, np.array(expected.astype(mx.float32), np.float64))
    assert error < tolerance, f"{error:.1e} of {tolerance:.0e}"


def seen_by(q_len: int, kv_len: int) -> mx.array:
    """Causal, aligned at the lower right."""
    return mx.arange(kv_len) <= mx.arange(q_len)[:, None] + (kv_len - q_len)


@pytest.mark.parametrize("shape", [(21, 37), (1, 37), (2, 1, 1, 37), (1, 4, 21, 1), (2, 4, 21, 37)])
def test_a_mask_of_booleans_with_fewer_axes_or_ones(where: str, shape: tuple[int, ...]) -> None:
    q, k, v = arrays()
    mask = normal(shape, seed=5) > -0.8
    mask = mask | (mx.arange(shape[-1]) == 0) if shape[-1] > 1 else mx.ones(shape, mx.bool_)
    assert_close(attention(q, k, v, mask=mask, device=where), sdpa(q, k, v, mask=mask))


def test_a_mask_named_causal_is_the_causal_one(where: str) -> None:
    q, k, v = arrays()
    expected = sdpa(q, k, v, mask="causal")
    assert_close(attention(q, k, v, mask="causal", device=where), expected)
    assert_close(attention(q, k, v, causal=True, mask="causal", device=where), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_mask_of_floats_is_a_bias_and_any_float_will_do(where: str, dtype: str) -> None:
    q, k, v = arrays(dtype="bfloat16")
    bias = normal((4, 1, 37), dtype, 5)
    for name in ("mask", "bias"):
        out = attention(q, k, v, device=where, **{name: bias})  # type: ignore[arg-type]
        assert out.dtype == mx.bfloat16
        assert_close(out, sdpa(q, k, v, mask=bias))


def test_bias_mask_causal_and_softcap_together(where: str) -> None:
    q, k, v = arrays()
    bias, mask = normal((1, 4, 1, 37), seed=5), normal((2, 1, 21, 37), seed=6) > -1
    mask = mask | (mx.arange(37) == 0)
    out = attention(
        q, k, v, softcap=2.0, bias=bias, mask=mask, causal=True, scale=0.3, device=where
    )
    repeated = (mx.repeat(x, 2, axis=1) for x in (k, v))
    k, v = repeated
    scores = 2 * mx.tanh(0.3 * q @ k.swapaxes(-1, -2) / 2) + bias
    scores = mx.where(mask & seen_by(21, 37), scores, -mx.inf)
    assert_close(out, mx.softmax(scores, axis=-1) @ v)


def test_the_slopes_of_alibi_are_those_of_its_authors() -> None:
    halves = [2.0**-n for n in range(1, 9)]
    np.testing.assert_allclose(np.array(alibi_slopes(8)), halves, rtol=1e-6)
    twelve = [*halves, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(np.array(alibi_slopes(12)), twelve, rtol=1e-6)
    np.testing.assert_allclose(np.array(alibi_slopes(1)), [2.0**-8], rtol=1e-6)
    with pytest.raises(metalgen.ArgumentError, match="heads: expected an integer from 1"):
        alibi_slopes(0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_alibi_lowers_scores_by_the_distance(where: str, dtype: str) -> None:
    q, k, v = arrays()
    slopes = alibi_slopes(4).astype(getattr(mx, dtype))
    distance = mx.abs(mx.arange(21)[:, None] + 16 - mx.arange(37))
    expected = sdpa(q, k, v, mask=-slopes.astype(mx.float32)[:, None, None] * distance)
    assert_close(attention(q, k, v, alibi_slopes=slopes, device=where), expected)


def test_sinks_take_part_in_the_softmax_and_in_the_log_sum_exp(where: str) -> None:
    q, k, v = arrays()
    sinks = normal((4,), "bfloat16", 7) + 2
    out, lse = attention(q, k, v, sinks=sinks, causal=True, return_lse=True, device=where)
    assert_close(out, sdpa(q, k, v, mask="causal", sinks=sinks))
    _, without = attention(q, k, v, causal=True, return_lse=True, device=where)
    expected = np.logaddexp(np.array(without), np.array(sinks.astype(mx.float32))[:, None])
    np.testing.assert_allclose(np.array(lse), expected, rtol=1e-5, atol=1e-5)


def test_dropout_drops_its_share_and_divides_by_the_rest(where: str) -> None:
    q, k, _ = arrays(64, 32)
    v = mx.broadcast_to(mx.eye(32), (2, 2, 32, 32))  # the output is the matrix of weights
    whole = np.array(attention(q, k, v, device=where))
    key = mx.random.key(11)
    got = np.array(attention(q, k, v, dropout=0.25, dropout_key=key, device=where))
    dropped = got == 0
    np.testing.assert_allclose(got[~dropped], whole[~dropped] / 0.75, rtol=1e-4)
    # 16,384 draws: four standard deviations are 0.0135.
    assert abs(dropped.mean() - 0.25) < 0.0135
    again = attention(q, k, v, dropout=0.25, dropout_key=key, device=where)
    np.testing.assert_array_equal(np.array(again) == 0, dropped)
    other = attention(q, k, v, dropout=0.25, dropout_key=mx.random.key(12), device=where)
    both = (np.array(other) == 0) & dropped
    assert abs(both.mean() - 0.0625) < 0.0076  # independent: 0.25 squared
    np.testing.assert_array_equal(
        np.array(attention(q, k, v, dropout_key=key, device=where)), whole
    )  # nothing is dropped without a probability


def test_dropout_without_a_key_follows_the_seed_of_mlx() -> None:
    q, k, v = arrays()

    def drawn(seed: int | None) -> list[Any]:
        if seed is not None:
            mx.random.seed(seed)
        return np.array(attention(q, k, v, dropout=0.5, device="reference")).tolist()

    first = drawn(3)
    assert drawn(None) != first
    assert drawn(3) == first


def test_every_device_drops_the_same_weights(device: str) -> None:
    q, k, v = arrays()
    keywords: dict[str, Any] = {"dropout": 0.5, "dropout_key": mx.random.key(4)}
    expected = attention(q, k, v, device="reference", **keywords)
    assert_close(attention(q, k, v, device=device, **keywords), expected)


LENGTHS_Q, LENGTHS_K = (5, 0, 11, 1), (9, 3, 11, 7)


def packed() -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    q, k, v = arrays(sum(LENGTHS_Q) + 2, sum(LENGTHS_K) + 3, batch=1)
    cu_q, cu_k = (mx.array(np.cumsum([0, *x]).tolist()) for x in (LENGTHS_Q, LENGTHS_K))
    return q, k, v, cu_q, cu_k


def one_by_one(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """What packed sequences should give, causally, and zeros in the rows after them."""
    parts, i, j = [], 0, 0
    for rows, keys in zip(LENGTHS_Q, LENGTHS_K, strict=True):
        own = q[:, :, i : i + rows], k[:, :, j : j + keys], v[:, :, j : j + keys]
        if rows:
            parts.append(sdpa(*own, mask="causal"))
        i, j = i + rows, j + keys
    return mx.concatenate([*parts, mx.zeros((1, 4, q.shape[2] - i, WIDTH))], axis=2)


def test_packed_sequences_do_not_see_each_other(where: str) -> None:
    q, k, v, cu_q, cu_k = packed()
    expected = one_by_one(q, k, v)
    for kind in (mx.int32, mx.int64, mx.uint32):
        out = attention(
            q,
            k,
            v,
            cu_seqlens_q=cu_q.astype(kind),
            cu_seqlens_k=cu_k.astype(kind),
            causal=True,
            device=where,
        )
        assert_close(out, expected)


def test_packed_sequences_in_the_layout_of_flash_attn(where: str) -> None:
    q, k, v, cu_q, cu_k = packed()
    expected, expected_lse = attention(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=True, return_lse=True, device=where
    )
    rows = [x[0].swapaxes(0, 1) for x in (q, k, v)]
    out, lse = varlen_attention(
        *rows, cu_q, cu_k, 11, 11, causal=True, return_lse=True, device=where
    )
    assert out.shape == (q.shape[2], 4, WIDTH)
    assert_close(out.swapaxes(0, 1)[None], expected)
    np.testing.assert_allclose(np.array(lse), np.array(expected_lse[0]), rtol=1e-5, atol=1e-5)
    assert_close(
        varlen_attention(*rows, cu_q, cu_k, causal=True, device=where), out, tolerance=3e-6
    )


def test_packed_queries_alone_say_where_their_own_keys_are(where: str) -> None:
    q, k, v = arrays(16, 16, batch=1)
    cu = mx.array([0, 9, 16])
    out = attention(q, k, v, cu_seqlens_q=cu, device=where)
    parts = [sdpa(q[:, :, s], k[:, :, s], v[:, :, s]) for s in (slice(0, 9), slice(9, 16))]
    assert_close(out, mx.concatenate(parts, axis=2))


@pytest.mark.parametrize("causal", [False, True])
def test_lengths_hide_the_rest_of_a_cache(where: str, causal: bool) -> None:
    q, k, v = arrays(5, 37)
    lengths = [37, 12]
    out = attention(q, k, v, kv_lens=mx.array(lengths), causal=causal, device=where)
    for n, length in enumerate(lengths):
        own = q[n : n + 1], k[n : n + 1, :, :length], v[n : n + 1, :, :length]
        assert_close(out[n : n + 1], sdpa(*own, mask="causal" if causal else None))


PAGE, TABLE = 8, [[6, 1, 3, -1], [0, 5, 4, 2]]


def in_pages(x: mx.array) -> mx.array:
    """Rows ``(2, H, 32, ...)`` in pages of 8, as TABLE has them; the other page holds nonsense."""
    pages = mx.full((7, x.shape[1], PAGE, *x.shape[3:]), 9).astype(x.dtype)
    for n, row in enumerate(TABLE):
        for m, page in enumerate(row):
            if page >= 0:
                pages[page] = x[n, :, m * PAGE : (m + 1) * PAGE]
    return pages


@pytest.mark.parametrize("q_len", [1, 6])
def test_pages_are_found_by_the_table(where: str, q_len: int) -> None:
    q, k, v = arrays(q_len, 32)
    lengths = [19, 32]
    keywords: dict[str, Any] = {"kv_lens": mx.array(lengths), "causal": True, "device": where}
    table = mx.array(TABLE, mx.int64)
    out = attention(q, in_pages(k), in_pages(v), block_table=table, **keywords)
    assert_close(out, attention(q, k, v, **keywords))
    for n, length in enumerate(lengths):
        own = q[n : n + 1], k[n : n + 1, :, :length], v[n : n + 1, :, :length]
        assert_close(out[n : n + 1], sdpa(*own, mask="causal"))


def test_pages_for_packed_queries_in_either_layout(where: str) -> None:
    _, k, v = arrays(1, 32)
    q = normal((1, 4, 8, WIDTH), seed=1)
    cu_q, table, lengths = mx.array([0, 3, 8]), mx.array(TABLE), mx.array([19, 32])
    pages = in_pages(k), in_pages(v)
    keywords: dict[str, Any] = {"causal": True, "block_table": table, "device": where}
    out = attention(q, *pages, cu_seqlens_q=cu_q, kv_lens=lengths, **keywords)
    for n, (a, b, length) in enumerate([(0, 3, 19), (3, 8, 32)]):
        own = q[:, :, a:b], k[n : n + 1, :, :length], v[n : n + 1, :, :length]
        assert_close(out[:, :, a:b], sdpa(*own, mask="causal"))
    rows = q[0].swapaxes(0, 1), *(x.swapaxes(1, 2) for x in pages)
    for lengths_keywords in (
        {"kv_lens": lengths},
        {"cu_seqlens_k": mx.array([0, 19, 51])},  # flash-attn's way
    ):
        got = varlen_attention(*rows, cu_q, **lengths_keywords, **keywords)
        assert_close(got.swapaxes(0, 1)[None], out, tolerance=3e-6)


def dequantized(parts: list[mx.array], **how: int) -> mx.array:
    """Computed in float32 and rounded once; MLX's on a CPU rounds products in half, too."""
    packed, scales, biases = parts
    wide = (x.astype(mx.float32) for x in (scales, biases))
    return mx.dequantize(packed, *wide, **how).astype(scales.dtype)


@pytest.mark.parametrize(("bits", "group"), [(8, 32), (4, 32), (8, 64), (4, 64), (8, 128)])
def test_quantized_keys_and_values_say_their_bits_and_groups_themselves(
    where: str, bits: int, group: int
) -> None:
    q = normal((2, 4, 3, 128), "float16", 1)
    k, v = (normal((2, 2, 40, 128), "float16", seed) for seed in (2, 3))
    how: dict[str, Any] = {"group_size": group, "bits": bits}
    triples = [mx.quantize(x, **how) for x in (k, v)]
    expected = sdpa(q, *(dequantized(x, **how) for x in triples))
    for kind in (tuple, list):
        out = attention(q, *(kind(x) for x in triples), scale=SCALE, device=where)
        assert_close(out, expected)


ROPES: dict[str, dict[str, Any]] = {
    "halves": {},
    "pairs": {"style": "pairs"},
    "partial": {"dims": 20},
    "partial pairs": {"dims": 12, "style": "pairs", "base": 500.0},
    "scaled": {"scale": 0.125},
    "periods": {"freqs": mx.array([1.5**n for n in range(16)])},
}


def turned(x: mx.array, offset: int | mx.array, **rope: Any) -> mx.array:
    """By MLX's own rotary embedding."""
    freqs = rope.get("freqs")
    return mx.fast.rope(
        x,
        rope.get("dims", x.shape[3]),
        traditional=rope.get("style") == "pairs",
        base=rope.get("base", 10000.0) if freqs is None else None,
        scale=rope.get("scale", 1.0),
        offset=offset,
        freqs=freqs,
    )


@pytest.mark.parametrize("name", ROPES)
def test_queries_turn_as_by_mlxs_own_rope(where: str, name: str) -> None:
    q, k, v = arrays()
    for offset, given in (
        (16, None),  # by default the last query stands at the last key
        (3, 3),
        (7, mx.array(7)),
        (mx.array([5, 9]), mx.array([5, 9], mx.int64)),
    ):
        rope = Rope(**ROPES[name], offset=given)
        expected = sdpa(turned(q, offset, **ROPES[name]), k, v)
        assert_close(attention(q, k, v, rope=rope, device=where), expected, tolerance=2e-5)


def test_queries_stand_at_the_end_of_each_sequences_keys(where: str) -> None:
    q, k, v = arrays(2, 37)
    lengths = mx.array([37, 12])
    out = attention(q, k, v, rope=Rope(), kv_lens=lengths, causal=True, device=where)
    by_hand = turned(q, mx.array([35, 10]))
    expected = attention(by_hand, k, v, kv_lens=lengths, causal=True, device="reference")
    assert_close(out, expected, tolerance=2e-5)
    q, k, v, cu_q, cu_k = packed()
    keywords: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": True}
    out = attention(q, k, v, rope=Rope(), device=where, **keywords)
    starts = np.cumsum([0, *LENGTHS_Q])
    by_hand = mx.concatenate(
        [
            *(
                turned(q[:, :, s : s + rows], keys - rows)
                for s, rows, keys in zip(starts.tolist(), LENGTHS_Q, LENGTHS_K, strict=False)
                if rows
            ),
            q[:, :, sum(LENGTHS_Q) :],
        ],
        axis=2,
    )
    expected = attention(by_hand, k, v, device="reference", **keywords)
    assert_close(out, expected, tolerance=2e-5)


def test_the_absorbed_form_of_multi_head_latent_attention(where: str) -> None:
    """One latent head of width 576 for all queries; its first 512 columns are the values."""
    q = normal((1, 16, 2, 576), "float16", 1)
    latent = normal((1, 1, 70, 576), "float16", 2)
    out = attention(q, latent, latent[..., :512], causal=True, scale=192**-0.5, device=where)
    own = (x.astype(mx.float32) for x in (q, latent, latent[..., :512]))
    expected = mx.fast.scaled_dot_product_attention(*own, scale=192**-0.5, mask="causal")
    assert_close(out, expected)


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


def test_gradients_reach_everything_that_adds_to_scores(where: str) -> None:
    q, k, v = arrays(5, 9)
    given = [q, k, v, normal((4, 5, 9), seed=5), alibi_slopes(4), normal((4,), seed=6)]
    distance = mx.abs(mx.arange(5)[:, None] + 4 - mx.arange(9))

    def loss(q: mx.array, k: mx.array, v: mx.array, b: mx.array, a: mx.array, s: mx.array) -> Any:
        out, lse = attention(
            q, k, v, bias=b, alibi_slopes=a, sinks=s, return_lse=True, device=where
        )
        return (out * out).sum() + lse.sum()

    def plain(q: mx.array, k: mx.array, v: mx.array, b: mx.array, a: mx.array, s: mx.array) -> Any:
        k, v = (mx.repeat(x, 2, axis=1) for x in (k, v))
        scores = q @ k.swapaxes(-1, -2) * SCALE - a[:, None, None] * distance + b
        sink = mx.broadcast_to(s[:, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, sink], axis=-1)
        out = mx.softmax(scores, axis=-1)[..., :-1] @ v
        return (out * out).sum() + mx.logsumexp(scores, axis=-1).sum()

    got = mx.grad(loss, argnums=tuple(range(6)))(*given)
    wanted = mx.grad(plain, argnums=tuple(range(6)))(*given)
    for a, b in zip(got, wanted, strict=True):
        assert np.abs(np.array(b)).max() > 1e-3
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-4, atol=2e-5)


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
    assert len(dispatch._known) == 1
    (kernel,) = dispatch._known.values()
    assert kernel.backend == "metalgen", kernel.explain()
