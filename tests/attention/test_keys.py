"""Where keys and queries come from: packs, lengths, pages, bits, positions; against MLX's own."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attention_calls import (
    LENGTHS_K,
    LENGTHS_Q,
    SCALE,
    TABLE,
    WIDTH,
    arrays,
    assert_close,
    dequantized,
    in_pages,
    packed,
    sdpa,
    seen_by,
    turned,
)

from metalgen import KVCache, Rope, attention, varlen_attention
from metalgen.errors import ArgumentError
from metalgen.testing.devices import normal


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


@pytest.mark.parametrize("q_len", [1, 70])
@pytest.mark.parametrize("causal", [False, True])
def test_starts_hide_what_stands_before_a_sequence(where: str, causal: bool, q_len: int) -> None:
    """Of a batch that is padded on the left: queries and keys keep their numbers."""
    q, k, v = arrays(q_len, 90)
    starts = [0, 41]
    hidden = mx.arange(90)[:, None] < mx.array(starts)[:, None, None, None]
    k, v = (mx.where(hidden, mx.nan, x) for x in (k, v))  # whatever lies there
    out = attention(q, k, v, kv_starts=mx.array(starts), causal=causal, device=where)
    for n, start in enumerate(starts):
        seen = seen_by(q_len, 90)[:, start:] if causal else mx.ones((q_len, 90 - start), mx.bool_)
        none = int((~seen.any(axis=1)).sum())  # queries of the padding, which come first
        own = q[n : n + 1, :, none:], k[n : n + 1, :, start:], v[n : n + 1, :, start:]
        assert_close(out[n : n + 1, :, none:], sdpa(*own, mask=seen[none:]))
        assert not np.array(out[n, :, :none]).any()


def test_starts_count_keys_of_each_sequence_and_page(where: str) -> None:
    q, k, v, cu_q, cu_k = packed()
    starts = mx.array([2, 0, 11, 3])
    out = attention(
        *(q, k, v), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, kv_starts=starts, device=where
    )
    for n, start in enumerate(starts.tolist()):
        (a, b), (c, d) = ((int(cu[n]), int(cu[n + 1])) for cu in (cu_q, cu_k))
        if d - c > start and b > a:
            own = q[:, :, a:b], k[:, :, c + start : d], v[:, :, c + start : d]
            assert_close(out[:, :, a:b], sdpa(*own))
        else:
            assert not np.array(out[:, :, a:b]).any()
    q, k, v = arrays(3, 32)
    places: dict[str, Any] = {"kv_lens": mx.array([19, 32]), "kv_starts": mx.array([9, 25])}
    rows = attention(q, k, v, causal=True, device=where, **places)
    table = mx.array(TABLE)
    pages = in_pages(k), in_pages(v)
    assert_close(attention(q, *pages, block_table=table, causal=True, device=where, **places), rows)


@pytest.mark.parametrize("q_len", [6, 70])
def test_queries_behind_those_that_are_used_are_zeros(where: str, q_len: int) -> None:
    q, k, v = arrays(q_len, 90)
    used = [q_len - 2, 3]
    behind = mx.arange(q_len)[:, None] >= mx.array(used)[:, None, None, None]
    q = mx.where(behind, mx.nan, q)  # whatever lies there
    keywords: dict[str, Any] = {"seqused_q": mx.array(used), "causal": True, "device": where}
    out, lse = attention(q, k, v, return_lse=True, **keywords)
    turned_as = attention(q, k, v, rope=Rope(), **keywords)
    for n, count in enumerate(used):
        own = q[n : n + 1, :, :count], k[n : n + 1], v[n : n + 1]
        assert_close(out[n : n + 1, :, :count], sdpa(*own, mask="causal"))
        rows = attention(*own, rope=Rope(), causal=True, device="reference")
        assert_close(turned_as[n : n + 1, :, :count], rows, tolerance=1e-5)
        assert not np.array(out[n, :, count:]).any()
        assert np.isneginf(np.array(lse[n, :, count:])).all()


def test_packed_sequences_may_use_a_part_of_their_queries(where: str) -> None:
    q, k, v, cu_q, cu_k = packed()
    used = [2, 0, 11, 0]
    keywords: dict[str, Any] = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "device": where}
    out = attention(q, k, v, seqused_q=mx.array(used), **keywords)
    for n, count in enumerate(used):
        (a, b), (c, d) = ((int(cu[n]), int(cu[n + 1])) for cu in (cu_q, cu_k))
        if count:
            assert_close(
                out[:, :, a : a + count],
                sdpa(q[:, :, a : a + count], *(x[:, :, c:d] for x in (k, v))),
            )
        assert not np.array(out[:, :, a + count : b]).any()


@pytest.mark.parametrize("size", [264, 1024])
@pytest.mark.parametrize("q_len", [1, 70])
def test_pages_may_be_large(where: str, size: int, q_len: int) -> None:
    q, k, v = arrays(q_len, 2 * size, dtype="float16")
    pages = [x.reshape(2, 2, 2, size, WIDTH).swapaxes(1, 2) for x in (k, v)]
    pages = [x.reshape(4, 2, size, WIDTH)[::-1] for x in pages]
    lengths, table = mx.array([2 * size, size + 9]), mx.array([[3, 2], [1, 0]])
    options: dict[str, Any] = {"causal": True, "kv_lens": lengths, "device": where}
    out = attention(q, *pages, block_table=table, **options)
    assert_close(out, attention(q, k, v, **options))


@pytest.mark.parametrize("q_len", [1, 6])
def test_all_queries_may_turn_as_the_first_one(where: str, q_len: int) -> None:
    q, k, v = arrays(q_len, 20)
    positions = [7, 300]
    rope = Rope(offset=mx.array(positions), one_position=True)
    out = attention(q, k, v, rope=rope, device=where)
    rows = [
        mx.concatenate([turned(q[n : n + 1, :, i : i + 1], at) for i in range(q_len)], axis=2)
        for n, at in enumerate(positions)
    ]
    assert_close(out, sdpa(mx.concatenate(rows), k, v), tolerance=1e-5)


@pytest.mark.parametrize("style", ["half", "pairs"])
@pytest.mark.parametrize("q_len", [1, 70])
def test_queries_may_turn_by_tables(where: str, q_len: int, style: str) -> None:
    q, k, v = arrays(q_len, 90)
    cos, sin = (normal((100, WIDTH // 4), "float32", seed) for seed in (8, 9))
    positions = [40 - q_len // 2, 0]
    rope = Rope(tables=(cos, sin), style=style, offset=mx.array(positions))
    out = attention(q, k, v, rope=rope, causal=True, device=where)
    x = np.array(q)
    pair = np.arange(WIDTH // 4)
    first, second = (pair, pair + len(pair)) if style == "half" else (2 * pair, 2 * pair + 1)
    for n, at in enumerate(positions):
        c, s = (np.array(table)[at : at + q_len] for table in (cos, sin))
        a, b = x[n][..., first], x[n][..., second]
        x[n][..., first], x[n][..., second] = a * c - b * s, a * s + b * c
    assert_close(out, sdpa(mx.array(x), k, v, mask="causal"), tolerance=1e-5)


def test_positions_outside_of_tables_count_as_the_nearest_inside(where: str) -> None:
    q, k, v = arrays(6, 20)
    table = normal((9, WIDTH // 2), "float32", 8)
    tables = (table, table)
    outside = Rope(tables=tables, offset=mx.array([1000, 6]), one_position=True)
    nearest = Rope(tables=tables, offset=mx.array([8, 6]), one_position=True)
    outs = [attention(q, k, v, rope=rope, device=where) for rope in (outside, nearest)]
    assert (outs[0] == outs[1]).all().item()
    with pytest.raises(ArgumentError, match="positions of all queries in tables of 9 rows"):
        attention(q, k, v, rope=outside, check=True, device=where)
    attention(q, k, v, rope=nearest, check=True, device=where)
    several = Rope(tables=tables, offset=mx.array([0, 4]))
    with pytest.raises(ArgumentError, match="positions of all queries in tables of 9 rows"):
        attention(q, k, v, rope=several, check=True, device=where)


def test_keys_turn_by_tables_as_they_are_appended(where: str) -> None:
    """Keys that turn by tables as they are appended are those that are turned before."""
    angles = mx.arange(40)[:, None] * mx.array([0.9, 0.1])
    by_tables, by_base = (
        Rope(tables=(mx.cos(angles), mx.sin(angles))),
        Rope(dims=4, freqs=1 / mx.array([0.9, 0.1])),
    )
    _, k, v = arrays(1, 20)
    kept = []
    for rope in (by_tables, by_base):
        cache = KVCache(rope=rope, device=where)
        cache.append(k[:, :, :13], v[:, :, :13])
        kept.append(cache.append(k[:, :, 13:], v[:, :, 13:])[0])
    assert_close(*kept, tolerance=1e-5)


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


@pytest.mark.parametrize(
    ("key", "value", "width"),
    [((8, 64), (4, 32), None), ((4, 32), (8, 128), None), ((8, 32), (4, 64), 128)],
)
def test_keys_and_values_quantized_apart(
    where: str, key: tuple[int, int], value: tuple[int, int], width: int | None
) -> None:
    """Bits and groups of each; the last case looks like 8-bit values of 64 columns."""
    q = normal((2, 4, 3, 128), "float16", 1)
    k, v = (normal((2, 2, 40, 128), "float16", seed) for seed in (2, 3))
    hows = [{"bits": bits, "group_size": group} for bits, group in (key, value)]
    triples = [mx.quantize(x, **how) for x, how in zip((k, v), hows, strict=True)]
    expected = sdpa(q, *(dequantized(x, **how) for x, how in zip(triples, hows, strict=True)))
    out = attention(q, *triples, scale=SCALE, value_head_dim=width, device=where)
    assert_close(out, expected)


ROPES: dict[str, dict[str, Any]] = {
    "halves": {},
    "pairs": {"style": "pairs"},
    "partial": {"dims": 20},
    "partial pairs": {"dims": 12, "style": "pairs", "base": 500.0},
    "scaled": {"scale": 0.125},
    "periods": {"freqs": mx.array([1.5**n for n in range(16)])},
}


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


@pytest.mark.parametrize("keys", [0, 9])
def test_a_sink_counts_in_rows_of_sequences_without_keys_and_in_no_other_row(
    where: str, keys: int
) -> None:
    """Sequences of 2 and 3 rows, the first without keys; two rows that belong to none."""
    q, kv, sinks = normal((1, 4, 7, 16)), normal((1, 2, keys, 16), seed=1), normal((4,), seed=2)
    starts, stops = mx.array([0, 2, 5]), mx.array([0, 0, keys])
    _, lse = attention(
        q,
        kv,
        kv,
        cu_seqlens_q=starts,
        cu_seqlens_k=stops,
        sinks=sinks,
        return_lse=True,
        device=where,
    )
    rows = np.array(lse)[0]
    np.testing.assert_allclose(rows[:, :2], np.array(sinks)[:, None].repeat(2, 1), rtol=1e-6)
    assert (rows[:, 5:] == -np.inf).all()
    own = q[:, :, 2:5]
    _, alone = attention(own, kv, kv, sinks=sinks, return_lse=True, device="reference")
    np.testing.assert_allclose(rows[:, 2:5], np.array(alone)[0], rtol=1e-5)
