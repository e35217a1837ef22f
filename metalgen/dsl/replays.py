"""Arrays and rows of arrays computed from captured ones alone: by MLX, before the kernel.

MLX hands over the primitives that a function consists of, with their arguments; here each is
computed again. A primitive may have several outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from metalgen.dsl.arrays import View, shared_extents
from metalgen.dsl.graph import MAX_ARRAY_ELEMENTS
from metalgen.dsl.operations import BINARY, BITWISE, LOGS, UNARY

OnArrays = Callable[[list[Any], list[Any]], Any]
_REDUCE = ("all", "any", "sum", "prod", "min", "max")


_SCANS = ("cummax", "cummin", "cumsum", "cumprod", "logcumsumexp")
_UPDATES = ("maximum", "minimum", "add", "multiply", "")
"""What updates of elements do with the old ones; the last replaces them."""


def _scan(values: list[Any], arguments: list[Any]) -> Any:
    kind, axis, reverse, inclusive = arguments
    return getattr(mx, _SCANS[kind])(values[0], axis=axis, reverse=reverse, inclusive=inclusive)


def _pad(values: list[Any], arguments: list[Any]) -> Any:
    axes, low, high = arguments
    widths = [(0, 0)] * values[0].ndim
    for axis, before, after in zip(axes, low, high, strict=True):
        widths[axis] = (before, after)
    return mx.pad(values[0], widths, constant_values=values[1])


def _order(array: Any, axes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Some axes of an array first, and what puts them back."""
    order = [*axes, *(axis for axis in range(array.ndim) if axis not in axes)]
    return order, sorted(range(array.ndim), key=order.__getitem__)


def _gather(values: list[Any], arguments: list[Any]) -> Any:
    """Elements at arrays of indices, whose axes come first."""
    axes, sizes = arguments
    source, *given = values
    kept = [n for axis, n in enumerate(sizes) if axis not in axes]
    whole = [n for axis, n in enumerate(source.shape) if axis not in axes]
    if kept != whole or any(sizes[axis] != 1 for axis in axes):
        raise NotImplementedError
    order, _ = _order(source, axes)
    indices = mx.broadcast_arrays(*given)
    found = mx.transpose(source, order)[tuple(indices)]
    return found.reshape((*indices[0].shape, *sizes))


def _scatter(values: list[Any], arguments: list[Any]) -> Any:
    """Updates of elements at arrays of indices."""
    kind, axes = arguments
    source, *given, updates = values
    order, back = _order(source, axes)
    indices = tuple(mx.broadcast_arrays(*given))
    moved = mx.transpose(source, order)
    updates = updates.reshape((*indices[0].shape, *moved.shape[len(axes) :]))
    return mx.transpose(_updated(moved, indices, updates, kind), back)


def _updated(array: Any, place: Any, updates: Any, kind: int) -> Any:
    if _UPDATES[kind]:
        return getattr(array.at[place], _UPDATES[kind])(updates)
    array = mx.array(array)
    array[place] = updates
    return array


def _scatter_axis(values: list[Any], arguments: list[Any]) -> Any:
    kind, axis = arguments
    source, indices, updates = values
    if kind == 1:
        return mx.put_along_axis(source, indices, updates, axis=axis)
    # Sums: updates of all other places of the array at once.
    shape = indices.shape
    places = [
        mx.arange(extent).reshape([-1 if n == own else 1 for n in range(len(shape))])
        for own, extent in enumerate(shape)
    ]
    places[axis] = indices
    return source.at[tuple(places)].add(mx.broadcast_to(updates, shape))


def _add_product(values: list[Any], arguments: list[Any]) -> Any:
    alpha, beta = arguments
    x, y, added = values
    return mx.addmm(added, x, y, alpha=alpha, beta=beta)


def _dynamic_slice(values: list[Any], arguments: list[Any]) -> Any:
    axes, sizes = arguments
    return mx.slice(values[0], values[1], axes=axes, slice_size=sizes)


def _dynamic_update(values: list[Any], arguments: list[Any]) -> Any:
    source, update, start = values
    return mx.slice_update(source, update, start, axes=arguments[-1])


