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


def _mask(sampler: Sampler) -> mx.array:
    return sampler.bernoulli(SEEN_SHARE, sampler.broadcast(sampler.scores))


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
        return Hooks(masks=[Macros("array_mask")])
