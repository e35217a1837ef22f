"""Calls made up for a config: what kernels are checked and timed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.inputs import NOTHING, Inputs

if TYPE_CHECKING:
    from metalgen.config import AttentionConfig
    from metalgen.dsl.graph import Graph


def synthetic_inputs(
    config: AttentionConfig, batch: int, heads: int, q_len: int, kv_len: int, seed: int
) -> Inputs:
    """Inputs for checking a kernel: normal floats, small integers, and the mask's own blocks."""
    if config.score_mod is None and config.mask_mod is None:
        return NOTHING
    from metalgen.block_mask import BlockMask, _computed
    from metalgen.dsl.graph import parse
    from metalgen.dsl.trace import Traced

    graphs: dict[str, Graph] = {}
    arrays: dict[str, tuple[mx.array, ...]] = {"score": (), "mask": ()}
    for role, text in (("score", config.score_mod), ("mask", config.mask_mod)):
        if text is not None:
            graphs[role] = parse(text)
            seeds = range(seed, seed + len(graphs[role].arrays))
            arrays[role] = tuple(
                _synthetic(a.dtype, a.shape, s)
                for a, s in zip(graphs[role].arrays, seeds, strict=True)
            )
    blocks = None
    if config.block_mask:
        traced = Traced(graphs["mask"], arrays["mask"])
        some, every = _computed(traced, batch, heads, q_len, kv_len, 8, 8)
        blocks = BlockMask(traced, q_len, kv_len, (8, 8), some, every)
    return Inputs(arrays["score"], arrays["mask"], blocks)


def _synthetic(dtype: str, shape: tuple[int, ...], seed: int) -> mx.array:
    key = mx.random.key(1000 + seed)
    kind: Any = getattr(mx, "bool_" if dtype == "bool" else dtype)
    if "float" in dtype:
        return mx.random.normal(shape, key=key).astype(kind)
    return mx.random.randint(0, 2 if dtype == "bool" else 4, shape, key=key).astype(kind)
