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
def test_logits_are_those_of_keys_rounded_alike(name: str, kind: str, own_database: Path) -> None:
    """Against a plain cache that rounds each row as ``mx.quantize`` does."""
    from metalgen.mlx_lm.caches import quantized

    built = zoo.model(name)
    batch = 2 if kind == "batch" else 1
    patch(device="reference")
    rounding = [rounded(cache) for cache in zoo.caches(built, kind)]
    own = zoo.logits(built, rounding, batch)[:, 3:]
    held = [quantized(cache, 8, 32) for cache in zoo.caches(built, kind)]
    ours = zoo.logits(built, held, batch)[:, 3:]
    assert largest(ours - own) < 1e-5 * largest(own)
    assert stats().own == {}


def rounded(cache: Any) -> Any:
    fetch = cache.update_and_fetch

    def through(x: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(x, group_size=32, bits=8), group_size=32, bits=8)

    cache.update_and_fetch = lambda keys, values: fetch(through(keys), through(values))
    return cache


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


def test_prompt_caches_are_saved_and_loaded(tmp_path: Path, own_database: Path) -> None:
    built = zoo.model("gemma3_text")
    patch(device="reference")
    module: Any = importlib.import_module("mlx_lm.models.cache")
    tokens = mx.arange(20)[None]
    held = make_prompt_cache(built, kv_bits=4, group_size=32)
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
    with pytest.raises(ArgumentError, match="a multiple of the group of 64"):
        PackedKVCache(bits=8).update_and_fetch(mx.zeros((1, 1, 1, 32)), mx.zeros((1, 1, 1, 32)))
