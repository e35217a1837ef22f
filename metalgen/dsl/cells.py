"""Short rows in a trace: arrays of which each element is a scalar of the kernel.

What is left of a captured array that is indexed in some axes only, such as ``keys[b, j]``, is such
a row. Operations on rows become operations on their elements, and reductions chains of them, so
rows are short: a kernel computes all of it for each score.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from metalgen.dsl.operations import BINARY, UNARY

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from metalgen.dsl.arrays import View

    Row = NDArray[np.int64]
    """Numbers of nodes, in the shape of the array that they are."""

MOST = 128
"""Elements of a row, or of all rows of an operation's result."""
ELEMENTWISE = frozenset((*BINARY, *UNARY, "BitwiseBinary", "Log", "Sqrt", "Select", "AsType"))
"""Primitives that compute each element by itself."""
Apply = Callable[[str, list[Any], list[int], "str | None"], int]
"""``apply(primitive, arguments, nodes, dtype)``: the node of an operation on scalars."""
REDUCED_BY = ("LogicalAnd", "LogicalOr", "Add", "Multiply", "Minimum", "Maximum")
"""What joins two elements, by MLX's number of a reduction."""


class TooLong(Exception):
    """An array with more elements than `MOST`, or with none; the argument is its shape."""


def filled(shape: Sequence[int], make: Callable[[tuple[int, ...]], int]) -> Row:
    """Cells of a shape; ``make(place)`` gives each.

    Raises:
        TooLong: there are too many.
    """
    found = np.zeros(check(shape), np.int64)
    for place in itertools.product(*map(range, shape)):
        found[place] = make(place)
    return found


def check(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape that is short enough; raises `TooLong`."""
    if int(np.prod(shape)) > MOST:
        raise TooLong(tuple(shape))
    return tuple(shape)


def of_view(view: View, constant: Callable[[int], int], load: Callable[[View], int]) -> Row:
    """The elements that are left of a captured array."""
    return filled(view.shape, lambda place: element(view, [constant(n) for n in place], load))


def element(view: View, indices: Sequence[int], load: Callable[[View], int]) -> int:
    """The node of one element of a captured array; `indices` are nodes, one for each axis."""
    found = view.gathered(dict(enumerate(indices)), [1] * len(indices))
    assert found is not None
    return load(found)


def gathered(
    arguments: list[Any],
    indices: Sequence[Row],
    at: Callable[[list[int]], int],
    constant: Callable[[int], int],
) -> Row:
    """Elements at rows of indices, whose axes come first.

    Args:
        arguments: the axes that are indexed, and the extents of what is taken at each place.
        indices: nodes, one row for each of these axes.
        at: the element at nodes for all axes.
        constant: the node of a number.
    """
    axes, sizes = arguments
    wide = np.broadcast_arrays(*indices)
    first = wide[0].ndim

    def taken(place: tuple[int, ...]) -> int:
        chosen = {axis: int(row[place[:first]]) for axis, row in zip(axes, wide, strict=True)}
        rest = place[first:]
        return at([chosen[n] if n in chosen else constant(rest[n]) for n in range(len(sizes))])

    return filled((*wide[0].shape, *sizes), taken)


def computed(
    name: str,
    arguments: list[Any],
    rows: Sequence[Row],
    apply: Apply,
    dtype: str,
) -> Row | None:
    """What a primitive makes of rows; None where it has no meaning for them.

    Args:
        name, arguments: the primitive's.
        rows: its inputs.
        apply: an operation on scalars.
        dtype: type of the elements of the result.

    Raises:
        TooLong: the result, or what it is computed from, has too many elements.
    """
    if name == "Full":
        return rows[0]
    if len(rows) == 1 and (found := moved(name, arguments, rows[0])) is not None:
        return found
    if name == "Concatenate":
        return np.concatenate([*rows], axis=arguments[0])
    if name == "Reduce":
        return reduced(arguments, rows[0], apply, dtype)
    if name == "Matmul":
        return product(rows[0], rows[1], apply, dtype)
    if name in ELEMENTWISE:
        return elementwise(rows, lambda numbers: apply(name, arguments, numbers, dtype))
    return None


def moved(name: str, arguments: list[Any], cells: Row) -> Row | None:
    """Cells whose shape changes and nothing else; None for other primitives."""
    if name == "Transpose":
        return cells.transpose(arguments[0])
    if name == "Broadcast":
        return np.broadcast_to(cells, check(arguments[0]))
    if name == "Reshape":
        return cells.reshape(arguments[0])
    if name == "Squeeze":
        return cells.squeeze(tuple(arguments[0]))
    if name == "ExpandDims":
        return np.expand_dims(cells, tuple(arguments[0]))
    if name == "Slice":
        return cells[tuple(slice(*ends) for ends in zip(*arguments, strict=True))]
    if name == "Flatten":
        first, last = arguments
        shape = (*cells.shape[:first], -1, *cells.shape[last + 1 :])
        return cells.reshape(shape)
    return None


def reduced(arguments: list[Any], cells: Row, apply: Apply, dtype: str) -> Row:
    """Some axes reduced to one element each."""
    kind, axes = arguments
    if not cells.size:
        raise TooLong(cells.shape)
    joined = "bool" if kind < 2 else dtype

    def join(values: Row) -> int:
        nodes = [apply("AsType", [joined], [int(n)], joined) for n in values.reshape(-1)]
        return functools.reduce(lambda x, y: apply(REDUCED_BY[kind], [], [x, y], joined), nodes)

    kept = [n if axis not in axes else 1 for axis, n in enumerate(cells.shape)]

    def element(place: tuple[int, ...]) -> int:
        return join(cells[tuple(slice(None) if a in axes else n for a, n in enumerate(place))])

    return filled(kept, element)


def product(x: Row, y: Row, apply: Apply, dtype: str) -> Row:
    """A matrix product, over the last axis of one and the last but one of the other."""
    batch = np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    x, y = np.broadcast_to(x, (*batch, *x.shape[-2:])), np.broadcast_to(y, (*batch, *y.shape[-2:]))

    def element(place: tuple[int, ...]) -> int:
        column: Any = (*place[:-2], slice(None), place[-1])
        pairs = zip(x[place[:-1]], y[column], strict=True)
        terms = [apply("Multiply", [], [int(a), int(b)], dtype) for a, b in pairs]
        return functools.reduce(lambda a, b: apply("Add", [], [a, b], dtype), terms)

    return filled((*batch, x.shape[-2], y.shape[-1]), element)


def elementwise(cells: Sequence[Row], apply: Callable[[list[int]], int]) -> Row:
    """An operation on the elements of arrays that broadcast together."""
    wide = np.broadcast_arrays(*cells)
    return filled(wide[0].shape, lambda place: apply([int(x[place]) for x in wide]))
