"""Derivatives of graphs, as graphs: of a score function in the score, or in what it loads.

In forward mode, so that a branch that ``mx.where`` does not take has no share in the derivative,
whatever its own is there: MLX multiplies by 0 instead, and 0 * inf is NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from metalgen.dsl.graph import FLOATS, Builder, Captured, Graph, Node

FLOAT = "float32"


@dataclass(frozen=True)
class Derivative:
    """A derivative.

    Args:
        graph: what it computes, in float32.
        arrays: numbers of the function's captured arrays that the graph's are.
    """

    graph: Graph
    arrays: tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def slope(graph: Graph) -> Derivative:
    """The derivative of a score function in the score.

    Where it has a kink, that of one side. Arithmetic of 16-bit floats is differentiated in float32.
    """
    score = next((n for n, node in enumerate(graph.nodes) if node.op == "score"), None)
    return _derivative(graph, score)


@functools.lru_cache(maxsize=1024)
def of_loads(graph: Graph) -> dict[int, Derivative]:
    """The derivatives of a score function in the elements that it loads, by the loads' nodes."""
    loads = (n for n, node in enumerate(graph.nodes) if node.op == "load" and node.dtype in FLOATS)
    return {n: _derivative(graph, n) for n in loads}


def _derivative(graph: Graph, of: int | None) -> Derivative:
    tangents = _Tangents(graph)
    found = tangents.of_result(of)
    made, kept = tangents.builder.graph(found)
    return Derivative(made, tuple(kept))


class _Tangents:
    """A graph once more, with the derivative of each of its values in one of them."""

    def __init__(self, graph: Graph) -> None:
        self.source = graph
        self.builder = Builder()
        self.builder.arrays = [Captured(a.dtype, a.shape) for a in graph.arrays]
        self.values: list[int] = []
        self.tangents: list[int | None] = []

    def of_result(self, of: int | None) -> int:
        for n, node in enumerate(self.source.nodes):
            args = tuple(self.values[arg] for arg in node.args)
            value = self.builder.add(Node(node.op, node.dtype, args, node.value, node.array))
            self.values.append(value)
            self.tangents.append(self.number(1.0) if n == of else self._tangent(n, node))
        last = self.tangents[-1]
        return self.number(0.0) if last is None else last

    def _tangent(self, n: int, node: Node) -> int | None:
        """The derivative of a value; None: it is 0."""
        moved = [self.tangents[arg] for arg in node.args]
        if node.dtype not in FLOATS or all(each is None for each in moved) or node.op == "load":
            return None
        if node.op == "cast":
            return moved[0]
        if node.op == "select":
            both = [self.number(0.0) if each is None else each for each in moved[1:]]
            return self.builder.add(Node("select", FLOAT, (self.values[node.args[0]], *both)))
        x, *more = (self._float(self.values[arg]) for arg in node.args)
        result = self._float(self.values[n])
        if not more:
            factor = UNARY[node.op](self, x, result) if node.op in UNARY else None
            return None if factor is None else self.multiply(moved[0], factor)
        return self._of_two(node.op, x, more[0], result, moved)

    def _of_two(self, op: str, x: int, y: int, result: int, moved: list[int | None]) -> int | None:
        dx, dy = moved
        if op in ("maximum", "minimum"):
            first = self.compare("greater" if op == "maximum" else "less", x, y)
            both = [self.number(0.0) if each is None else each for each in moved]
            return self.builder.add(Node("select", FLOAT, (first, *both)))
        if op not in BINARY:
            return None
        of_x, of_y = BINARY[op]
        parts = []
        if dx is not None and of_x is not None:
            parts.append(self.multiply(dx, of_x(self, x, y, result)))
        if dy is not None and of_y is not None:
            parts.append(self.multiply(dy, of_y(self, x, y, result)))
        return functools.reduce(self.add, parts) if parts else None

    # What formulas are made of.

    def number(self, value: float) -> int:
        return self.builder.constant(value, FLOAT)

    def binary(self, op: str, x: int, y: int) -> int:
        return self.builder.add(Node(op, FLOAT, (x, y)))

    def unary(self, op: str, x: int) -> int:
        return self.builder.add(Node(op, FLOAT, (x,)))

    def compare(self, op: str, x: int, y: int) -> int:
        return self.builder.add(Node(op, "bool", (x, y)))

    def add(self, x: int, y: int) -> int:
        return self.binary("add", x, y)

    def multiply(self, x: int | None, y: int) -> int:
        assert x is not None
        return self.binary("multiply", x, y)

    def divide(self, x: int, y: int) -> int:
        return self.binary("divide", x, y)

    def less_square(self, x: int) -> int:
        """1 - x^2."""
        return self.binary("subtract", self.number(1.0), self.unary("square", x))

    def more_square(self, x: int) -> int:
        """1 + x^2."""
        return self.add(self.number(1.0), self.unary("square", x))

    def squares(self, x: int, y: int) -> int:
        """x^2 + y^2."""
        return self.add(self.unary("square", x), self.unary("square", y))

    def _float(self, n: int) -> int:
        return self.builder.add(Node("cast", FLOAT, (n,)))


