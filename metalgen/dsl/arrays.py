"""Captured arrays in a trace: which axes are indexed, and what is computed from whole arrays."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen.dsl.operations import BINARY, BITWISE, LOGS, UNARY


@dataclass(frozen=True, eq=False)
class View:
    """A captured array of which some axes are indexed.

    Args:
        array: the captured array.
        indices: for each of its axes the number of the node that indexes it, or None.
        axes: for each axis of the view that of the array, or None for an axis of one element.
    """

    array: mx.array
    indices: tuple[int | None, ...]
    axes: tuple[int | None, ...]

    @staticmethod
    def whole(array: mx.array) -> View:
        """All of an array."""
        return View(array, (None,) * array.ndim, tuple(range(array.ndim)))

    @property
    def shape(self) -> tuple[int, ...]:
        """Extents of the axes that are left."""
        return tuple(1 if axis is None else self.array.shape[axis] for axis in self.axes)

    @property
    def size(self) -> int:
        """How many elements are left."""
        return math.prod(self.shape)

    @property
    def unindexed(self) -> bool:
        """Whether no axis is indexed."""
        return all(index is None for index in self.indices)

    def replay(self) -> mx.array:
        """The array, where nothing is indexed."""
        return self.array.reshape(self.shape) if self.shape != self.array.shape else self.array

    def gathered(self, numbers: dict[int, int], sizes: Sequence[int]) -> View | None:
        """With some axes indexed, which keep one element; None where slices are taken."""
        indices, axes = list(self.indices), list(self.axes)
        for place, size in enumerate(sizes):
            axis = self.axes[place]
            if place in numbers:
                if size != 1:
                    return None
                if axis is not None:
                    indices[axis] = numbers[place]
                    axes[place] = None
            elif size != self.shape[place]:
                return None
        return View(self.array, tuple(indices), tuple(axes))

    def transposed(self, order: Sequence[int]) -> View:
        """With its axes in another order."""
        return View(self.array, self.indices, tuple(self.axes[place] for place in order))

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """With axes of one element dropped or added; None where it takes more than that."""
        wide = [axis for axis in self.axes if axis is not None and self.array.shape[axis] != 1]
        if [n for n in shape if n != 1] != [self.array.shape[axis] for axis in wide]:
            return None
        left = iter(wide)
        return View(self.array, self.indices, tuple(None if n == 1 else next(left) for n in shape))


OnArrays = Callable[[list[Any], list[Any]], Any]
_REDUCE = ("all", "any", "sum", "prod", "min", "max")


def _slice(values: list[Any], arguments: list[Any]) -> Any:
    return values[0][tuple(slice(*ends) for ends in zip(*arguments, strict=True))]


def _elementwise(name: str) -> OnArrays:
    return lambda values, arguments: getattr(mx, name)(*values)


ON_ARRAYS: dict[str, OnArrays] = {
    **{name: _elementwise(function) for name, function in (BINARY | UNARY).items()},
    "BitwiseBinary": lambda v, a: getattr(mx, BITWISE[int(a[0])])(*v),
    "Log": lambda v, a: getattr(mx, LOGS[int(a[0])])(*v),
    "Sqrt": lambda v, a: mx.rsqrt(v[0]) if a[0] else mx.sqrt(v[0]),
    "Select": lambda v, a: mx.where(*v),
    "AsType": lambda v, a: v[0].astype(a[0]),
    "Arange": lambda v, a: mx.arange(*a),
    "Transpose": lambda v, a: mx.transpose(v[0], a[0]),
    "Reshape": lambda v, a: mx.reshape(v[0], a[0]),
    "Flatten": lambda v, a: mx.flatten(v[0], a[0], a[1]),
    "Unflatten": lambda v, a: mx.unflatten(v[0], a[0], a[1]),
    "Squeeze": lambda v, a: mx.squeeze(v[0], tuple(a[0])),
    "ExpandDims": lambda v, a: mx.expand_dims(v[0], tuple(a[0])),
    "Full": lambda v, a: mx.broadcast_to(v[0], a[0]),
    "Broadcast": lambda v, a: mx.broadcast_to(v[0], a[0]),
    "Softmax": lambda v, a: mx.softmax(v[0], axis=-1),
    "LogSumExp": lambda v, a: mx.logsumexp(v[0], axis=-1, keepdims=True),
    "Slice": _slice,
    "Concatenate": lambda v, a: mx.concatenate(v, a[0]),
    "Reduce": lambda v, a: getattr(mx, _REDUCE[a[0]])(v[0], axis=tuple(a[1]), keepdims=True),
}
"""What is computed from captured arrays alone, before the kernel, by MLX; by primitive."""
