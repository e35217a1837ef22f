"""Quantized caches of every kind: what they hold, and what models say over them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import zoo

from metalgen.errors import ArgumentError
from metalgen.mlx_lm import make_prompt_cache, patch, stats, unpatch


def largest(x: mx.array) -> float:
    return float(mx.abs(x).max().item())


def dequantized(part: Any, cache: Any) -> mx.array:
    return mx.dequantize(*part, group_size=cache.group_size, bits=cache.bits)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("bits", [4, 8])
def test_rows_come_back_as_mx_quantize_made_them(bits: int, group: int, dtype: mx.Dtype) -> None:
    from metalgen.mlx_lm.caches import packed_rows, unpacked_rows

    rows = mx.random.normal((2, 3, 5, 64)).astype(dtype)
    own = mx.quantize(rows, group_size=group, bits=bits)
    found = unpacked_rows(packed_rows(rows, group, bits), group, bits, dtype)
    for a, b in zip(own, found, strict=True):
        assert a.dtype == b.dtype and (a == b).all().item()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("kind", ["own", "rotating", "batch"])
@pytest.mark.parametrize("bits", [8, (8, 4)], ids=str)
def test_logits_are_those_of_keys_rounded_alike(
    name: str, kind: str, bits: int | tuple[int, int], own_database: Path
) -> None:
    """Against a plain cache that rounds each row as ``mx.quantize`` does."""
    from metalgen.mlx_lm.caches import quantized

    built = zoo.model(name)
    batch = 2 if kind == "batch" else 1
    patch(device="reference")
    rounding = [rounded(cache, bits) for cache in zoo.caches(built, kind)]
    own = zoo.logits(built, rounding, batch)[:, 3:]
    held = [quantized(cache, bits, 32) for cache in zoo.caches(built, kind)]
    ours = zoo.logits(built, held, batch)[:, 3:]
    assert largest(ours - own) < 1e-5 * largest(own)
    assert stats().own == {}


def rounded(cache: Any, bits: int | tuple[int, int]) -> Any:
    fetch = cache.update_and_fetch
    of_keys, of_values = bits if isinstance(bits, tuple) else (bits, bits)

    def through(x: mx.array, own: int) -> mx.array:
        return mx.dequantize(*mx.quantize(x, group_size=32, bits=own), group_size=32, bits=own)

    def rounding(keys: mx.array, values: mx.array) -> Any:
        return fetch(through(keys, of_keys), through(values, of_values))

    cache.update_and_fetch = rounding
    return cache


def test_mlx_lms_own_attention_is_given_what_it_can_read(own_database: Path) -> None:
    """It has one number of bits; keys and values quantized apart are dequantized for it."""
    from metalgen.mlx_lm import PackedKVCache
    from metalgen.mlx_lm.attention import scaled_dot_product_attention

    with patch(device="reference"):
        cache = PackedKVCache(bits=(4, 8), group_size=(64, 32))
        k, v = (mx.random.normal((1, 2, 9, 64), key=mx.random.key(n)) for n in range(2))
        q = mx.random.normal((1, 4, 1, 64), key=mx.random.key(2))
        keys, values = cache.update_and_fetch(k, v)
        ours = scaled_dot_product_attention(q, keys, values, cache, 0.125, None)
    theirs = scaled_dot_product_attention(q, keys, values, cache, 0.125, None)
    whole = mx.dequantize(*keys, 64, 4), mx.dequantize(*values, 32, 8)
    expected = mx.fast.scaled_dot_product_attention(q, *whole, scale=0.125)
    assert largest(ours - expected) < 1e-5 and largest(theirs - expected) < 1e-5


def test_sequences_are_merged_and_taken_out_again(own_database: Path) -> None:
    built = zoo.model("gemma3_text")
    patch(device="reference")
    mx.random.seed(1)
    tokens = mx.random.randint(0, zoo.VOCABULARY, (2, 18))
    single = [make_prompt_cache(built, kv_bits=8, group_size=32) for _ in range(2)]
    built(tokens[:1, :16], cache=single[0])
    built(tokens[1:, :10], cache=single[1])
    merged = [a.merge([a, b]) for a, b in zip(*single, strict=True)]
    together = built(mx.stack([tokens[0, 16:17], tokens[1, 10:11]]), cache=merged)
    again = [[c.extract(n) for c in merged] for n in range(2)]
    alone = [built(tokens[:1, 16:17], cache=single[0]), built(tokens[1:, 10:11], cache=single[1])]
    for n in range(2):
        assert largest(together[n] - alone[n][0]) < 1e-5 * largest(alone[n])
    later = [built(tokens[:1, 17:], cache=c[0]) for c in zip(again, strict=True)]
    expected = [built(tokens[:1, 17:], cache=c) for c in single]
    for a, b in zip(later, expected, strict=True):
        assert largest(a - b) < 1e-5 * largest(b)


@pytest.mark.parametrize("bits", [4, (8, 4)], ids=str)
def test_prompt_caches_are_saved_and_loaded(
    bits: int | tuple[int, int], tmp_path: Path, own_database: Path
) -> None:
    built = zoo.model("gemma3_text")
    patch(device="reference")
    module: Any = importlib.import_module("mlx_lm.models.cache")
    tokens = mx.arange(20)[None]
    held = make_prompt_cache(built, kv_bits=bits, group_size=32)
    built(tokens, cache=held)
    module.save_prompt_cache(str(tmp_path / "prompt.safetensors"), held)
    loaded = module.load_prompt_cache(str(tmp_path / "prompt.safetensors"))
    assert [type(c).__name__ for c in loaded] == [type(c).__name__ for c in held]
    a, b = (built(tokens[:, :1], cache=c) for c in (held, loaded))
    assert (a == b).all().item()


def test_rotating_caches_can_be_quantized_while_patched(own_database: Path) -> None:
    module: Any = importlib.import_module("mlx_lm.models.cache")
    rows = mx.random.normal((1, 2, 9, 32))

    def filled() -> Any:
        cache = module.RotatingKVCache(max_size=16)
        cache.update_and_fetch(rows, rows)
        return cache

    with pytest.raises(NotImplementedError):
        filled().to_quantized(group_size=32, bits=8)
    with patch(device="reference"):
        cache = filled().to_quantized(group_size=32, bits=8)
        keys = dequantized(cache.keys_and_values()[0], cache)
        assert 0 < largest(keys - rows) < 0.02 * largest(rows)
    with pytest.raises(NotImplementedError):
        filled().to_quantized(group_size=32, bits=8)
    assert not hasattr(module, "PackedKVCache") and not unpatch()


def test_what_cannot_be_quantized_is_said() -> None:
    from metalgen.mlx_lm import PackedKVCache

    with pytest.raises(ArgumentError, match="bits: expected one of 4, 8"):
        PackedKVCache(bits=3)
    with pytest.raises(ArgumentError, match="group_size: expected one of 32, 64, 128, or a pair"):
        PackedKVCache(bits=(8, 4), group_size=(64, 16))
    with pytest.raises(ArgumentError, match="a multiple of the group of 64"):
        PackedKVCache(bits=8).update_and_fetch(mx.zeros((1, 1, 1, 32)), mx.zeros((1, 1, 1, 32)))


def test_latent_attention_reads_keys_alone(own_database: Path) -> None:
    """Its values are columns of the keys, so the bits of values change nothing."""
    from metalgen.mlx_lm.caches import quantized

    built = zoo.model("deepseek_v3")
    with patch(device="reference"):
        alike, apart = (
            zoo.logits(built, [quantized(cache, bits, 32) for cache in zoo.caches(built, "own")], 1)
            for bits in (8, (8, 4))
        )
    assert (alike == apart).all().item()
