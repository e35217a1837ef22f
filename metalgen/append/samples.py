"""A small ragged call of an append kernel: what it is checked with before it is used."""

from __future__ import annotations

import mlx.core as mx

from metalgen.families.append import inputs
from metalgen.problem.config import AttentionConfig


def sample_rows(config: AttentionConfig, seed: int = 0) -> dict[str, mx.array]:
    """Inputs by name, as `metalgen.families.append.inputs` lists them.

    Two heads, keys and values as ``(B, L, H, D)`` views; sequences that start anywhere, one of
    them empty, one with a page that is not there, one that runs off its pages.
    """
    batch, length = (1, 11) if config.varlen else (3, 5)
    dtype = getattr(mx, config.dtype)
    page = config.page_size or 8
    given = {}
    for name, width in (("k", config.head_dim), ("v", config.v_dim)):
        key = mx.random.key(2 * seed + (name == "v"))
        x = mx.random.normal((batch, length, 2, width), key=key)
        given[name] = x.astype(dtype).swapaxes(1, 2)
    starts = [page - 2, 0, 2 * page - 1]
    given["cu_seqlens"] = mx.array([0, 5, 5, 10])
    given["offset"] = mx.array(starts)
    given["limit"] = mx.array([7 if config.page_size else 2 * page + 3])
    given["table"] = mx.array([[4, -1], [0, 2], [1, 5]])
    given["rope_freqs"] = 0.7 ** mx.arange(max(1, config.rotary_dim // 2)).astype(mx.float32)
    angles = mx.arange(103)[:, None] * given["rope_freqs"]  # the last rows lie outside
    given["rope_cos"], given["rope_sin"] = 0.9 * mx.cos(angles), 0.9 * mx.sin(angles)
    given["rope_offset"] = mx.array([100, 0, 7])
    return {name: given[name] for name in inputs(config)}
