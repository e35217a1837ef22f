"""Calls made up at random, as users make them: odd shapes, layouts, types and options together.

A sample runs always; ``pytest -m slow tests/attention/test_any_call.py -n 2`` runs 500.
"""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from definition import Facts, definition, dequantized, exact

from metalgen import Rope, alibi_slopes, create_block_mask, flex_attention
from metalgen.calls.resolve import _known

TOLERANCE = {mx.float32: 4e-5, mx.float16: 1e-2, mx.bfloat16: 8e-2}
"""Largest error of one row, over its norm or half the usual norm."""
WIDTHS = (8, 9, 13, 16, 24, 31, 32, 40, 64, 72, 96, 100, 128, 257)
TYPES = (mx.float16, mx.bfloat16, mx.float32)
INTEGERS = (mx.int32, mx.int64, mx.uint32, mx.int16)


class Made:
    """One call, and what it means.

    Attributes:
        arguments, options: what `flex_attention` is called with.
        facts: the same for `definition`.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.keys = iter(mx.random.split(mx.random.key(seed), 20))
        self.options: dict[str, Any] = {"return_lse": True}
        self.plain: dict[str, Any] = {}
        choose = self.random.choice
        self.dtype = choose(TYPES)
        self.batch, self.kv_heads = choose((1, 1, 2, 3, 0)), choose((1, 2, 3))
        self.heads = self.kv_heads * choose((1, 2, 5, 8))
        self.q_len = choose((0, 1, 2, 3, 7, 17, 31, 65))
        self.kv_len = choose((0, 1, 2, 5, 31, 37, 64, 131))
        self.packed, self.paged, quantized = (self.chance(p) for p in (0.2, 0.25, 0.2))
        width = choose((32, 64)) if quantized else choose(WIDTHS)
        values = choose((width, 32 if quantized else choose(WIDTHS)))
        q, k, v = self.arrays(width, values)
        given: list[Any] = [k, v]
        meant = [exact(k), exact(v)]
        if quantized and k.size and v.size:
            bits = choose((4, 8))
            given = [mx.quantize(x, group_size=32, bits=bits) for x in given]
            meant = [dequantized(x, 32, bits, self.dtype) for x in given]
        self.facts = Facts(exact(q), *meant, self.dtype, **self.places)
        self.facts.scale = choose((None, None, 0.0, -0.3, 0.7))
        self.arguments = (q, *given)
        self.options["scale"] = self.facts.scale
        self.simple_options()
        self.by_score()
        self.turns(width)
        self.functions()
        self.facts.options = self.plain

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def give(self, name: str, value: Any, meant: Any = None) -> None:
        self.options[name] = value
        self.plain[name] = value if meant is None else meant

    def normal(self, *shape: int) -> mx.array:
        return mx.random.normal(shape, key=next(self.keys)).astype(self.dtype)

    def odd(self, *shape: int) -> mx.array:
        """An array of any layout that MLX has."""
        b, h, n, d = shape
        kind = self.random.choice(("rows", "heads last", "cut", "reversed", "repeated", "columns"))
        if kind == "heads last":
            return self.normal(b, n, h, d).swapaxes(1, 2)
        if kind == "cut":
            return self.normal(b, 2 * h, 2 * n + 3, d + 8)[:, ::2, 3::2, 8:]
        if kind == "reversed":
            return self.normal(*shape)[:, ::-1, ::-1]
        if kind == "repeated":
            return mx.broadcast_to(self.normal(1, h, 1, d), shape)
        if kind == "columns":
            return self.normal(b, h, d, n).swapaxes(2, 3)
        return self.normal(*shape) * 2 - self.normal(*shape)

    def integers(self, numbers: Any, *shape: int) -> mx.array:
        """Of any type that holds them."""
        low = min(np.ravel(numbers), default=0)
        fits = INTEGERS if low >= 0 else INTEGERS[:2]
        return mx.array(numbers, mx.int64).reshape(shape).astype(self.random.choice(fits))

    def cuts(self, count: int, size: int) -> list[int]:
        return [
            0,
            *sorted(
                self.random.choice((0, size, self.random.randint(0, size))) for _ in range(count)
            ),
        ]

    def arrays(self, width: int, values: int) -> tuple[mx.array, mx.array, mx.array]:
        self.places: dict[str, Any] = {}
        count, shape = self.batch, (self.batch, self.kv_heads, self.kv_len)
        if self.packed:
            count, self.batch = self.random.choice((1, 2, 4)), 1
            shape = (1, *shape[1:])
            starts = self.places["starts_q"] = self.cuts(count, self.q_len)
            self.options["cu_seqlens_q"] = self.integers(starts, count + 1)
            if not self.paged and (self.q_len != self.kv_len or self.chance(0.5)):
                starts = self.places["starts_k"] = self.cuts(count, self.kv_len)
                self.options["cu_seqlens_k"] = self.integers(starts, count + 1)
        if self.paged:
            pages, size = self.random.choice((0, 1, 9)), self.random.choice((8, 24))
            wide = self.random.choice((0, 1, 3))
            numbers = [[self.random.randint(-1, pages) for _ in range(wide)] for _ in range(count)]
            self.places["table"] = numbers
            self.options["block_table"] = self.integers(numbers, count, wide)
            self.kv_len, shape = wide * size, (pages, self.kv_heads, size)
        if self.paged or (not self.packed and self.chance(0.2)):
            lengths = self.places["kv_lens"] = [
                self.random.randint(0, self.kv_len) for _ in range(count)
            ]
            self.options["kv_lens"] = self.integers(lengths, count)
        if self.chance(0.2):
            low = -self.q_len if self.chance(0.5) else 0
            one = self.chance(0.5)
            offsets = [self.random.randint(low, self.kv_len) for _ in range(count)]
            self.places["q_offset"] = offsets[:1] * count if one else offsets
            self.options["q_offset"] = offsets[0] if one else self.integers(offsets, count)
        if self.chance(0.15):
            used = [self.random.randint(0, self.q_len) for _ in range(count)]
            self.places["seqused_q"] = used
            self.options["seqused_q"] = self.integers(used, count)
        if self.chance(0.2):
            firsts = [self.random.randint(0, self.kv_len) for _ in range(count)]
            self.places["kv_starts"] = firsts
            self.options["kv_starts"] = self.integers(firsts, count)
        self.count = count
        q = self.odd(self.batch, self.heads, self.q_len, width)
        return q, self.odd(*shape, width), self.odd(*shape, values)

    def simple_options(self) -> None:
        for name, p, values in (
            ("causal", 0.4, (True,)),
            ("window_left", 0.2, (0, 5, 1000)),
            ("window_right", 0.2, (0, 5, 1000)),
            ("softcap", 0.15, (0.5, 50.0)),
        ):
            if self.chance(p):
                self.give(name, self.random.choice(values))
        if self.chance(0.2):
            self.options["deterministic"] = True
        if not self.packed and self.chance(0.2):
            self.options["max_work"] = 1 << 16
        if self.chance(0.2):
            slopes = alibi_slopes(self.heads).astype(self.random.choice(TYPES))
            self.give("alibi_slopes", slopes, exact(slopes))
        if self.chance(0.2):
            sinks = self.normal(self.heads) * 3
            self.give("sinks", sinks, exact(sinks))

    def by_score(self) -> None:
        """Bias and mask, of shapes that broadcast, with fewer axes too."""
        whole = (self.batch, self.heads, self.q_len, self.kv_len)
        for name in ("bias", "mask"):
            if self.packed or not self.chance(0.2):
                continue
            shape = [size if self.chance(0.6) else 1 for size in whole]
            while len(shape) > 1 and shape[0] == 1 and self.chance(0.5):
                shape = shape[1:]
            some = mx.random.bernoulli(
                self.random.choice((0.0, 0.3, 0.8)), shape, key=next(self.keys)
            )
            if name == "mask":
                self.give(name, some, np.array(some))
                continue
            bias = mx.where(some, self.normal(*shape), mx.array(-mx.inf, self.dtype))
            self.give(name, bias, exact(bias))

    def turns(self, width: int) -> None:
        if width % 2 or not self.chance(0.25):
            return
        dims = self.random.choice((None, 2, width, width // 4 * 2))
        style, base = self.random.choice(("half", "pairs")), 500.0
        offset: Any = self.random.choice((None, 5, "each"))
        numbers = [self.random.randint(0, 3000) for _ in range(self.count)]
        offsets = {None: None, 5: [5] * self.count}.get(offset, numbers)
        if offset == "each":
            offset = self.integers(numbers, self.count)
        self.options["rope"] = Rope(dims=dims, base=base, style=style, offset=offset)
        turned = dims or width
        radians = [base ** (-2 * c / turned) for c in range(turned // 2)]
        self.facts.turns = style, radians, offsets

    def functions(self) -> None:
        table = mx.random.normal((self.heads, 40), key=next(self.keys))
        kept = np.array(table).astype(np.float64)
        scores = (
            (
                lambda s, b, h, i, j: s + table[h, mx.clip(i - j, 0, 39)],
                lambda s, b, h, i, j: s + kept[h, min(max(i - j, 0), 39)],
            ),
            (
                lambda s, b, h, i, j: mx.where((i + j + h) % 3 == 0, -mx.inf, s - b),
                lambda s, b, h, i, j: -np.inf if (i + j + h) % 3 == 0 else s - b,
            ),
        )
        masks = (
            lambda b, h, i, j: i >= j,
            lambda b, h, i, j: (j - i) % (h + 2) == b % 2,
            lambda b, h, i, j: j > 40,
        )
        if "softcap" not in self.options and self.chance(0.3):
            self.options["score_mod"], self.facts.score = self.random.choice(scores)
        if not self.chance(0.3):
            return
        mask = self.facts.mask = self.random.choice(masks)
        sizes = self.batch, self.heads, self.q_len, self.kv_len
        alone = self.packed or "q_offset" in self.options
        if alone or 0 in sizes or self.chance(0.3):
            self.options["mask_mod"] = mask
        else:
            size = self.random.choice((8, 32, 5, (16, 64), 1000))
            self.options["block_mask"] = create_block_mask(mask, *sizes, size)


def check(seed: int, where: str) -> None:
    made = Made(seed)
    out, lse = flex_attention(*made.arguments, device=where, **made.options)
    said = f"seed {seed}: {[k.config for k in _known.values()][-1:]}"
    expected, expected_lse = definition(made.facts)
    assert (out.dtype, lse.dtype) == (made.dtype, mx.float32), said
    got, got_lse = exact(out), exact(lse)
    assert got.shape == expected.shape, said
    np.testing.assert_array_equal(np.isneginf(got_lse), np.isneginf(expected_lse), said)
    assert not got[np.isneginf(expected_lse)].any(), said
    usual = np.sqrt((expected**2).mean() * expected.shape[3]) if expected.size else 1.0
    error = np.linalg.norm(got - expected, axis=-1)
    error /= np.maximum(np.linalg.norm(expected, axis=-1), max(usual / 2, 1e-6))
    assert error.max(initial=0) < TOLERANCE[made.dtype], said
    rows = np.isfinite(expected_lse)
    turned = TOLERANCE[made.dtype] if made.facts.turns else 3e-5
    apart = np.abs(got_lse[rows] - expected_lse[rows]) / np.maximum(1, np.abs(expected_lse[rows]))
    assert apart.max(initial=0) < turned, said


@pytest.mark.parametrize("seed", range(16))
def test_a_call_is_what_its_page_says(seed: int, where: str) -> None:
    check(seed, where)


@pytest.mark.slow
@pytest.mark.parametrize("shard", range(20))
def test_500_calls_are_what_their_page_says(shard: int, where: str) -> None:
    for seed in range(1000 + 25 * shard, 1025 + 25 * shard):
        check(seed, where)