OfOne = Callable[[_Tangents, int, int], int]
OfTwo = Callable[[_Tangents, int, int, int], int]


def _log(base: float) -> OfOne:
    return lambda t, x, r: t.divide(t.number(1 / math.log(base)), x)


UNARY: dict[str, OfOne] = {
    "abs": lambda t, x, r: t.unary("sign", x),
    "negative": lambda t, x, r: t.number(-1.0),
    "square": lambda t, x, r: t.multiply(t.number(2.0), x),
    "exp": lambda t, x, r: r,
    "expm1": lambda t, x, r: t.add(r, t.number(1.0)),
    "log1p": lambda t, x, r: t.divide(t.number(1.0), t.add(t.number(1.0), x)),
    "sigmoid": lambda t, x, r: t.multiply(r, t.binary("subtract", t.number(1.0), r)),
    "erf": lambda t, x, r: t.multiply(
        t.number(2 / math.sqrt(math.pi)), t.unary("exp", t.unary("negative", t.unary("square", x)))
    ),
    "sin": lambda t, x, r: t.unary("cos", x),
    "cos": lambda t, x, r: t.unary("negative", t.unary("sin", x)),
    "tan": lambda t, x, r: t.more_square(r),
    "sinh": lambda t, x, r: t.unary("cosh", x),
    "cosh": lambda t, x, r: t.unary("sinh", x),
    "tanh": lambda t, x, r: t.less_square(r),
    "arcsin": lambda t, x, r: t.unary("rsqrt", t.less_square(x)),
    "arccos": lambda t, x, r: t.unary("negative", t.unary("rsqrt", t.less_square(x))),
    "arctan": lambda t, x, r: t.divide(t.number(1.0), t.more_square(x)),
    "arcsinh": lambda t, x, r: t.unary("rsqrt", t.more_square(x)),
    "arccosh": lambda t, x, r: t.unary(
        "rsqrt", t.binary("subtract", t.unary("square", x), t.number(1.0))
    ),
    "arctanh": lambda t, x, r: t.divide(t.number(1.0), t.less_square(x)),
    "log": _log(math.e),
    "log2": _log(2.0),
    "log10": _log(10.0),
    "sqrt": lambda t, x, r: t.divide(t.number(0.5), r),
    "rsqrt": lambda t, x, r: t.multiply(t.number(-0.5), t.divide(r, x)),
}
"""Derivatives of functions of x, whose result is r; of those left out it is 0."""

BINARY: dict[str, tuple[OfTwo | None, OfTwo | None]] = {
    "add": (lambda t, x, y, r: t.number(1.0), lambda t, x, y, r: t.number(1.0)),
    "subtract": (lambda t, x, y, r: t.number(1.0), lambda t, x, y, r: t.number(-1.0)),
    "multiply": (lambda t, x, y, r: y, lambda t, x, y, r: x),
    "divide": (
        lambda t, x, y, r: t.divide(t.number(1.0), y),
        lambda t, x, y, r: t.unary("negative", t.divide(r, y)),
    ),
    "remainder": (
        lambda t, x, y, r: t.number(1.0),
        lambda t, x, y, r: t.unary("negative", t.binary("floor_divide", x, y)),
    ),
    "power": (
        lambda t, x, y, r: t.multiply(
            y, t.binary("power", x, t.binary("subtract", y, t.number(1.0)))
        ),
        lambda t, x, y, r: t.multiply(r, t.unary("log", x)),
    ),
    "logaddexp": (
        lambda t, x, y, r: t.unary("sigmoid", t.binary("subtract", x, y)),
        lambda t, x, y, r: t.unary("sigmoid", t.binary("subtract", y, x)),
    ),
    "arctan2": (
        lambda t, x, y, r: t.divide(y, t.squares(x, y)),
        lambda t, x, y, r: t.unary("negative", t.divide(x, t.squares(x, y))),
    ),
}
"""Derivatives of functions of x and y in both; of those left out they are 0."""
