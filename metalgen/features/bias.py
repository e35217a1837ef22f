"""An array that is added to the scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.features.arrays import scores
from metalgen.features.base import (
    Feature,
    Field,
    Hooks,
    Macros,
    OptionalInput,
    Site,
    SumBy,
    Summed,
)
from metalgen.features.checks import switch
from metalgen.features.contents import finite_or_masked
from metalgen.features.conversions import scores as as_scores
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler


def _bias(sampler: Sampler) -> mx.array:
    own: mx.Dtype = getattr(mx, sampler.config.dtype)
    dtype = sampler.choices.choice([mx.float32, own]) if sampler.ragged else own
    return sampler.normal(sampler.broadcast(sampler.scores)).astype(dtype)


class Bias(Feature):
    """``(B, H, Lq, Lk)``, each axis of which may be 1."""

    name = "bias"
    has_backward = True
    fields = (Field("bias", switch, False, "bias"),)
    inputs = (
        OptionalInput(
            "bias",
            ("float32", "config"),
            scores,
            option="bias",
            convert=lambda option, x, config: as_scores(x, getattr(mx, config.dtype)),
            sample=_bias,
            contents=finite_or_masked,
            cut="scores",
            binding="broadcast",
        ),
    )
    rank = 1
    adds = True

    def sums(self, config: Fields, inputs: Any) -> list[Summed]:
        queries, keys = inputs.bias.shape[2:]
        by: SumBy = "query" if keys == 1 else "key" if queries == 1 else "pair"
        return [Summed("bias", by, add="bias")]

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(adds={"bias": Macros("bias")})
