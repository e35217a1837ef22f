"""Attention sinks (Xiao et al., 2024; gpt-oss): a logit per head that has no value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.features.arrays import per_head, vector
from metalgen.features.base import (
    HALF_LOG2E,
    Feature,
    Field,
    Hooks,
    Macros,
    OptionalInput,
    Site,
)
from metalgen.features.checks import switch
from metalgen.features.contents import finite_or_masked
from metalgen.features.conversions import numbers
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler


def _logits(sampler: Sampler) -> mx.array:
    return sampler.normal((sampler.heads,))


class Sinks(Feature):
    """One more key of each row, which takes its share of the softmax and gives nothing."""

    name = "sinks"
    has_backward = True
    fields = (Field("sinks", switch, False, "sinks"),)
    inputs = (
        OptionalInput(
            "sinks",
            ("float32",),
            vector(per_head),
            option="sinks",
            convert=lambda option, x, config: numbers(option, x),
            sample=_logits,
            contents=finite_or_masked,
            cut="heads",
        ),
    )
    rank = 1

    def empty_lse(self, inputs: Any) -> mx.array:
        logits: mx.array = inputs.sinks[None, :, None]
        return logits

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(outputs={"sinks": Macros("sinks")}, lines=[HALF_LOG2E])
