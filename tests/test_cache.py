"""Caches of keys and values: dense and growing, paged, quantized; and what refuses a bad append."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import ArgumentError, CacheFull, KVCache, PagedKVCache, Rope, append_kv
from metalgen.calls.verify import TOLERANCE
from metalgen.devices import get_device
from metalgen.ops import append


def normal(shape: tuple[int, ...], dtype: str = "float16", seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(getattr(mx, dtype))


def close(x: mx.array, y: mx.array, dtype: str = "float16") -> bool:
    one, other = (np.array(a.astype(mx.float32)) for a in (x, y))
    return bool(np.linalg.norm(one - other) <= 2 * TOLERANCE[dtype] * np.linalg.norm(other))


class TestDense:
    def test_holds_what_was_appended_in_order(self, device: str) -> None:
        cache = KVCache(step=16, device=device)
        parts = [
            (normal((2, 3, t, 40), seed=t), normal((2, 3, t, 24), seed=t + 1)) for t in (5, 1, 30)
        ]
        for k, v in parts:
            keys, values = cache.append(k, v)
        assert cache.length == 36
        for got, all_parts in ((keys, 0), (values, 1)):
            expected = mx.concatenate([part[all_parts] for part in parts], axis=2)
            np.testing.assert_array_equal(np.array(got), np.array(expected))

    @pytest.mark.parametrize("start", [None, 7])
    def test_keys_turn_by_their_place_in_the_cache(self, device: str, start: int | None) -> None:
        cache = KVCache(rope=Rope(32, offset=start), device=device)
        k = normal((1, 2, 9, 64), "float32", 1)
        for first, last in ((0, 4), (4, 5), (5, 9)):
            keys, _ = cache.append(k[:, :, first:last], k[:, :, first:last])
        offset = start or 0
        expected = mx.fast.rope(k, 32, traditional=False, base=10000.0, scale=1.0, offset=offset)
        np.testing.assert_allclose(np.array(keys), np.array(expected), atol=1e-5)

    def test_trimmed_rows_are_written_over(self, device: str) -> None:
        cache = KVCache(device=device)
        k = normal((1, 1, 6, 8))
        cache.append(k, k)
        cache.trim(4)
        keys, _ = cache.append(k[:, :, 4:], k[:, :, 4:])
        expected = mx.concatenate([k[:, :, :2], k[:, :, 4:]], axis=2)
        np.testing.assert_array_equal(np.array(keys), np.array(expected))

    def test_grows_only_by_steps_and_stores_in_place_between(self, device: str) -> None:
        if device != "simulator":
            pytest.skip(f"addresses are compared on the CPU, not on {device}")
        cache = KVCache(step=8, device=device)
        places = []
        for n in range(17):
            k = normal((1, 2, 1, 16), seed=n)
            mx.eval(cache.append(k, k))
            places.append(_address(cache.state[0]))
        assert len(set(places[:8])) == len(set(places[8:16])) == 1

    @pytest.mark.parametrize("bits", [4, 8])
    def test_attention_over_a_quantized_cache(self, device: str, bits: int) -> None:
        cache = KVCache(bits=bits, group_size=32, rope=Rope(), device=device)
        k, v = normal((1, 2, 40, 64), seed=1), normal((1, 2, 40, 32), seed=2)
        for first, last in ((0, 33), (33, 40)):
            keys, values = cache.append(k[:, :, first:last], v[:, :, first:last])
        whole = [mx.dequantize(*part, 32, bits) for part in (keys, values)]  # type: ignore[misc, call-arg]
        turned = mx.fast.rope(k, 64, traditional=False, base=10000.0, scale=1.0, offset=0)
        assert np.abs(np.array(whole[0] - turned)).max() < {4: 0.5, 8: 0.03}[bits]
        assert np.abs(np.array(whole[1] - v)).max() < {4: 0.5, 8: 0.03}[bits]
        q = normal((1, 4, 7, 64), seed=3)
        options: dict[str, Any] = {"causal": True, "rope": Rope()}
        out = metalgen.attention(q, keys, values, device=device, **options)  # type: ignore[arg-type]
        expected = metalgen.attention(q, whole[0], whole[1], device="reference", **options)
        assert close(out, expected)

    def test_keys_and_values_quantized_apart(self, device: str) -> None:
        cache = KVCache(bits=(8, 4), group_size=(64, 32), device=device)
        k, v = normal((1, 2, 40, 64), seed=1), normal((1, 2, 40, 64), seed=2)
        for first, last in ((0, 33), (33, 40)):
            keys, values = cache.append(k[:, :, first:last], v[:, :, first:last])
        for part, rows, group, bits in ((keys, k, 64, 8), (values, v, 32, 4)):
            expected = mx.quantize(rows, group, bits, stream=mx.cpu)
            for mine, theirs in zip(part, expected, strict=True):  # type: ignore[arg-type]
                np.testing.assert_array_equal(np.array(mine), np.array(theirs))
        assert repr(cache) == "<KVCache of 40 rows, 8 bits (keys) and 4 (values)>"
        q = normal((1, 4, 7, 64), seed=3)
        out = metalgen.attention(q, keys, values, causal=True, device=device)
        whole = (mx.dequantize(*keys, 64, 8), mx.dequantize(*values, 32, 4))  # type: ignore[misc, call-arg]
        assert close(out, metalgen.attention(q, *whole, causal=True, device="reference"))


def _address(x: Any) -> int:
    return int(np.array(x, copy=False).__array_interface__["data"][0])


class TestPaged:
    @pytest.mark.parametrize("bits", [None, 4, 8])
    @pytest.mark.parametrize("packed", [False, True])
    def test_attention_over_pages_is_attention_over_what_was_stored(
        self, device: str, bits: int | None, packed: bool
    ) -> None:
        """Prompts of several lengths, a sequence that goes, one that takes its pages, a step."""
        rope = Rope(48, style="pairs")
        cache = PagedKVCache(
            12,
            2,
            64,
            value_head_dim=32,
            page_size=8,
            bits=bits,
            group_size=32,
            rope=rope,
            device=device,
        )
        lengths = [11, 17, 5]
        rows = {}
        names = [cache.add() for _ in lengths]
        gone = cache.add()
        k, v = normal((1, 2, 9, 64), seed=90), normal((1, 2, 9, 32), seed=91)
        cache.append([gone], k, v)
        for n, (name, length) in enumerate(zip(names, lengths, strict=True)):
            rows[name] = normal((1, 2, length, 64), seed=n), normal((1, 2, length, 32), seed=10 + n)
        if packed:
            k, v = (mx.concatenate([rows[name][x] for name in names], axis=2) for x in (0, 1))
            cache.append(names, k, v, lengths)
        else:
            for name in names:
                cache.append([name], *rows[name])
        cache.remove(gone)
        order = [names[2], names[0], names[1]]
        k, v = normal((3, 2, 4, 64), seed=20), normal((3, 2, 4, 32), seed=21)
        cache.append(order, k, v)
        table, counts = cache.tables(order)
        assert counts.tolist() == [9, 15, 21]
        assert cache.free_pages == 12 - 2 - 2 - 3
        q = normal((3, 4, 4, 64), seed=30)
        options: dict[str, Any] = {"causal": True, "rope": rope}
        out = metalgen.attention(
            q, cache.keys, cache.values, block_table=table, kv_lens=counts, device=device, **options
        )
        stored = (cache.keys, cache.values)
        if bits is not None:
            stored = tuple(mx.dequantize(*part, 32, bits) for part in stored)  # type: ignore[misc, call-arg, assignment]
        for n, name in enumerate(order):
            length = counts.tolist()[n]  # type: ignore[index, call-overload]
            pages = [page for page in table.tolist()[n] if page >= 0]  # type: ignore[index, union-attr, call-overload]
            dense = [
                mx.concatenate([part[page] for page in pages], axis=1)[None, :, :length]
                for part in stored
            ]
            given = [
                mx.concatenate([old, new[n : n + 1]], axis=2)
                for old, new in zip(rows[name], (k, v), strict=True)
            ]
            turned = mx.fast.rope(given[0], 48, traditional=True, base=10000.0, scale=1.0, offset=0)
            error = {None: 0.01, 8: 0.04, 4: 0.5}[bits]
            assert np.abs(np.array(dense[0] - turned)).max() < error
            assert np.abs(np.array(dense[1] - given[1])).max() < error
            expected = metalgen.attention(
                q[n : n + 1], dense[0], dense[1], device="reference", **options
            )
            assert close(out[n : n + 1], expected)

    def test_a_full_cache_refuses_and_stays_as_it_is(self) -> None:
        cache = PagedKVCache(3, 1, 8, page_size=8, device="reference")
        one, other = cache.add(), cache.add()
        k = normal((1, 1, 10, 8))
        cache.append([one], k, k)
        pages = np.array(cache.keys)  # type: ignore[arg-type]
        with pytest.raises(CacheFull, match="2 more pages needed, 1 free"):
            cache.append([other], k, k)
        assert (cache.length(one), cache.length(other), cache.free_pages) == (10, 0, 1)
        np.testing.assert_array_equal(np.array(cache.keys), pages)  # type: ignore[arg-type]
        cache.trim(one, 3)
        cache.append([other], k, k)
        assert (cache.length(one), cache.length(other), cache.free_pages) == (7, 10, 0)

    def test_pages_are_shared_by_no_two_sequences_through_any_history(self) -> None:
        """A thousand steps at random, against a model that holds each sequence's rows in a list."""
        rng = np.random.default_rng(0)
        cache = PagedKVCache(40, 1, 8, page_size=8, dtype=mx.float32, device="reference")
        held: dict[int, list[float]] = {}
        number = 0.0
        for _ in range(1000):
            action = rng.choice(["add", "remove", "trim", "append", "append", "append"])
            names = list(held)
            if action == "add" or not names:
                held[cache.add()] = []
            elif action == "remove" and len(names) > 5:
                name = names[rng.integers(len(names))]
                cache.remove(name)
                del held[name]
            elif action == "trim":
                name = names[rng.integers(len(names))]
                rows = int(rng.integers(len(held[name]) + 1))
                cache.trim(name, rows)
                held[name] = held[name][: len(held[name]) - rows]
            elif action == "append":
                some = [int(n) for n in rng.permutation(names)[:3]]
                counts = rng.integers(0, 12, len(some)).tolist()
                x = mx.arange(number, number + sum(counts))[None, None, :, None]
                k = mx.broadcast_to(x, (1, 1, sum(counts), 8))
                free = cache.free_pages
                try:
                    cache.append(some, k, -k, counts)
                except CacheFull:
                    assert cache.free_pages == free
                    continue
                for name, count in zip(some, counts, strict=True):
                    held[name] += [number + n for n in range(count)]
                    number += count
        assert number > 2000 and sum(map(len, held.values())) > 50
        table, lengths = cache.tables(list(held))
        keys, values = (np.array(x)[:, 0, :, 0] for x in (cache.keys, cache.values))
        for own, length, rows in zip(table.tolist(), lengths.tolist(), held.values(), strict=True):  # type: ignore[arg-type]
            stored = np.concatenate([keys[page] for page in own] or [[]])[:length]
            assert stored.tolist() == rows
            stored = np.concatenate([values[page] for page in own] or [[]])[:length]
            assert (-stored).tolist() == rows
        used = sum(-(-len(rows) // 8) for rows in held.values())
        assert cache.free_pages == 40 - used

    def test_a_refused_append_leaves_lengths_and_pages(self) -> None:
        cache = PagedKVCache(4, 1, 8, page_size=8, device="reference")
        name = cache.add()
        with pytest.raises(ArgumentError, match="heads"):
            cache.append([name], normal((1, 2, 3, 8)), normal((1, 2, 3, 8)))
        assert (cache.length(name), cache.free_pages) == (0, 4)


def _dense(dtype: str = "float16") -> tuple[mx.array, mx.array]:
    return normal((2, 2, 10, 64), dtype), normal((2, 2, 10, 64), dtype)


def _pages() -> tuple[mx.array, mx.array]:
    return normal((5, 2, 16, 64)), normal((5, 2, 16, 64))


def _quantized(bits: int) -> Any:
    return tuple(mx.quantize(x, 64, bits) for x in _dense())


NEW = {"k": normal((2, 2, 3, 64)), "v": normal((2, 2, 3, 64))}
PACKED = {"k": normal((1, 2, 3, 64)), "v": normal((1, 2, 3, 64))}
TABLE = mx.array([[0, 1], [2, 3]])
BOTH = mx.array([0, 0])

BAD: list[tuple[str, str, dict[str, Any]]] = [
    ("a cache that is no pair", "cache: expected a pair", {"cache": _dense()[0]}),
    ("3 axes", "its keys: .* 4 axes", {"cache": (normal((2, 10, 64)), _dense()[1])}),
    ("half quantized", "both quantized", {"cache": (_dense()[0], _quantized(4)[1])}),
    (
        "5 bits",
        "packed keys.*8 .4 bits. or 16",
        {"cache": tuple(mx.quantize(x, 64, 5) for x in _dense())},
    ),
    ("another type", "k.dtype: .*float32, as the cache has", {"cache": _dense("float32")}),
    ("k is a list", "k: expected an mlx.core.array", {"k": [[1.0]]}),
    ("k of 3 axes", "k.shape: expected 4 axes", {"k": normal((2, 3, 64))}),
    ("v of other lengths", "v.shape", {"v": normal((2, 2, 4, 64))}),
    ("v of another type", "v.dtype", {"v": normal((2, 2, 3, 64), "float32")}),
    ("another batch", "k.shape: expected a batch of 2", PACKED),
    (
        "other heads",
        "k.shape: expected 2 heads",
        {"k": normal((2, 1, 3, 64)), "v": normal((2, 1, 3, 64))},
    ),
    ("another width", "v.shape: .* last axis of 64, as the", {"v": normal((2, 2, 3, 32))}),
    ("no room", "offset: expected a number from 0 to 7", {"offset": 8}),
    (
        "more rows than slots",
        "at most 10",
        {"k": normal((2, 2, 11, 64)), "v": normal((2, 2, 11, 64))},
    ),
    ("a negative offset", "offset: expected a number from 0", {"offset": -1}),
    ("a list of offsets", "offset: .*array of integers", {"offset": [0, 0]}),
    ("fractional offsets", "offset.dtype: expected int32", {"offset": mx.array([0.5, 1.0])}),
    ("too few offsets", "offset.shape: expected .2,.", {"offset": mx.array([0])}),
    ("a number beside pages", "offset: .*one for each", {"cache": _pages(), "block_table": TABLE}),
    (
        "a list for a table",
        "block_table: .*mx.array",
        {"cache": _pages(), "block_table": [[0]], "offset": BOTH},
    ),
    (
        "a table of other height",
        "block_table.shape",
        {"cache": _pages(), "block_table": TABLE[:1], "offset": BOTH},
    ),
    ("pages of 10", "page_size", {"block_table": TABLE, "offset": BOTH}),
    (
        "packed without pages",
        "cu_seqlens: expected None",
        {"cu_seqlens": mx.array([0, 3]), "offset": BOTH},
    ),
    (
        "packed in a batch",
        "k.shape: expected a first axis of 1",
        {
            "cache": _pages(),
            "block_table": TABLE,
            "cu_seqlens": mx.array([0, 1, 3]),
            "offset": BOTH,
        },
    ),
    (
        "one boundary",
        "cu_seqlens.shape",
        PACKED
        | {"cache": _pages(), "block_table": TABLE, "cu_seqlens": mx.array([0]), "offset": BOTH},
    ),
    ("rope by number", "rope: expected a metalgen.Rope", {"rope": 10000.0}),
    ("rope wider than keys", "rope_dims: expected an even number from 2 to 64", {"rope": Rope(66)}),
    ("too few periods", "rope.freqs.shape: expected .32,.", {"rope": Rope(freqs=mx.ones((8,)))}),
    ("too many positions", "rope.offset.shape", {"rope": Rope(offset=mx.array([1, 2, 3]))}),
    ("a device that is none", "device: expected one of", {"rope": Rope(), "device": "gpu"}),
    ("a list of devices", "device: expected one of", {"rope": Rope(), "device": ["gpu"]}),
    (
        "a number for a schedule",
        "schedule: expected a schedule of the append family",
        {"schedule": 3},
    ),
    (
        "checked: a slot beyond",
        r"offset\[1\]: expected a number from 0 to 6",
        {"offset": mx.array([0, 7]), "check": True},
    ),
    (
        "checked: a missing page",
        r"block_table\[1, 0\]: expected a page from 0 to 3",
        {
            "cache": _pages(),
            "block_table": mx.array([[0, -1], [-1, 2]]),
            "offset": BOTH,
            "check": True,
        },
    ),
    (
        "checked: the spare page",
        r"block_table\[0, 1\]: .*spare",
        {
            "cache": _pages(),
            "block_table": mx.array([[0, 4], [1, 2]]),
            "offset": mx.array([14, 0]),
            "check": True,
        },
    ),
    (
        "checked: unordered",
        "cu_seqlens: expected numbers that ascend from 0 to 3",
        PACKED
        | {
            "cache": _pages(),
            "block_table": TABLE,
            "cu_seqlens": mx.array([0, 4, 3]),
            "offset": BOTH,
            "check": True,
        },
    ),
]


@pytest.mark.parametrize(("message", "change"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_input_is_one_clear_error(message: str, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"cache": _dense(), **NEW, "offset": 0, "device": "reference"}
    with pytest.raises(ArgumentError, match=message):
        append_kv(**given | change)


@pytest.mark.parametrize(
    ("message", "build"),
    [
        ("bits", lambda: KVCache(bits=3)),
        ("group_size", lambda: KVCache(bits=4, group_size=16)),
        ("bits: .*a pair of them .keys, values.", lambda: KVCache(bits=(8, 3))),
        ("bits", lambda: KVCache(bits=(8, 4, 4))),  # type: ignore[arg-type]
        ("group_size", lambda: KVCache(bits=8, group_size=(64, 16))),
        ("step", lambda: KVCache(step=0)),
        ("rope", lambda: KVCache(rope=Rope)),  # type: ignore[arg-type]
        ("cache: expected a cache with rows", lambda: KVCache().state),
        ("rows", lambda: KVCache().trim(1)),
        ("head dimension", lambda: KVCache(bits=4).append(NEW["k"][..., :40], NEW["v"])),
        ("k: expected an mlx.core.array", lambda: KVCache().append(None, None)),  # type: ignore[arg-type]
        ("pages", lambda: PagedKVCache(0, 1, 8)),
        ("page_size", lambda: PagedKVCache(1, 1, 8, page_size=12)),
        ("dtype", lambda: PagedKVCache(1, 1, 8, dtype=mx.int32)),
        ("sequences", lambda: PagedKVCache(1, 1, 8).append([0], NEW["k"], NEW["v"])),
        ("sequences", lambda: PagedKVCache(1, 1, 8).remove(3)),
        ("sequences", lambda: PagedKVCache(1, 1, 8).append(None, NEW["k"], NEW["v"])),  # type: ignore[arg-type]
        ("sequences", lambda: PagedKVCache(1, 1, 8).tables([[0]])),  # type: ignore[list-item]
        ("counts", lambda: PagedKVCache(1, 1, 8).append([], NEW["k"], NEW["v"], 6)),  # type: ignore[arg-type]
        ("pages: expected at most 16777214", lambda: PagedKVCache(1 << 24, 8, 64)),
        ("head_dim: expected an integer from 8", lambda: PagedKVCache(1, 1, 7)),
        ("value_head_dim", lambda: PagedKVCache(1, 1, 8, value_head_dim=600)),
        ("step", lambda: KVCache(step=1 << 40)),
    ],
)
def test_bad_arguments_of_a_cache_are_named(message: str, build: Any) -> None:
    with pytest.raises(ArgumentError, match=message):
        build()


def test_a_batch_that_does_not_fit_leaves_a_dense_cache_as_it_is() -> None:
    cache = KVCache(step=4, device="reference")
    keys, _ = cache.append(NEW["k"], NEW["v"])
    for bad in (normal((1, 2, 3, 64)), normal((2, 2, 3, 64), "float32"), normal((2, 2, 3, 8))):
        with pytest.raises(ArgumentError):
            cache.append(bad, bad)
    assert cache.length == 3
    np.testing.assert_array_equal(np.array(cache.state[0]), np.array(keys))  # type: ignore[arg-type]


@pytest.mark.parametrize("offset", [10, "ragged"])
def test_no_rows_change_nothing(offset: Any) -> None:
    cache = _dense()
    at = mx.array([0, 99]) if offset == "ragged" else offset
    k = mx.zeros((2, 2, 0, 64), mx.float16)
    for old, new in zip(cache, append_kv(cache, k, k, offset=at, device="reference"), strict=True):
        assert mx.array_equal(old, new)  # type: ignore[arg-type]


def test_a_copy_of_a_paged_cache_goes_its_own_way() -> None:
    cache = PagedKVCache(4, 2, 64, page_size=8, device="reference")
    one = cache.add()
    cache.append([one], NEW["k"][:1], NEW["v"][:1])
    twin = copy.copy(cache)
    for _ in range(2):
        twin.append([one], NEW["k"][1:], NEW["v"][1:])
    other = cache.add()
    cache.append([other], NEW["k"][1:], NEW["v"][1:])
    assert (cache.length(one), twin.length(one)) == (3, 9)
    assert (cache.free_pages, twin.free_pages) == (2, 2)
    with pytest.raises(ArgumentError, match="what add"):
        twin.length(other)
    table, _ = cache.tables([one])
    kept = cache.keys[int(table[0, 0].item())][:, :3]  # type: ignore[index, arg-type]
    np.testing.assert_array_equal(np.array(kept), np.array(NEW["k"][0]))


@pytest.mark.parametrize("dtype", [mx.uint8, mx.int8, mx.int16, mx.int64])
def test_the_offset_of_a_rope_may_be_of_any_integer_type(dtype: mx.Dtype) -> None:
    """More rows follow than an uint8 or int8 can count."""
    found = []
    for offset in (mx.array([100, 3], dtype), mx.array([100, 3], mx.int32)):
        cache = KVCache(rope=Rope(offset=offset), device="reference")
        for _ in range(5):
            keys, _ = cache.append(normal((2, 2, 60, 64)), normal((2, 2, 60, 64)))
        found.append(np.array(keys))  # type: ignore[arg-type]
    np.testing.assert_array_equal(*found)


WIDE = 1 << 32
"""What is 0 in 32 bits."""


@pytest.mark.parametrize("device", ["reference", "simulator"])
@pytest.mark.parametrize("sign", [1, -1])
def test_integers_beyond_32_bits_do_not_become_valid_ones(
    device: str, sign: int, request: pytest.FixtureRequest
) -> None:
    if device == "simulator":
        request.getfixturevalue("the_simulator")
    k, v = NEW["k"][:1], NEW["v"][:1]
    table = mx.array([[sign * WIDE, 1]], mx.int64)
    before = _pages()
    for at, listed in ((0, table), (sign * WIDE, mx.array([[0, 1]], mx.int64))):
        offset = mx.array([at], mx.int64)
        keys, _ = append_kv(before, k, v, offset=offset, block_table=listed, device=device)
        spared = np.array(keys)[:-1]  # type: ignore[arg-type]
        np.testing.assert_array_equal(spared, np.array(before[0])[:-1])
        with pytest.raises(ArgumentError, match=r"(offset|block_table)\[0"):
            append_kv(before, k, v, offset=offset, block_table=listed, check=True, device=device)
    q = normal((1, 2, 2, 64))
    lengths = mx.array([sign * WIDE + 2], mx.int64)
    out = metalgen.attention(q, k, v, kv_lens=lengths, device=device)
    expected = metalgen.attention(q, k, v, device=device) if sign == 1 else mx.zeros_like(q)
    np.testing.assert_array_equal(np.array(out), np.array(expected))
    with pytest.raises(ArgumentError, match=r"kv_lens\[0\]"):
        metalgen.attention(q, k, v, kv_lens=lengths, device=device, check=True)


def test_the_default_device_is_the_one_of_now(
    monkeypatch: pytest.MonkeyPatch, the_simulator: str
) -> None:
    asked = []
    real = append.row_maker

    def row_maker(config: Any, device: str, schedule: Any) -> Any:
        asked.append(device)
        return real(config, device, schedule)

    monkeypatch.setattr(append, "row_maker", row_maker)
    for name in (the_simulator, "reference"):
        monkeypatch.setattr(append, "default_device", lambda name=name: get_device(name))
        append_kv(_dense(), **NEW, offset=0, rope=Rope())
    assert asked == ["simulator", "reference"]


def test_counts_that_do_not_fit_the_rows_are_refused() -> None:
    cache = PagedKVCache(9, 2, 64, device="reference")
    one, other = cache.add(), cache.add()
    for counts in ([1, 1], [3], [4, -1]):
        with pytest.raises(ArgumentError, match="counts"):
            cache.append([one, other], PACKED["k"], PACKED["v"], counts)
    with pytest.raises(ArgumentError, match="each sequence once"):
        cache.append([one, one], NEW["k"], NEW["v"])


def test_the_examples_of_the_documentation_run() -> None:
    text = (Path(__file__).parent.parent / "docs" / "append.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    assert scope["out"].shape == (2, 8, 1, 64)
    assert bool(mx.any(scope["pages"][0][7, :, 5] != 0))


def test_caches_say_how_full_they_are_in_a_line() -> None:
    cache = metalgen.KVCache(bits=8)
    cache.append(mx.zeros((1, 2, 3, 64)), mx.zeros((1, 2, 3, 64)))
    assert repr(cache) == "<KVCache of 3 rows, 8 bits>"
    assert repr(metalgen.KVCache()) == "<KVCache of 0 rows>"
    paged = metalgen.PagedKVCache(pages=4, kv_heads=2, head_dim=64, page_size=16)
    rows = mx.zeros((1, 2, 20, 64), mx.float16)
    paged.append([paged.add()], rows, rows)
    paged.add()
    assert repr(paged) == "<PagedKVCache of 20 rows of 2 sequences, 2 pages of 16 free>"
