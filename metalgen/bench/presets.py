"""The rows of each preset: those of benchmarks that people know, and our own."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from metalgen.bench.work import Preset, Work
from metalgen.errors import ArgumentError
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.presets import MODELS, Layer


@dataclass(frozen=True)
class CacheSizes:
    """Sizes of the ``kv`` preset, every combination of them a row."""

    batches: tuple[int, ...] = (1, 2)
    live: tuple[int, ...] = (64, 256)
    capacity: tuple[int, ...] = (512, 2048)
    pages: tuple[int, ...] = (128, 256)
    queries: tuple[int, ...] = (1, 16)
    heads: tuple[int, ...] = (8,)
    head_dims: tuple[int, ...] = (64,)


def seeds(dtype: str) -> Iterator[Work]:
    """48 layers of batch x length x width, then those of four models at three lengths."""
    for batch, length, dim in itertools.product((1, 2, 4, 8), (64, 128, 256, 512), (32, 64, 128)):
        yield Work(AttentionConfig(dim, dtype), batch, 8, length, length, "layer")
    models = (("TinyLlama", 32, 64), ("Qwen2.5", 12, 128), ("Llama-7B", 32, 128), ("GPT-M", 16, 64))
    for (name, heads, dim), length in itertools.product(models, (128, 256, 512)):
        yield Work(AttentionConfig(dim, dtype), 1, heads, length, length, "layer", label=name)


def mlx(dtype: str) -> Iterator[Work]:
    """Shapes of MLX's own attention benchmarks: 32 query heads, 8 of keys and values."""
    lengths = [(n, n) for n in (32, 64, 128, 256, 512, 1024, 2048, 4096)]
    for dim, (q_len, kv_len) in itertools.product((64, 80, 128), [*lengths, (4096, 5000)]):
        for mask in ({}, {"causal": True}, {"array_mask": True}):
            yield Work(AttentionConfig(dim, dtype, heads_per_kv=4, **mask), 1, 32, q_len, kv_len)  # type: ignore[arg-type]
    for dim in (64, 80, 128):
        yield Work(AttentionConfig(dim, dtype, heads_per_kv=4), 1, 32, 2048, 32121)
        yield Work(AttentionConfig(dim, dtype, heads_per_kv=4), 1, 32, 1, 16384)


def flash_attn(dtype: str, train: bool = True) -> Iterator[Work]:
    """Shapes of flash-attention's benchmark: 16,384 tokens, 2,048 columns."""
    for dim, causal in itertools.product((64, 128), (False, True)):
        for batch, length in ((32, 512), (16, 1024), (8, 2048), (4, 4096), (2, 8192), (1, 16384)):
            config = AttentionConfig(dim, dtype, causal=causal)
            for both in (False, True) if train else (False,):
                yield Work(config, batch, 2048 // dim, length, length, train=both)


def kv(dtype: str, sizes: CacheSizes = CacheSizes()) -> Iterator[Work]:
    """Caches: dense, paged and quantized."""
    for batch, live, capacity, page, queries, heads, dim in itertools.product(
        *(sizes.batches, sizes.live, sizes.capacity, sizes.pages, sizes.queries),
        *(sizes.heads, sizes.head_dims),
    ):
        if max(live, queries) > capacity:
            continue
        config = AttentionConfig(dim, dtype, causal=True)
        keys = max(live, queries)
        yield Work(
            *(config, batch, heads, queries, keys, "cache"), capacity=capacity, page_size=page
        )


def mlx_lm(dtype: str) -> Iterator[Work]:
    """Layers of models as mlx-lm calls them: prefill, decode, verification, a padded batch."""
    names = ("llama-3.2-1b", "llama-3-8b", "qwen3-8b", "gemma-2-9b", "gemma-3-4b", "gpt-oss-20b")
    for model in MODELS:
        for layer in model.layers if model.name in names else ():
            label = f"{model.name} {layer.label}".rstrip()
            config = _config(layer, dtype)
            yield Work(config, 1, layer.heads, 4096, 4096, label=label)
            yield Work(config, 1, layer.heads, 1, 4096, label=label)
            if layer.label in ("", "global", "full"):
                yield Work(config, 1, layer.heads, 16, 4096, label=label)
                padded = replace(config, causal=False, array_mask=True)
                yield Work(padded, 8, layer.heads, 1024, 1024, label=f"{label}, padded batch")
                for bits in (8, 4):
                    quantized = replace(config, kv_bits=bits, kv_group=64)
                    yield Work(quantized, 1, layer.heads, 1, 4096, label=f"{label}, {bits} bits")


def train(dtype: str) -> Iterator[Work]:
    """Forward and backward: causal, a window, a softcap."""
    for dim, length in itertools.product((64, 128), (2048, 4096, 8192)):
        for mask in ({}, {"window_left": 1023}, {"softcap": 50.0}):
            config = AttentionConfig(dim, dtype, heads_per_kv=4, causal=True, **mask)
            yield Work(config, 1, 32, length, length, train=True)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window of 1,024": {"causal": True, "window_left": 1023},
    "softcap": {"causal": True, "softcap": 50.0},
    "ALiBi": {"causal": True, "alibi": True},
    "sinks": {"causal": True, "sinks": True},
    "bias": {"bias": True},
    "boolean mask": {"array_mask": True},
    "lengths": {"causal": True, "kv_lens": True},
    "packed": {"causal": True, "varlen": True},
    "pages of 64": {"causal": True, "kv_lens": True, "page_size": 64},
    "8-bit keys": {"causal": True, "kv_bits": 8, "kv_group": 64},
    "rotary": {"causal": True, "rope": "half"},
    "dropout": {"causal": True, "dropout": 0.1},
}


