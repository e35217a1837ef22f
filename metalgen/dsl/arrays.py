"""Captured arrays in a trace: which of their axes are indexed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx


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

    def replay(self, constant: Callable[[int], int | None]) -> mx.array | None:
        """The elements that are left as an array; None where an index is no constant.

        Args:
            constant: the value of a node, or None.
        """
        places: list[int | slice] = []
        for axis, index in enumerate(self.indices):
            value = None if index is None else constant(index)
            if value is None:
                if index is not None:
                    return None
                places.append(slice(None))
            else:  # as loads do: from the end where negative, and the nearest element beyond
                size = self.array.shape[axis]
                places.append(min(max(value + size if value < 0 else value, 0), size - 1))
        left = [axis for axis, place in enumerate(places) if isinstance(place, slice)]
        found = self.array[tuple(places)] if len(left) < len(places) else self.array
        order = [left.index(axis) for axis in self.axes if axis in left]
        return mx.transpose(found, order).reshape(self.shape) if self.shape else found

    def fixed(self, constant: Callable[[int], int | None]) -> View:
        """With the axes that constants index reduced to that element, as loads take it."""
        array, indices = self.array, list(self.indices)
        for axis, index in enumerate(self.indices):
            value = None if index is None else constant(index)
            if value is not None:
                size = self.array.shape[axis]
                place = min(max(value + size if value < 0 else value, 0), size - 1)
                array, indices[axis] = mx.take(array, mx.array([place]), axis=axis), None
        return View(array, tuple(indices), self.axes)

    def batched(self, extents: Mapping[int, int]) -> mx.array:
        """What is left for all values of some indices, ``(*extents, *shape)``.

        Args:
            extents: how many values each index has, by the number of its node; see
                `shared_extents`.
        """
        places = [self.indices.index(n) if n in self.indices else None for n in extents]
        order = [axis for axis in (*places, *self.axes) if axis is not None]
        order += [axis for axis in range(self.array.ndim) if axis not in order]  # of one element
        own = [1 if axis is None else self.array.shape[axis] for axis in places]
        array = mx.transpose(self.array, order).reshape((*own, *self.shape))
        return mx.broadcast_to(array, (*extents.values(), *self.shape))

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


def shared_extents(views: Sequence[View]) -> dict[int, int] | None:
    """The indices of views, by their nodes, with the extents of the axes that they index.

    None where no view has all of them (so that what is computed for all of their values would
    outgrow the arrays), where extents differ, or where a node indexes an array twice.
    """
    found: dict[int, int] = {}
    for view in sorted(views, key=lambda v: sum(n is not None for n in v.indices), reverse=True):
        own = [
            (n, extent)
            for n, extent in zip(view.indices, view.array.shape, strict=True)
            if n is not None
        ]
        found = found or dict(own)
        if len(dict(own)) < len(own) or any(found.get(n) != extent for n, extent in own):
            return None
    return found
