"""From a score or mask function to its graph. MLX traces it; this reads what MLX hands over."""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen.dsl.arrays import ON_ARRAYS, View
from metalgen.dsl.capture import filled, lift, names_used_by
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

SIGNATURES = {
    "score_mod": ("score", "b", "h", "q", "kv"),
    "mask_mod": ("b", "h", "q", "kv"),
}
_WRITTEN = {
    "score_mod": "score_mod(score, b, h, q_idx, kv_idx)",
    "mask_mod": "mask_mod(b, h, q_idx, kv_idx)",
}


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
    captured, rebuild = _checked(function, argument)
    count = len(SIGNATURES[argument])

    def call(*arguments: mx.array) -> mx.array:
        return _result(rebuild(list(arguments[count:]))(*arguments[:count]), argument)

    scalars = [mx.array(0, getattr(mx, INPUTS[name])) for name in SIGNATURES[argument]]
    records: list[dict[str, Any]] = []
    try:
        mx.export_function(records.append, call, *scalars, *captured)
    except FunctionError:
        raise
    except KeyError as error:
        if not any(isinstance(key, mx.array) for key in error.args):
            raise
        raise FunctionError(
            argument,
            "arrays where something is looked up",
            "a dictionary",
            "put its values into an mx.array, and index that, as in table[h]",
        ) from None  # its key has no value that could be printed
    except ValueError as error:
        if "eval" in str(error) and "transformation" in str(error):
            raise _looked_at(function, argument) from error
        if "uncaptured inputs" in str(error):
            raise FunctionError(
                argument,
                "captured arrays that are reached in one way each",
                "one that is also reached where it cannot be found (a property, a library)",
                "make it a global variable, a variable of the enclosing function or a default",
            ) from None
        if match := re.search(r"Unable to get state for primitive (\w+)", str(error)):
            raise FunctionError(
                argument,
                "operations that MLX can export",
                f"MLX's {match[1]}",
                "write x ^ -1 for mx.bitwise_invert(x), ~x for booleans, and compute anything else "
                "before, capture the result, and index it",
            ) from None
        raise
    return _Reader(argument, captured).read(records)


def _checked(
    function: Any, argument: str
) -> tuple[list[mx.array], Callable[[list[mx.array]], Callable[..., Any]]]:
    if not callable(function):
        raise FunctionError(argument, f"a function {_WRITTEN[argument]}", repr(function))
    try:
        inspect.signature(function).bind(*SIGNATURES[argument])
    except TypeError as error:
        raise FunctionError(
            argument, f"a function that can be called as {_WRITTEN[argument]}", error
        ) from None
    except ValueError:
        pass  # one of MLX's own, such as mx.grad(f), which have no signature
    return lift(function)


def _result(value: Any, argument: str) -> mx.array:
    what = "one scalar array" if argument == "score_mod" else "one scalar array of booleans"
    if isinstance(value, (bool, int, float)):
        return mx.array(value)
    if isinstance(value, (tuple, list, dict)):
        raise FunctionError(
            argument, what, f"a {type(value).__name__}", "return a single value, without a comma"
        )
    if value is None:
        raise FunctionError(argument, what, "None", "end the function with return")
    if not isinstance(value, mx.array):
        instead = "use the functions of mlx.core (mx.tanh, mx.where, ...)"
        raise FunctionError(argument, what, f"a {_kind(value)}", instead)
    if value.ndim:
        raise FunctionError(
            argument,
            what,
            f"an array of shape {value.shape}",
            "index captured arrays in every axis, as in bias[h, q_idx - kv_idx]",
        )
    return value


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _looked_at(function: Callable[..., Any], argument: str) -> FunctionError:
    """Which error it is that a function asks for the value of an array."""
    what = "a function that only computes with its arguments"
    scope = getattr(function, "__globals__", {})
    cells = getattr(function, "__closure__", None) or ()
    used = [scope[name] for name in names_used_by(function) if name in scope]
    used += [cell.cell_contents for cell in cells if filled(cell)]
    if any(isinstance(m, types.ModuleType) and m.__name__.startswith("numpy") for m in used):
        return FunctionError(
            argument,
            what,
            "one that gives them to NumPy (or asks for their values)",
            "use the functions of mlx.core: mx.tanh for np.tanh, mx.where for np.where",
        )
    return FunctionError(
        argument,
        what,
        "one that branches on a value or asks for it",
        "write mx.where(condition, a, b) for if and ?:, & | ~ for and, or, not, mx.minimum and "
        "mx.maximum for min and max, and no item(), int(), float() or bool()",
    )


