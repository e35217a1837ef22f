"""Rotary embedding of the queries in the kernel (Su et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays, per_sequence, vector
from metalgen.features.base import Feature, Field, Hooks, OptionalInput, Site, unused
from metalgen.features.checks import one_of, switch
from metalgen.features.contents import finite
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler

ROPES = ("half", "pairs")
ROPE_BASE = 10000.0
LAST_OFFSET = 1000
"""Positions of first queries in made-up calls are below this."""


def _style(name: str, value: Any, config: Fields) -> str | None:
    found: str | None = one_of(name, value, (None, *ROPES))
    return found


def _dims(name: str, value: Any, config: Fields) -> int | None:
    if config.rope is None or value is None:
        return None
    dims = _even(name, value, config)
    return None if dims == config.head_dim else dims


def _fixed(name: str, value: Any, config: Fields) -> bool:
    return switch(name, value, config) and config.rope is not None


def _even(name: str, value: Any, config: Fields) -> int:
    dims = as_integer(value)
    if dims is None or not 2 <= dims <= config.head_dim or dims % 2:
        raise ArgumentError(name, f"an even number from 2 to {config.head_dim}", value)
    return dims


def _frequencies(sampler: Sampler) -> mx.array:
    dims = sampler.config.rotary_dim
    frequencies: mx.array = ROPE_BASE ** -(mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return frequencies


def _offsets(sampler: Sampler) -> mx.array:
    end = max(0, sampler.kv_len - sampler.q_len)
    offsets = [
        sampler.choices.randrange(LAST_OFFSET) if sampler.ragged else end
        for _ in range(sampler.batch)
    ]
    return mx.array(offsets, mx.int32)


def _positions(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    yield values < 0, "a position, 0 or more"


class Rotary(Feature):
    """Queries rotate with their position; keys come rotated already."""

    name = "rotary"
    fields = (
        Field("rope", _style, None, "rope.style"),
        Field("rope_dims", _dims, None, "rope.dims"),
        Field("rope_fixed", _fixed, False, "rope.one_position"),
    )
    inputs = (
        OptionalInput(
            "rope_freqs",
            ("float32",),
            vector(lambda arrays: arrays.config.rotary_dim // 2),
            option="rope.freqs",
            sample=_frequencies,
            contents=finite,
        ),
        OptionalInput(
            "rope_offset",
            ("int32",),
            vector(per_sequence),
            option="rope.offset",
            sample=_offsets,
            contents=_positions,
            cut="entries",
        ),
    )
    variables = unused(rope=None)
    rank = 4

    def check(self, config: Fields) -> None:
        if config.rope_dims is None:
            _even("head_dim", config.head_dim, config)

    def words(self, config: Fields) -> Iterable[str]:
        yield f"rope:{config.rope}" + (f"{config.rotary_dim}" if config.rope_dims else "")
        if config.rope_fixed:
            yield "at one position"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        position = "rope_offset[sequence]"
        if config.varlen:
            position = f"sequence == sequences ? 0 : {position}"
        return Hooks(
            header=["rotary"],
            variables={
                "sequences": True,
                "rope": config.rope,
                "turned": config.rotary_dim,
                "first_position": position,
                "rope_steps": not config.rope_fixed,
            },
        )
