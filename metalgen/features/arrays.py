"""The arrays of a call, and the shapes that its inputs must have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.fields import Fields


class Arrays(NamedTuple):
    """The arrays of a call: what an input must fit."""

    config: Fields
    q: mx.array
    k: mx.array
    v: mx.array
    inputs: Any

    @property
    def sequences(self) -> int:
        """Number of sequences: q's batch entries, or what `cu_q` cuts out."""
        starts = self.inputs.cu_q
        return int(self.q.shape[0] if starts is None else starts.size - 1)

    @property
    def max_kv_len(self) -> int:
        """How many keys a sequence has at most."""
        return max_kv_len(self.config, self.k, self.inputs)


def max_kv_len(config: Fields, k: mx.array, inputs: Any) -> int:
    """How many keys a sequence has at most."""
    if config.page_size is None or inputs.block_table is None:
        return int(k.shape[2])
    return int(inputs.block_table.shape[1]) * config.page_size


Shape = Callable[[mx.array, Arrays], str | None]
"""What was expected of a shape that does not fit; None where it does."""


def vector(size: Callable[[Arrays], int]) -> Shape:
    """One axis of this many elements."""

    def expected(array: mx.array, arrays: Arrays) -> str | None:
        wanted = size(arrays)
        return None if array.shape == (wanted,) else f"({wanted},)"

    return expected


def exactly(shape: Callable[[Arrays], tuple[int, ...]]) -> Shape:
    """This shape."""

    def expected(array: mx.array, arrays: Arrays) -> str | None:
        wanted = shape(arrays)
        return None if array.shape == wanted else str(wanted)

    return expected


def per_sequence(arrays: Arrays) -> int:
    """An element per sequence."""
    return arrays.sequences


def per_head(arrays: Arrays) -> int:
    """An element per query head."""
    return int(arrays.q.shape[1])


def scores(array: mx.array, arrays: Arrays) -> str | None:
    """Four axes that broadcast to ``(B, H, Lq, Lk)``."""
    return broadcasts(array, (*arrays.q.shape[:3], arrays.max_kv_len))


def broadcasts(array: mx.array, whole: tuple[int, ...]) -> str | None:
    """Four axes, each as in a shape or 1."""
    fits = [a in (1, b) for a, b in zip(array.shape, whole, strict=False)]
    return None if array.ndim == 4 and all(fits) else f"4 axes that broadcast to {whole}"


def check_type(name: str, array: mx.array, dtypes: Sequence[str]) -> None:
    """Whether an array has one of these types, by their names; raises `ArgumentError`."""
    dtype = array.dtype
    for each in dtypes:
        if dtype == getattr(mx, each):
            return
    names = dict.fromkeys(each.rstrip("_") for each in dtypes)
    raise ArgumentError(f"{name}.dtype", " or ".join(names), str(dtype))
