"""An array of which keys are seen."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.features.arrays import scores
from metalgen.features.base import (
    Feature,
    Field,
    Hooks,
    Macros,
    OptionalInput,
    Site,
)
from metalgen.features.checks import switch
from metalgen.features.conversions import booleans
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler

SEEN_SHARE = 0.8
"""Share of the keys that a made-up mask leaves."""
SAMPLE_BLOCK = 64
"""Queries and keys of the blocks of a made-up mask that is listed: a third has no key, and of the
others a third has all."""

LISTED_FROM = 1 << 22
"""Scores of a call from which on the tiles of its mask are found first: that takes about ten short
MLX operations, which pass twice over the array. Chosen by estimate, not measured."""


def finds_tiles(batch_heads: int, q_len: int, kv_len: int) -> bool:
    """Whether a call with an array of booleans gains by a list of the tiles that it leaves."""
    return batch_heads * q_len * kv_len >= LISTED_FROM


def _mask(sampler: Sampler) -> mx.array:
    shape = sampler.broadcast(sampler.scores)
    seen = sampler.bernoulli(SEEN_SHARE, shape)
    if not sampler.config.block_mask or sampler.config.mask_mod is not None:
        return seen
    blocks = (*shape[:2], *(-(-size // SAMPLE_BLOCK) for size in shape[2:]))
    none, every = (sampler.bernoulli(1 / 3, blocks) for _ in range(2))
    for axis, size in ((2, shape[2]), (3, shape[3])):
        places = mx.arange(size) // SAMPLE_BLOCK
        none, every = mx.take(none, places, axis=axis), mx.take(every, places, axis=axis)
    return (seen | every) & ~none


class ArrayMask(Feature):
    """``(B, H, Lq, Lk)`` of booleans, each axis of which may be 1."""

    name = "array_mask"
    has_backward = True
    fields = (Field("array_mask", switch, False, "mask"),)
    inputs = (
        OptionalInput(
            "array_mask",
            ("bool_",),
            scores,
            option="mask",
            convert=lambda option, x, config: booleans(x),
            sample=_mask,
            cut="scores",
            binding="broadcast",
        ),
    )
    rank = 1

    def hooks(self, config: Fields, site: Site) -> Hooks:
        known = config.block_mask and config.mask_mod is None
        return Hooks(masks=[Macros("array_mask", {"every": "unmasked" if known else "false"})])
