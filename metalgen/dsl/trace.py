"""From a score or mask function to its graph. MLX traces it; this reads what MLX hands over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx

from metalgen.dsl import cells
from metalgen.dsl.arrays import View
from metalgen.dsl.checking import SIGNATURES, checked, result_of, untraceable
from metalgen.dsl.errors import FunctionError
from metalgen.dsl.graph import (
    DTYPES,
    INPUTS,
    MAX_ARRAY_ELEMENTS,
    MAX_ARRAYS,
    MAX_NODES,
    Builder,
    Captured,
    Graph,
    Node,
)
from metalgen.dsl.operations import BINARY, BITWISE, COMPARISONS, LOGICAL, LOGS, SAME, UNARY
from metalgen.dsl.replays import ON_ARRAYS, mapped

RESHAPING = (
    *("Squeeze", "ExpandDims", "Reshape", "Flatten", "Unflatten", "Broadcast", "Full"),
    *("Slice", "Transpose"),
)
"""Primitives that leave a scalar what it is."""


@dataclass(frozen=True, eq=False)
class Traced:
    """A function as a graph, and the arrays that it captures.

    Args:
        graph: what it computes.
        arrays: what the graph loads from, in its order; computed from captured arrays, or these.
        captured: the captured arrays themselves, where they were found.
    """

    graph: Graph
    arrays: tuple[mx.array, ...]
    captured: tuple[mx.array, ...] = ()

    def is_same(self, other: Traced) -> bool:
        """Whether both compute the same from the same arrays."""
        return (
            # By their texts, in which nan equals itself.
            self.graph.text == other.graph.text
            and len(self.captured) == len(other.captured)
            and all(a is b for a, b in zip(self.captured, other.captured, strict=True))
        )


def trace(function: Callable[..., Any] | Traced, argument: str = "score_mod") -> Traced:
    """The graph of ``score_mod(score, b, h, q_idx, kv_idx)`` or ``mask_mod(b, h, q_idx, kv_idx)``.

    Args:
        function: any function of scalar arrays that MLX can trace; ``mx.grad(f)`` too. Arrays that
            it captures may be lazy, and stay so.
        argument: ``"score_mod"`` or ``"mask_mod"``.

    Raises:
        FunctionError: what is wrong with the function, and what to write instead.
    """
    if isinstance(function, Traced):
        return function
    captured, rebuild = checked(function, argument)
    count = len(SIGNATURES[argument])

    def call(*arguments: mx.array) -> mx.array:
        return result_of(rebuild(list(arguments[count:]))(*arguments[:count]), argument)

    scalars = [mx.array(0, getattr(mx, INPUTS[name])) for name in SIGNATURES[argument]]
    records: list[dict[str, Any]] = []
    try:
        mx.export_function(records.append, call, *scalars, *captured)
    except FunctionError:
        raise
    except (KeyError, ValueError) as error:
        if (found := untraceable(error, function, argument)) is None:
            raise
        # The key of a KeyError may have no value that could be printed.
        raise found from (None if isinstance(error, KeyError) else error)
    return _Reader(argument, captured).read(records)


class _Reader:
    """Reads the records of MLX's callback.

    A name of MLX's stands for a number of a node (a scalar), a `View` (of a captured array), or
    numbers of nodes (a short row, see `metalgen.dsl.cells`).
    """

    def __init__(self, argument: str, captured: list[mx.array]) -> None:
        self.argument = argument
        self.captured = captured
        self.builder = Builder()
        self.arrays: list[mx.array] = []
        self.known: dict[str, Any] = {}

    def read(self, records: list[dict[str, Any]]) -> Traced:
        output = ""
        for record in records:
            kind = record["type"]
            if kind == "inputs":
                self._inputs(record["inputs"])
            elif kind == "outputs":
                output = record["outputs"][0][0]
            elif kind == "constants":
                for name, array in record["constants"]:
                    self._constant(name, array)
            elif kind == "primitive":
                self._primitive(record)
        return self._traced(self._scalar(output))

    def _traced(self, result: int) -> Traced:
        dtype = self.builder.nodes[result].dtype
        if self.argument == "mask_mod" and dtype != "bool":
            raise FunctionError(
                self.argument,
                "one scalar array of booleans",
                dtype,
                "return a comparison, such as kv_idx <= q_idx (or x != 0)",
            )
        if self.argument == "score_mod":
            if dtype == "bool":
                raise FunctionError(
                    self.argument,
                    "a number, the new score",
                    "bool",
                    "give a mask as mask_mod, or return mx.where(seen, score, -mx.inf)",
                )
            result = self.builder.add(Node("cast", "float32", (result,)))
        graph, kept = self.builder.graph(result)
        for limit, count, what in (
            (MAX_NODES, len(graph.nodes), "operations"),
            (MAX_ARRAYS, len(graph.arrays), "captured arrays"),
        ):
            if count > limit:
                raise FunctionError(self.argument, f"at most {limit} {what}", count)
        for array in graph.arrays:
            size = 1
            for extent in array.shape:
                size *= extent
            if not 0 < size <= MAX_ARRAY_ELEMENTS:
                expected = "captured arrays with 1 to 2^31 - 1 elements"
                raise FunctionError(self.argument, expected, array.shape)
        return Traced(graph, tuple(self.arrays[n] for n in kept), tuple(self.captured))

    def _inputs(self, inputs: list[Any]) -> None:
        names = SIGNATURES[self.argument]
        for name, (traced, _, _) in zip(names, inputs, strict=False):
            self.known[traced] = self.builder.add(Node(name, INPUTS[name]))
        for array, (traced, _, _) in zip(self.captured, inputs[len(names) :], strict=True):
            self.known[traced] = View.whole(array)

    def _constant(self, name: str, array: mx.array) -> None:
        dtype = self._dtype(array.dtype)
        if array.ndim:
            self.known[name] = View.whole(array)
        else:
            self.known[name] = self.builder.constant(array.item(), dtype)  # type: ignore[arg-type]

    def _dtype(self, dtype: Any) -> str:
        name = str(dtype).removeprefix("mlx.core.").removesuffix("_")
        if name not in DTYPES:
            raise FunctionError(
                self.argument, f"values of type {', '.join(DTYPES)}", name, "cast with astype"
            )
        return name

    def _scalar(self, name: str) -> int:
        """The number of the node that a name stands for."""
        value = self.known[name]
        if isinstance(value, int):
            return value
        if not isinstance(value, View) or (value.shape and value.size != 1):
            raise self._misplaced("an operation on", f"an array of shape {tuple(value.shape)}")
        return self._load(value)

    def _load(self, view: View) -> int:
        number = next((n for n, a in enumerate(self.arrays) if a is view.array), None)
        if number is None:
            number = len(self.arrays)
            self.arrays.append(view.array)
            dtype = self._dtype(view.array.dtype)
            self.builder.arrays.append(Captured(dtype, tuple(view.array.shape)))
        indices = [
            self.builder.constant(0, "int32") if index is None else index for index in view.indices
        ]
        node = Node("load", self.builder.arrays[number].dtype, tuple(indices), array=number)
        return self.builder.add(node)

    def _primitive(self, record: dict[str, Any]) -> None:
        name, arguments = record["name"], record["arguments"]
        outputs, inputs = record["outputs"], record["inputs"]
        values = [self.known[each[0]] for each in inputs]
        shape = tuple(outputs[0][1])
        alone = all(extent == 1 for extent in shape)
        if name in SAME:
            self.known[outputs[0][0]] = values[0]
        elif name == "Gather" and (found := self._gathered(values, arguments)) is not None:
            self.known[outputs[0][0]] = found
        elif (arrays := self._whole(values)) is not None and (
            shape or any(array.shape for array in arrays)
        ):
            self._on_arrays(name, arguments, arrays, outputs)
        elif (changed := self._moved(name, arguments, values, shape)) is not None:
            self.known[outputs[0][0]] = changed
        elif name != "Reduce" and all(isinstance(v, int) for v in values) and alone:
            self._operation(name, arguments, [each[0] for each in inputs], outputs)
        elif (arrays := self._whole(values, indexed=True)) is not None and (
            shape or any(array.shape for array in arrays)
        ):
            self._on_arrays(name, arguments, arrays, outputs)
        elif not self._on_rows(name, arguments, values, outputs):
            self._on_cells(name, arguments, values, [tuple(each[1]) for each in inputs], outputs)

    def _gathered(self, values: list[Any], arguments: list[Any]) -> View | None:
        """A captured array with some axes indexed by scalars; None for any other indexing."""
        axes, sizes = arguments
        view, indices = values[0], values[1:]
        if not isinstance(view, View):
            return None
        if any(not isinstance(n, int) and (not isinstance(n, View) or n.shape) for n in indices):
            return None
        numbers = [n if isinstance(n, int) else self._load(n) for n in indices]
        return view.gathered(dict(zip(axes, numbers, strict=True)), sizes)

    def _moved(self, name: str, arguments: list[Any], values: list[Any], shape: Any) -> Any:
        """One value whose axes are moved, dropped or added, or its one element; None for others."""
        if len(values) != 1 or not isinstance(view := values[0], (int, View)):
            return None
        alone = all(extent == 1 for extent in shape)
        if isinstance(view, int):  # a scalar, with axes of one element
            return view if alone and name in RESHAPING else None
        if name == "Transpose":
            return view.transposed(arguments[0])
        if name in ("Squeeze", "ExpandDims", "Reshape", "Flatten", "Unflatten"):
            found = view.reshaped(shape)
            if found is not None:
                return found
        if view.size != 1 or not alone:
            return None
        if name == "Broadcast":
            return self._load(view)
        if name == "Reduce":
            return None
        return self._apply(name, arguments, [self._load(view)], None)

    def _whole(self, values: list[Any], *, indexed: bool = False) -> list[mx.array] | None:
        """Values as arrays, where they are captured arrays and constants; else None.

        Args:
            values: names' values.
            indexed: also take arrays that constants index.
        """
        found = []
        for value in values:
            if isinstance(value, View):
                if not indexed and not value.unindexed:
                    return None
                array = value.replay(self._value)
                if array is None:
                    return None
                found.append(array)
            elif isinstance(value, int):
                node = self.builder.nodes[value]
                if node.op != "const":
                    return None
                kind: Any = getattr(mx, "bool_" if node.dtype == "bool" else node.dtype)
                found.append(mx.array(node.value, kind))  # type: ignore[arg-type]
            else:
                return None
        return found

    def _value(self, number: int) -> int | None:
        """The value of a node, where it is a constant integer."""
        value = self.builder.nodes[number].value
        return None if value is None else int(value)

    def _on_arrays(
        self, name: str, arguments: list[Any], arrays: list[mx.array], outputs: list[Any]
    ) -> None:
        """Arrays computed from captured ones only: by MLX, once, before the kernel."""
        if name not in ON_ARRAYS:
            raise self._misplaced(name, "whole arrays")
        # A constant's shape is that of its output; MLX does not hand it over.
        given = [outputs[0][1]] if name == "Full" else arguments
        try:
            result = ON_ARRAYS[name](arrays, given)
        except NotImplementedError:
            raise self._misplaced(name, "whole arrays") from None
        several = result if isinstance(result, (list, tuple)) else [result]
        for array, (output, shape, dtype) in zip(several, outputs, strict=True):
            if tuple(array.shape) != tuple(shape):
                raise self._misplaced(name, "whole arrays")
            # MLX does not hand over the type of mx.arange either.
            self.known[output] = View.whole(array if array.dtype == dtype else array.astype(dtype))

    def _on_rows(
        self, name: str, arguments: list[Any], values: list[Any], outputs: list[Any]
    ) -> bool:
        """What indices leave of captured arrays: by MLX, for all values of the indices at once.

        Returns:
            Whether that can be; elements are computed in the kernel otherwise.
        """
        views = [self._fixed(value) for value in values]
        rows = [view for view in views if view is not None]
        shapes = [tuple(shape) for _, shape, _ in outputs]
        given = [shapes[0]] if name == "Full" else arguments
        found = mapped(name, given, rows, shapes) if len(rows) == len(views) else None
        if found is None:
            return False
        for view, (output, _, dtype) in zip(found, outputs, strict=True):
            self.known[output] = replace(view, array=view.array.astype(dtype))
        return True

    def _fixed(self, value: Any) -> View | None:
        """A captured array or a constant, with all indices fixed that are constants."""
        if isinstance(value, View):
            return value.fixed(self._value)
        arrays = self._whole([value])
        return None if arrays is None else View.whole(arrays[0])

    def _on_cells(
        self,
        name: str,
        arguments: list[Any],
        values: list[Any],
        shapes: list[tuple[int, ...]],
        outputs: list[Any],
    ) -> None:
        """Short rows of scalars: an operation on each of their elements."""
        try:
            own = [(n, s) for n, s in zip(values, shapes, strict=True)]
            rows = [self._cells(*each) for each in own[1 if name == "Gather" else 0 :]]
            for part, (output, shape, kind) in zip(
                ("FloorDivide", "Remainder") if name == "DivMod" else (name,), outputs, strict=True
            ):
                dtype = self._dtype(kind)
                if name == "Gather":
                    found = self._gathered_cells(values[0], rows, arguments)
                else:
                    found = cells.computed(part, arguments, rows, self._apply, dtype)
                if found is None:
                    what = f"an array of shape {max(shapes, key=len, default=())}"
                    raise self._misplaced(name, what)
                one = found.size == 1 and all(n == 1 for n in shape)
                self.known[output] = int(found.reshape(-1)[0]) if one else found
        except cells.TooLong as error:
            raise self._misplaced(name, f"an array of shape {error.args[0]}") from None

    def _gathered_cells(self, source: Any, indices: list[Any], arguments: list[Any]) -> Any:
        """Elements of an array at rows of indices; None where that cannot be."""
        constant = partial(self.builder.constant, dtype="int32")
        if isinstance(source, View):
            if any(
                arguments[1][n] != size
                for n, size in enumerate(source.shape)
                if n not in arguments[0]
            ):
                return None
            return cells.gathered(
                arguments, indices, lambda n: cells.element(source, n, self._load), constant
            )
        if isinstance(source, int) or any(
            self._value(int(n)) is None for x in indices for n in x.flat
        ):
            return None

        def at(numbers: list[int]) -> int:
            return int(source[tuple(self._value(n) or 0 for n in numbers)])

        return cells.gathered(arguments, indices, at, constant)

    def _cells(self, value: Any, shape: tuple[int, ...]) -> Any:
        if isinstance(value, View):
            constant = partial(self.builder.constant, dtype="int32")
            return cells.of_view(value, constant, self._load)
        return cells.filled(shape, lambda place: value) if isinstance(value, int) else value

    def _operation(
        self, name: str, arguments: list[Any], inputs: list[str], outputs: list[Any]
    ) -> None:
        numbers = [self._scalar(each) for each in inputs]
        if any(extent != 1 for extent in outputs[0][1]):
            raise self._misplaced(name, f"an array of shape {tuple(outputs[0][1])}")
        if name == "DivMod":
            for part, (output, _, dtype) in zip(("FloorDivide", "Remainder"), outputs, strict=True):
                self.known[output] = self._apply(part, [], numbers, self._dtype(dtype))
        else:
            dtype = self._dtype(outputs[0][2])
            self.known[outputs[0][0]] = self._apply(name, arguments, numbers, dtype)

    def _apply(self, name: str, arguments: list[Any], numbers: list[int], dtype: str | None) -> int:
        add = self.builder.add
        dtype = dtype or self.builder.nodes[numbers[0]].dtype
        if name == "AsType":
            return add(Node("cast", self._dtype(arguments[0]), tuple(numbers)))
        op = BINARY.get(name) or UNARY.get(name)
        if name == "BitwiseBinary":
            op = BITWISE[int(arguments[0])]
        elif name == "Log":
            op = LOGS[int(arguments[0])]
        elif name == "Sqrt":
            op = "rsqrt" if arguments[0] else "sqrt"
        elif name == "Select":
            op = "select"
        if op is None:
            raise self._misplaced(name, "its arguments")
        if op == "equal" and arguments and arguments[0]:
            raise self._misplaced("Equal with equal_nan", "its arguments")
        if op in LOGICAL:
            numbers = [add(Node("cast", "bool", (n,))) for n in numbers]
        if op in COMPARISONS or op in LOGICAL:
            dtype = "bool"
        return add(Node(op, dtype, tuple(numbers)))

    def _misplaced(self, name: str, what: str) -> FunctionError:
        instead = "compute it before, capture the result, and index it, as in table[h, q_idx]"
        if name.startswith("Random"):
            instead = "a score has no random numbers; capture an array of them and index it"
        elif name in ("Full", "Arange"):
            instead = "write the number itself, or make the array before and index it"
        return FunctionError(
            self.argument,
            "operations on single elements (arithmetic, comparisons, mx.where, indexing)",
            f"MLX's {name} on {what}" if not name.startswith("an ") else f"{name} {what}",
            instead,
        )
