"""Writes graphs in the languages of kernels: one statement a value, typed, none computed twice."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

from metalgen.dsl.graph import DTYPES, FLOATS, INPUTS, Graph, Node
from metalgen.dsl.loads import place_nodes


class Spelling(Protocol):
    """What a printer asks of a language; a `metalgen.languages.Language` has it."""

    @property
    def types(self) -> Mapping[str, str]:
        """Its names of MLX's types."""

    @property
    def float_of_bits(self) -> str:
        """Its function from 32 bits to the float that they represent."""

    @property
    def scalar(self) -> str:
        """How the value of an array without axes is written, around its name."""

    @property
    def function(self) -> Callable[[str], str]:
        """How a function of floats is called, from its C name."""


_INFIX = {
    "add": "+",
    "subtract": "-",
    "multiply": "*",
    "divide": "/",
    "equal": "==",
    "not_equal": "!=",
    "greater": ">",
    "greater_equal": ">=",
    "less": "<",
    "less_equal": "<=",
    "logical_and": "&&",
    "logical_or": "||",
    "bitwise_and": "&",
    "bitwise_or": "|",
    "bitwise_xor": "^",
}
_OF_BOOLS = {"bitwise_and": "&&", "bitwise_or": "||", "bitwise_xor": "!="}
_FUNCTIONS = {
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
    "arctan2": "atan2",
    "abs": "fabs",
    "round": "rint",
    "power": "pow",
    **{n: n for n in "exp log log2 log10 sin cos tan sinh cosh tanh floor ceil sqrt rsqrt".split()},
}
"""Functions of floats that every language has, by their C names."""
_OWN = frozenset("maximum minimum remainder logaddexp sign expm1 log1p sigmoid erf".split())
"""Functions that the language's header defines, as ``mg_...``."""
_OWN_INTEGER = frozenset("maximum minimum remainder floor_divide sign power".split())


@dataclass(frozen=True)
class Printed:
    """Statements of a graph by level, and the name or constant that holds the result."""

    group: tuple[str, ...]
    row: tuple[str, ...]
    element: tuple[str, ...]
    result: str


def array_names(graph: Graph, prefix: str) -> tuple[str, ...]:
    """Names of the kernel inputs that a graph's captured arrays become."""
    return tuple(f"{prefix}_captured_{n}" for n in range(len(graph.arrays)))


def print_graph(
    graph: Graph,
    language: Spelling,
    prefix: str,
    inputs: Mapping[str, str],
    of_rows: Sequence[str] = ("q",),
    arrays: Sequence[str] | None = None,
) -> Printed:
    """The statements that compute a graph.

    Args:
        language: what the statements are written in.
        prefix: what the names of values and of captured arrays start with.
        inputs: how the names of `metalgen.dsl.graph.INPUTS` are spelled there.
        of_rows: those of the inputs that a row has; ``score``, and what else there is of ``q``
            and ``kv``, are an element's.
        arrays: names of the captured arrays; None: as `array_names` has them.

    Arithmetic of 16-bit floats is done in float and rounded after each operation, as MLX does.
    A shift by the width of its type or more is taken modulo it.
    """
    names = array_names(graph, prefix) if arrays is None else arrays
    return _Printer(graph, language, prefix, inputs, of_rows, names).printed()


def print_place(
    graph: Graph,
    load: int,
    language: Spelling,
    prefix: str,
    inputs: Mapping[str, str],
    of_rows: Sequence[str],
    arrays: Sequence[str],
) -> Printed:
    """The statements that compute which element a node loads; the result is its number.

    Args:
        load: the node; the others as of `print_graph`.
    """
    printer = _Printer(graph, language, prefix, inputs, of_rows, arrays)
    found = printer.printed(place_nodes(graph, load))
    return replace(found, result=printer.place(graph.nodes[load]) or "0")


