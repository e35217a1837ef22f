"""ALiBi (Press et al., 2022): scores fall with the distance of query and key."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays, per_head, per_sequence
from metalgen.features.base import (
    Feature,
    Field,
    Hooks,
    Macros,
    OptionalInput,
    Site,
    Summed,
)
from metalgen.features.checks import switch
from metalgen.features.contents import finite
from metalgen.features.conversions import numbers
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler


def _slopes(sampler: Sampler) -> mx.array:
    heads = mx.arange(1, sampler.heads + 1, dtype=mx.float32)
    slopes = mx.power(2.0, -8 * heads / sampler.heads)
    if not sampler.config.alibi_by_sequence:
        return slopes
    return slopes / mx.arange(1, sampler.batch + 1, dtype=mx.float32)[:, None]


def _shape(array: mx.array, arrays: Arrays) -> str | None:
    wanted = [per_sequence(arrays)] if arrays.config.alibi_by_sequence else []
    shape = (*wanted, per_head(arrays))
    return None if array.shape == shape else str(shape)


def _converted(option: str, x: Any, config: Fields) -> mx.array | None:
    found = numbers(option, x)
    if found is not None and found.ndim not in (1, 2):
        raise ArgumentError(f"{option}.shape", "(H,) or (N, H)", found.shape)
    return found


class Alibi(Feature):
    """A slope per query head."""

    name = "alibi"
    has_backward = True
    fields = (Field("alibi", switch, False, "alibi_slopes"),)
    inputs = (
        OptionalInput(
            "alibi_slopes",
            ("float32",),
            _shape,
            option="alibi_slopes",
            convert=_converted,
            sample=_slopes,
            contents=finite,
            cut="heads",
        ),
    )
    rank = 1
    adds = True

    def sums(self, config: Fields, inputs: Any) -> list[Summed]:
        return [Summed("alibi_slopes", "query", add="alibi")]

    def hooks(self, config: Fields, site: Site) -> Hooks:
        entry = "min(sequence, sequences - 1)" if config.varlen else "sequence"
        entry = entry if config.alibi_by_sequence else ""
        return Hooks(adds={"alibi": Macros("alibi", {"entry": entry})})


class AlibiBySequence(Feature):
    """The slopes are those of each sequence."""

    name = "alibi_by_sequence"
    has_backward = True
    fields = (Field("alibi_by_sequence", switch, False),)
    rank = 1

    def check(self, config: Fields) -> None:
        if not config.alibi:
            raise ArgumentError("alibi_by_sequence", "False without alibi", True)

    def words(self, config: Fields) -> Iterable[str]:
        yield "by sequence"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(variables={"sequences": True})