class _Reader:
    """Reads the records of MLX's callback.

    A name of MLX's stands for a number of a node (a scalar) or a `View` (of a captured array).
    """

    def __init__(self, argument: str, captured: list[mx.array]) -> None:
        self.argument = argument
        self.captured = captured
        self.builder = Builder()
        self.arrays: list[mx.array] = []
        self.known: dict[str, int | View] = {}

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
        if value.shape and value.size != 1:
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
        outputs = record["outputs"]
        inputs = [each[0] for each in record["inputs"]]
        values = [self.known[each] for each in inputs]
        shape = tuple(outputs[0][1])
        if name in SAME:
            self.known[outputs[0][0]] = values[0]
        elif name == "Gather":
            self._gather(outputs[0][0], values, arguments)
        elif (arrays := self._whole(values)) is not None and (
            shape or any(array.shape for array in arrays)
        ):
            self._on_arrays(name, arguments, arrays, outputs)
        elif len(values) == 1 and isinstance(values[0], View):
            changed = self._moved(name, arguments, values[0], shape)
            self.known[outputs[0][0]] = changed
        elif name in (
            "Squeeze",
            "ExpandDims",
            "Reshape",
            "Flatten",
            "Unflatten",
            "Broadcast",
            "Full",
        ):
            if any(extent != 1 for extent in shape):
                raise self._misplaced(name, f"an array of shape {shape}")
            self.known[outputs[0][0]] = values[0]  # a scalar, with axes of one element
        elif all(isinstance(v, int) for v in values) and name == "Reduce" and not shape:
            self.known[outputs[0][0]] = values[0]  # of a single element
        else:
            self._operation(name, arguments, inputs, outputs)

    def _gather(self, output: str, values: list[Any], arguments: list[Any]) -> None:
        axes, sizes = arguments
        view, indices = values[0], values[1:]
        if isinstance(view, int):
            raise self._misplaced("Gather", "a scalar")
        numbers = [n if isinstance(n, int) else self._load(n) for n in indices]
        found = view.gathered(dict(zip(axes, numbers, strict=True)), sizes)
        if found is None:
            raise self._misplaced("Gather", f"slices of an array of shape {tuple(view.shape)}")
        self.known[output] = found

    def _moved(self, name: str, arguments: list[Any], view: View, shape: tuple[int, ...]) -> Any:
        """A partly indexed array whose axes are moved, dropped or added; or its one element."""
        if name == "Transpose":
            return view.transposed(arguments[0])
        if name in ("Squeeze", "ExpandDims", "Reshape", "Flatten", "Unflatten"):
            found = view.reshaped(shape)
            if found is not None:
                return found
        if view.size != 1:
            raise self._misplaced(name, f"an array of shape {tuple(view.shape)}")
        if name == "Broadcast" and all(extent == 1 for extent in shape):
            return self._load(view)
        if name == "Reduce":
            return self._load(view)
        if any(extent != 1 for extent in shape):
            raise self._misplaced(name, f"an array of shape {tuple(view.shape)}")
        return self._apply(name, arguments, [self._load(view)], None)

    def _whole(self, values: list[Any]) -> list[mx.array] | None:
        """Values as arrays, where they are whole captured arrays and constants."""
        arrays = []
        for value in values:
            if isinstance(value, View):
                if not value.unindexed:
                    return None
                arrays.append(value.replay())
            else:
                node = self.builder.nodes[value]
                if node.op != "const":
                    return None
                kind: Any = getattr(mx, "bool_" if node.dtype == "bool" else node.dtype)
                arrays.append(mx.array(node.value, kind))
        return arrays

    def _on_arrays(
        self, name: str, arguments: list[Any], arrays: list[mx.array], outputs: list[Any]
    ) -> None:
        """Arrays computed from captured ones only: by MLX, once, before the kernel."""
        if name not in ON_ARRAYS:
            raise self._misplaced(name, "whole arrays")
        # A constant's shape is that of its output; MLX does not hand it over.
        given = [outputs[0][1]] if name == "Full" else arguments
        result = ON_ARRAYS[name](arrays, given)
        if tuple(result.shape) != tuple(outputs[0][1]):
            raise self._misplaced(name, "whole arrays")
        self.known[outputs[0][0]] = View.whole(result)

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