class _Printer:
    def __init__(
        self,
        graph: Graph,
        language: Spelling,
        prefix: str,
        inputs: Mapping[str, str],
        of_rows: Sequence[str],
        arrays: Sequence[str],
    ) -> None:
        self.graph = graph
        self.language = language
        self.prefix = prefix
        self.types = language.types
        self.inputs = inputs
        self.of_rows = of_rows
        self.arrays = arrays
        self.names: list[str] = []
        self.levels: list[int] = []

    def printed(self, needed: Collection[int] | None = None) -> Printed:
        """The statements of all nodes, or of those that are needed."""
        lines: list[list[str]] = [[], [], []]
        for n, node in enumerate(self.graph.nodes):
            if needed is not None and n not in needed:
                self.names.append("")
                self.levels.append(0)
                continue
            if node.op in INPUTS:
                self.names.append(self.inputs[node.op])
                of_row = node.op in self.of_rows
                element = node.op in ("score", "q", "kv") and not of_row
                self.levels.append(2 if element else int(of_row))
                continue
            level = max((self.levels[arg] for arg in node.args), default=0)
            self.levels.append(level)
            if node.op == "const":
                self.names.append(self._constant(node))
                continue
            name = f"{self.prefix}_{n}"
            lines[level].append(f"const {self.types[node.dtype]} {name} = {self._value(node)};")
            self.names.append(name)
        return Printed(tuple(lines[0]), tuple(lines[1]), tuple(lines[2]), self.names[-1])

    def _constant(self, node: Node) -> str:
        if node.dtype in FLOATS:
            text = self._float(float(node.value))  # type: ignore[arg-type]
            return text if node.dtype == "float32" else f"{self.types[node.dtype]}({text})"
        if node.dtype == "bool":
            return "true" if node.value else "false"
        value, unsigned = int(node.value), node.dtype.startswith("u")  # type: ignore[arg-type]
        suffix = ("u" if unsigned else "") + ("l" if DTYPES[node.dtype] == 8 else "")
        if not unsigned and value == -(1 << (8 * DTYPES[node.dtype] - 1)):
            return f"({value + 1}{suffix} - 1)"
        text = f"{value}{suffix}"
        if DTYPES[node.dtype] < 4:
            text = f"static_cast<{self.types[node.dtype]}>({text})"
        return f"({text})" if value < 0 else text

    def _float(self, value: float) -> str:
        if math.isfinite(value):
            text = f"{value:.9g}"
            text += "" if any(c in text for c in ".e") else ".0"
            return f"({text}f)" if value < 0 or text[0] == "-" else f"{text}f"
        bits = "7FC00000" if math.isnan(value) else "7F800000" if value > 0 else "FF800000"
        return f"{self.language.float_of_bits}(0x{bits}u)"

    def _value(self, node: Node) -> str:
        if node.op == "load":
            return self._load(node)
        names = [self.names[n] for n in node.args]
        types = [self.graph.nodes[n].dtype for n in node.args]
        if node.op == "cast":
            return self._cast(names[0], types[0], node.dtype)
        if node.op == "select":
            return f"{names[0]} ? {names[1]} : {names[2]}"
        if node.op == "logical_not":
            return f"!{names[0]}"
        of = types[0]
        if of in FLOATS:
            wide = [
                n if t == "float32" else f"static_cast<float>({n})"
                for n, t in zip(names, types, strict=True)
            ]
            factor = self._reciprocal(node.args[1]) if node.op == "divide" else None
            value = f"{wide[0]} * {factor}" if factor else self._of_floats(node.op, wide)
            return (
                value
                if node.dtype in ("bool", "float32")
                else self._cast(value, "float32", node.dtype)
            )
        return self._of_integers(node, of, names)

    def _reciprocal(self, divisor: int) -> str | None:
        """What multiplies instead of a constant divisor: a division takes as long as ten products.

        The quotient is off by one more rounding. None where the divisor is no constant, or its
        reciprocal is no normal float.
        """
        node = self.graph.nodes[divisor]
        if node.op != "const" or node.dtype not in FLOATS:
            return None
        value = abs(float(node.value))  # type: ignore[arg-type]
        if not 2.0**-126 <= value <= 2.0**126:
            return None
        return self._float(1 / float(node.value))  # type: ignore[arg-type]

    def _of_floats(self, op: str, names: list[str]) -> str:
        if op in _INFIX:
            return f"{names[0]} {_INFIX[op]} {names[1]}"
        if op == "negative":
            return f"-{names[0]}"
        if op == "square":
            return f"{names[0]} * {names[0]}"
        if op == "floor_divide":
            return f"floor({names[0]} / {names[1]})"
        arguments = ", ".join(names)
        if op in _OWN:
            return f"mg_{op}({arguments})"
        return f"{self.language.function(_FUNCTIONS[op])}({arguments})"

    def _of_integers(self, node: Node, of: str, names: list[str]) -> str:
        op, kind = node.op, self.types[of]
        bits = 8 * DTYPES[of]
        if of == "bool" and op in _OF_BOOLS:
            return f"{names[0]} {_OF_BOOLS[op]} {names[1]}"
        if op == "square":
            return self._of_integers(Node("multiply", of), of, [names[0], names[0]])
        if op in ("left_shift", "right_shift"):
            sign = "<<" if op == "left_shift" else ">>"
            return f"static_cast<{kind}>({names[0]} {sign} ({names[1]} & {bits - 1}))"
        if op in _INFIX:
            value = f"{names[0]} {_INFIX[op]} {names[1]}"
            wide = node.dtype == "bool" or bits >= 32  # narrower ones were promoted to int
            return value if wide else f"static_cast<{kind}>({value})"
        if op in _OWN_INTEGER:
            return f"mg_{op}<{kind}>({', '.join(names)})"
        if op == "abs":
            return (
                names[0]
                if of.startswith("u")
                else f"static_cast<{kind}>({names[0]} < 0 ? -{names[0]} : {names[0]})"
            )
        if op == "negative":
            return f"static_cast<{kind}>(-{names[0]})"
        return names[0]  # floor, ceil, round

    def _cast(self, name: str, of: str, to: str) -> str:
        if to == "bool":
            zero = "0.0f" if of in FLOATS else "0"
            wide = f"static_cast<float>({name})" if of in ("float16", "bfloat16") else name
            return f"{wide} != {zero}" if of != "bool" else name
        narrow = ("float16", "bfloat16")
        if (of in narrow and to != "float32") or (to in narrow and of != "float32"):
            name = f"static_cast<float>({name})"
        return f"static_cast<{self.types[to]}>({name})"

    def _load(self, node: Node) -> str:
        number = node.array
        assert number is not None
        name = self.arrays[number]
        shape = self.graph.arrays[number].shape
        if not shape:
            return self.language.scalar.format(name)
        return f"{name}[{self.place(node)}]"

    def place(self, node: Node) -> str:
        """The number of the element that a node loads; empty where its array has no axes."""
        shape = self.graph.arrays[cast(int, node.array)].shape
        place = ""
        for extent, arg in zip(shape, node.args, strict=True):
            each = self.graph.nodes[arg]
            if each.op == "const":
                index = int(each.value)  # type: ignore[arg-type]
                index = min(max(index + extent if index < 0 else index, 0), extent - 1)
                text = str(index)
            else:
                text = f"mg_index({self._index(arg)}, {extent})"
            place = (
                f"{f'({place})' if ' + ' in place else place} * {extent} + {text}"
                if place
                else text
            )
        return place

    def _index(self, arg: int) -> str:
        dtype, name = self.graph.nodes[arg].dtype, self.names[arg]
        if dtype in ("int32", "int64"):
            return name
        return f"{'int64_t' if DTYPES[dtype] >= 4 else 'int'}({name})"