def features(dtype: str) -> Iterator[Work]:
    """One row a feature, at 4,096 queries and keys."""
    for dim, (name, fields) in itertools.product((64, 128), FEATURES.items()):
        yield Work(AttentionConfig(dim, dtype, **fields), 4, 16, 4096, 4096, label=name)


def _config(layer: Layer, dtype: str) -> AttentionConfig:
    return AttentionConfig(
        layer.head_dim,
        dtype,
        value_head_dim=layer.value_head_dim,
        heads_per_kv=layer.heads // layer.kv_heads,
        causal=True,
        window_left=None if layer.window is None else layer.window - 1,
        softcap=layer.softcap,
        sinks=layer.sinks,
    )


PRESETS: dict[str, tuple[str, str, Callable[..., Iterator[Work]]]] = {
    "seeds": ("whole layers: by hand, MLX's layer, MLX's fused attention, ours", "tokens/s", seeds),
    "mlx": ("the shapes of MLX's own benchmarks", "TFLOP/s", mlx),
    "flash-attn": ("the shapes of flash-attention's benchmark", "TFLOP/s", flash_attn),
    "kv": ("caches: dense, paged, quantized", "GB/s", kv),
    "mlx-lm": ("layers of models, as mlx-lm calls them", "TFLOP/s", mlx_lm),
    "train": ("forward and backward", "TFLOP/s", train),
    "features": ("each feature, against MLX operations written by hand", "TFLOP/s", features),
}
"""By name: what each is about, its unit, and its rows."""


def preset(name: str, dtype: str = "float16", cache: CacheSizes | None = None) -> Preset:
    """A preset by its name.

    Args:
        name: one of `PRESETS`.
        dtype: the type of the arrays.
        cache: sizes of the ``kv`` preset, where they are other than the usual ones.

    Raises:
        ArgumentError: an unknown name, or sizes for another preset than ``kv``.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(str(name).lower(), PRESETS, n=2, cutoff=0.4)
        hint = f"; the nearest: {', '.join(near)}" if near else ""
        raise ArgumentError("PRESET", f"one of {', '.join(PRESETS)}{hint}", name)
    about, unit, rows = PRESETS[name]
    if cache is None:
        works: Sequence[Work] = list(rows(dtype))
    elif name != "kv":
        raise ArgumentError("PRESET", "kv, with sizes of a cache", name)
    else:
        works = list(kv(dtype, cache))
        if not works:
            raise ArgumentError("--max-lengths", "one that holds the live keys", cache.capacity)
    return Preset(name, about, tuple(dict.fromkeys(works)), unit)
