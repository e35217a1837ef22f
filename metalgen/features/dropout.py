"""Dropout of attention weights, by random words of their place alone (see `metalgen.philox`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from metalgen.arguments import as_number
from metalgen.errors import ArgumentError
from metalgen.features.arrays import vector
from metalgen.features.base import Feature, Field, Hooks, Macros, OptionalInput, Site, unused
from metalgen.features.conversions import dropout_key
from metalgen.features.fields import Fields


def _share(name: str, value: Any, config: Fields) -> float:
    number = as_number(value)
    if number is None or not 0 <= number < 1:
        raise ArgumentError(name, "a number from 0 to below 1", value)
    return number


class Dropout(Feature):
    """Weights are dropped, and the others divided by what is left of 1."""

    name = "dropout"
    has_backward = True
    fields = (Field("dropout", _share, 0.0, "dropout"),)
    inputs = (
        OptionalInput(
            "dropout_key",
            ("uint32",),
            vector(lambda arrays: 2),
            option="dropout_key",
            convert=lambda option, x, config: dropout_key(config, x),
            sample=lambda sampler: mx.random.key(sampler.seed),
        ),
    )
    variables = unused(kept="")
    rank = 3
    numbered = True

    def words(self, config: Fields) -> Iterable[str]:
        yield f"dropout{config.dropout:g}"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        dropped = min(round(config.dropout * 2**32), 2**32 - 1)
        return Hooks(
            probabilities=[Macros("dropout", {"aligned": site.bk % 16 == 0})],
            lines=[f"constexpr unsigned int DROPPED = {dropped}u;"],
            header=["philox"],
            variables={
                "sequences": True,
                "kept": f" * {1 / (1 - config.dropout):.9e}f",
            },
        )
