"""Rotary embedding of the queries in the kernel (Su et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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


def _tables(name: str, value: Any, config: Fields) -> bool:
    return switch(name, value, config) and config.rope is not None


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


def _table(function: Callable[[mx.array], mx.array]) -> Callable[[Sampler], mx.array]:
    """Makes up a table of a function of angles, scaled as YaRN scales both."""

    def sample(sampler: Sampler) -> mx.array:
        positions = mx.arange(LAST_OFFSET + max(sampler.q_len, sampler.kv_len))
        return 1.1 * function(positions[:, None] * _frequencies(sampler))

    return sample


def _offsets(sampler: Sampler) -> mx.array:
    end = max(0, sampler.kv_len - sampler.q_len)
    offsets = [
        sampler.choices.randrange(LAST_OFFSET) if sampler.ragged else end
        for _ in range(sampler.batch)
    ]
    return mx.array(offsets, mx.int32)


def _positions(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    yield values < 0, "a position, 0 or more"
    if arrays.config.rope_tables:
        import numpy as np

        length = arrays.q.shape[2]
        if arrays.inputs.cu_q is not None:
            starts = np.array(arrays.inputs.cu_q)
            length = np.maximum(starts[1:] - starts[:-1], 1)
        last = values.astype(np.int64) + (0 if arrays.config.rope_fixed else length - 1)
        rows = arrays.inputs.rope_cos.shape[0]
        yield last >= rows, f"positions of all queries in tables of {rows} rows"


def _rows_of_tables(array: mx.array, arrays: Arrays) -> str | None:
    """A row for each position, as many in both tables."""
    pairs = arrays.config.rotary_dim // 2
    if array.ndim != 2 or array.shape[1] != pairs or not array.shape[0]:
        return f"(positions, {pairs}), half the columns that turn"
    other = arrays.inputs.rope_cos
    if other is not None and other.ndim == 2 and other.shape != array.shape:
        return f"{other.shape}, as the table of cosines"
    return None


def rotated(x: mx.array, cos: mx.array, sin: mx.array, style: str) -> mx.array:
    """Rows rotated by plain MLX operations, in float32, rounded to their type (Su et al., 2021).

    Args:
        x: ``(..., D)``.
        cos, sin: ``(..., pairs)``, of the rows' angles; the columns behind 2 * pairs stay.
        style: ``"half"`` or ``"pairs"``, which columns form a pair.
    """
    pairs = cos.shape[-1]
    part, rest = x[..., : 2 * pairs].astype(mx.float32), x[..., 2 * pairs :]
    if style == "half":
        one, other = part[..., :pairs], part[..., pairs:]
    else:
        one, other = part[..., ::2], part[..., 1::2]
    both = [one * cos - other * sin, one * sin + other * cos]
    if style == "half":
        out = mx.concatenate(both, axis=-1)
    else:
        out = mx.stack(both, axis=-1).reshape(part.shape)
    return mx.concatenate([out.astype(x.dtype), rest], axis=-1)


class Rotary(Feature):
    """Queries rotate with their position; keys come rotated already."""

    name = "rotary"
    fields = (
        Field("rope", _style, None, "rope.style"),
        Field("rope_dims", _dims, None, "rope.dims"),
        Field("rope_fixed", _fixed, False, "rope.one_position"),
        Field("rope_tables", _tables, False, "rope.tables"),
    )
    inputs = (
        OptionalInput(
            "rope_freqs",
            ("float32",),
            vector(lambda arrays: arrays.config.rotary_dim // 2),
            option="rope.freqs",
            sample=_frequencies,
            required=lambda config: not config.rope_tables,
            contents=finite,
        ),
        *(
            OptionalInput(
                f"rope_{name}",
                ("float32",),
                _rows_of_tables,
                option=f"rope.tables[{place}]",
                sample=_table(function),
                required=lambda config: config.rope_tables,
                contents=finite,
            )
            for place, (name, function) in enumerate((("cos", mx.cos), ("sin", mx.sin)))
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
    variables = unused(rope=None, rope_tables=False)
    rank = 4

    def check(self, config: Fields) -> None:
        if config.rope_dims is None:
            _even("head_dim", config.head_dim, config)

    def words(self, config: Fields) -> Iterable[str]:
        yield f"rope:{config.rope}" + (f"{config.rotary_dim}" if config.rope_dims else "")
        if config.rope_fixed:
            yield "at one position"
        if config.rope_tables:
            yield "by tables"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        position = "rope_offset[sequence]"
        if config.varlen:
            position = f"sequence == sequences ? 0 : {position}"
        return Hooks(
            header=["rotary_tables" if config.rope_tables else "rotary"],
            variables={
                "sequences": True,
                "rope": config.rope,
                "turned": config.rotary_dim,
                "first_position": position,
                "rope_steps": not config.rope_fixed,
                "rope_tables": config.rope_tables,
            },
        )