def _slice_update(values: list[Any], arguments: list[Any]) -> Any:
    kind, *ends = arguments
    place = tuple(slice(*each) for each in zip(*ends, strict=True))
    return _updated(values[0], place, values[1], kind)


def _convolution(values: list[Any], arguments: list[Any]) -> Any:
    strides, low, high, dilation, input_dilation, groups, flip = arguments
    source, weight = values
    return mx.conv_general(
        source,
        weight,
        stride=strides,
        padding=(low, high),
        kernel_dilation=dilation,
        input_dilation=input_dilation,
        groups=groups,
        flip=flip,
    )


def _fft(values: list[Any], arguments: list[Any]) -> Any:
    axes, inverse, real, _ = arguments
    if real:
        raise NotImplementedError
    return (mx.fft.ifftn if inverse else mx.fft.fftn)(values[0], axes=axes)


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
    "SliceUpdate": _slice_update,
    "Split": lambda v, a: mx.split(v[0], list(a[0]), axis=a[1]),
    "Pad": _pad,
    "Gather": _gather,
    "GatherAxis": lambda v, a: mx.take_along_axis(v[0], v[1], axis=a[0]),
    "Scatter": _scatter,
    "Scan": _scan,
    "Sort": lambda v, a: mx.sort(v[0], axis=a[0]),
    "ArgSort": lambda v, a: mx.argsort(v[0], axis=a[0]),
    "Partition": lambda v, a: mx.partition(v[0], a[0], axis=a[1]),
    "ArgPartition": lambda v, a: mx.argpartition(v[0], a[0], axis=a[1]),
    "ArgReduce": lambda v, a: (mx.argmax if a[0] else mx.argmin)(v[0], axis=a[1], keepdims=True),
    "Matmul": lambda v, a: mx.matmul(*v),
    "View": lambda v, a: v[0].view(a[0]),
    "AsStrided": lambda v, a: mx.as_strided(v[0], a[0], a[1], a[2]),
    "Hadamard": lambda v, a: mx.hadamard_transform(v[0], a[0]),
    "Convolution": _convolution,
    "FFT": _fft,
    "DivMod": lambda v, a: mx.divmod(*v),
    "ScatterAxis": _scatter_axis,
    "AddMM": _add_product,
    "ErfInv": lambda v, a: mx.erfinv(v[0]),
    "DynamicSlice": _dynamic_slice,
    "DynamicSliceUpdate": _dynamic_update,
    "Concatenate": lambda v, a: mx.concatenate(v, a[0]),
    "Reduce": lambda v, a: getattr(mx, _REDUCE[a[0]])(v[0], axis=tuple(a[1]), keepdims=True),
}
"""What is computed from captured arrays alone, before the kernel, by MLX; by primitive."""


def mapped(
    name: str, arguments: list[Any], rows: Sequence[View], shapes: Sequence[tuple[int, ...]]
) -> list[View] | None:
    """What a primitive makes of rows of captured arrays, for all values of their indices at once.

    Args:
        name, arguments: the primitive's.
        rows: its inputs, some of whose axes are indexed.
        shapes: of its outputs, for one value of each index.

    Returns:
        Its outputs with the same indices; None where nothing is indexed, where rows are single
        elements, or where MLX cannot map it.
    """
    extents = shared_extents(rows)
    if name not in ON_ARRAYS or not extents or all(view.size == 1 for view in rows):
        return None
    count = math.prod(extents.values())
    if count * max(map(math.prod, shapes)) > MAX_ARRAY_ELEMENTS:
        return None
    batches = [view.batched(extents).reshape((count, *view.shape)) for view in rows]
    try:
        made = mx.vmap(lambda *each: ON_ARRAYS[name](list(each), arguments))(*batches)
    except (NotImplementedError, RuntimeError, ValueError):  # MLX maps some primitives only
        return None
    several = list(made) if isinstance(made, (list, tuple)) else [made]
    if [tuple(array.shape[1:]) for array in several] != list(shapes):
        return None
    found = []
    for array, shape in zip(several, shapes, strict=True):
        axes = tuple(range(len(extents), len(extents) + len(shape)))
        whole = array.reshape((*extents.values(), *shape))
        found.append(View(whole, (*extents, *(None for _ in shape)), axes))
    return found
