"""ALiBi (Press et al., 2022): scores fall with the distance of query and key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.features.arrays import per_head, vector
from metalgen.features.base import (
    Feature,
    Field,
    Hooks,
    Macros,
    OptionalInput,
    Site,
)
from metalgen.features.checks import switch
from metalgen.features.contents import finite
from metalgen.features.conversions import numbers
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler


def _slopes(sampler: Sampler) -> mx.array:
    heads = mx.arange(1, sampler.heads + 1, dtype=mx.float32)
    return mx.power(2.0, -8 * heads / sampler.heads)


class Alibi(Feature):
    """A slope per query head."""

    name = "alibi"
    has_backward = True
    fields = (Field("alibi", switch, False, "alibi_slopes"),)
    inputs = (
        OptionalInput(
            "alibi_slopes",
            ("float32",),
            vector(per_head),
            option="alibi_slopes",
            convert=lambda option, x, config: numbers(option, x),
            sample=_slopes,
            contents=finite,
            cut="heads",
        ),
    )
    rank = 1
    adds = True

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(adds={"alibi": Macros("alibi")})
