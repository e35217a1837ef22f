"""Where the first query of each sequence stands, as of a block of a longer sequence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.arguments import as_integer, check_integer
from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays, per_sequence, vector
from metalgen.features.base import Feature, Field, Hooks, OptionalInput, Site, unused
from metalgen.features.checks import switch
from metalgen.features.conversions import brief, integers
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler

MAX_OFFSET = 1 << 30


def _converted(option: str, value: Any, config: Fields) -> mx.array | None:
    """An integer as an array of no axes, or one for each sequence."""
    if value is None or isinstance(value, mx.array):
        return integers(option, value, 0, 1)
    if as_integer(value) is None:
        expected = "an integer, or an mlx.core.array of one for each sequence"
        raise ArgumentError(option, expected, brief(value))
    return mx.array(check_integer(option, value, -MAX_OFFSET, MAX_OFFSET), mx.int32)


def _made_up(sampler: Sampler) -> mx.array:
    """The end of the keys; with `ragged` from before the first key to behind the last."""
    end = sampler.kv_len - sampler.q_len
    span = (-sampler.q_len, sampler.kv_len)
    found = [
        sampler.choices.randint(*span) if sampler.ragged else end for _ in range(sampler.batch)
    ]
    return mx.array(found, mx.int32)


def _within(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    yield abs(values.astype("int64")) > MAX_OFFSET, f"{-MAX_OFFSET} to {MAX_OFFSET}"


class Offset(Feature):
    """Query i of a sequence is its query number ``q_offset + i``, for all that counts queries."""

    name = "q_offset"
    fields = (Field("q_offset", switch, False, "q_offset"),)
    inputs = (
        OptionalInput(
            "q_offset",
            ("int32",),
            vector(per_sequence),
            option="q_offset",
            convert=_converted,
            sample=_made_up,
            contents=_within,
            cut="entries",
        ),
    )
    variables = unused(query_offset="kv_len - q_len", query_number="")
    rank = 2
    has_backward = True

    def excludes(self, config: Fields) -> Mapping[str, str]:
        if config.mask_mod is None:
            return {}  # an array's rows are those of q
        return {"block_mask": "its default with q_offset; use the mask_mod alone"}

    def hooks(self, config: Fields, site: Site) -> Hooks:
        offset = "q_offset[sequence]"
        offset = f"sequence == sequences ? 0 : {offset}" if config.varlen else offset
        return Hooks(
            variables={"sequences": True, "query_offset": offset, "query_number": " + offset"}
        )
