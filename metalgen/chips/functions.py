"""What user score and mask functions cost on an Apple GPU: issue cycles of their operations.

Costs are cycles of a simdgroup on one scheduler. Those in `MEASURED` are throughputs of M1 in
metal-benchmarks (its tables of float and integer instructions and sequences; what the kernels call
is the precise form where safe mathematics has one); those in `GUESSED` are library functions that
nobody timed, taken as a few times the instructions that they are made of.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from metalgen.problem.config import AttentionConfig

if TYPE_CHECKING:
    from metalgen.dsl.graph import Graph, Node

MEASURED = {
    **dict.fromkeys(
        "add subtract multiply negative abs square select equal not_equal greater greater_equal "
        "less less_equal logical_and logical_or logical_not bitwise_and bitwise_or bitwise_xor "
        "cast".split(),
        1.0,
    ),
    **dict.fromkeys(("floor", "ceil", "round", "log2", "left_shift", "right_shift"), 4.0),
    **dict.fromkeys(("exp", "log", "log10"), 5.0),  # exp2 or log2, and a factor
    "divide": 11.5,  # precise reciprocal, and a factor
    "rsqrt": 8.0,
    "sqrt": 15.0,
    "sin": 24.4,
    "cos": 24.4,
}
GUESSED = {
    **dict.fromkeys(("maximum", "minimum", "sign"), 3.0),
    **dict.fromkeys(("floor_divide", "remainder"), 16.0),
    **dict.fromkeys(
        ("sigmoid", "expm1", "log1p", "tanh", "sinh", "cosh", "erf", "logaddexp"), 25.0
    ),
    **dict.fromkeys(("arcsin", "arccos", "arctan", "arcsinh", "arccosh", "arctanh", "tan"), 40.0),
    **dict.fromkeys(("arctan2", "power"), 50.0),
}
INTEGER = {
    "multiply": 4.0,
    "square": 4.0,
    "divide": 40.0,
    "floor_divide": 40.0,
    "remainder": 40.0,
    "power": 100.0,
}
"""Of integers, where they differ; division is a guess, for there is no instruction for it."""
CONVERT = 4.0
"""Between integers and floats; measured."""
AXIS = 8.0
"""An index of a load: compared and corrected at both ends, and a multiply-add; a guess."""
ELEMENT = {"score": 1.0, "mask": 2.0}
"""What each score takes beside a function itself: its factor; the test and the select."""


class FunctionCost(NamedTuple):
    """Issue cycles, and loads, of all functions of a config: for each query row, and each score."""

    row: float
    element: float
    row_loads: float
    element_loads: float


NOTHING = FunctionCost(0.0, 0.0, 0.0, 0.0)


def function_cost(config: AttentionConfig, *, packed: bool = False) -> FunctionCost:
    """What the functions of a config cost.

    Args:
        packed: rows are queries of several heads (decode), so the head is known for each row only.
    """
    if config.score_mod is None and config.mask_mod is None:
        return NOTHING
    return _cost(config.score_mod, config.mask_mod, packed)


@functools.lru_cache(maxsize=256)
def _cost(score: str | None, mask: str | None, packed: bool) -> FunctionCost:
    from metalgen.dsl.graph import parse

    cycles, loads = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]  # a kernel, a row, an element
    for role, text in (("score", score), ("mask", mask)):
        if text is None:
            continue
        graph = parse(text)
        cycles[2] += ELEMENT[role]
        for node, level in zip(graph.nodes, levels(graph, packed), strict=True):
            cycles[level] += operation_cost(graph, node)
            loads[level] += node.op == "load"
    return FunctionCost(cycles[1], cycles[2], loads[1], loads[2])


def levels(graph: Graph, packed: bool) -> list[int]:
    """For each node 0, 1 or 2: whether it is computed once a kernel, a row, or for each score."""
    of_inputs = {"b": 0, "h": int(packed), "q": 1, "score": 2, "kv": 2}
    found: list[int] = []
    for node in graph.nodes:
        below = max((found[n] for n in node.args), default=0)
        found.append(of_inputs.get(node.op, below))
    return found


def operation_cost(graph: Graph, node: Node) -> float:
    """Issue cycles of one node; inputs and constants are there already."""
    from metalgen.dsl.graph import FLOATS, INPUTS

    if node.op in INPUTS or node.op == "const":
        return 0.0
    if node.op == "load":
        return AXIS * max(1, len(node.args))
    of = graph.nodes[node.args[0]].dtype
    if node.op == "cast":
        return MEASURED["cast"] if (of in FLOATS) == (node.dtype in FLOATS) else CONVERT
    if of not in FLOATS and of != "bool" and node.op in INTEGER:
        return INTEGER[node.op]
    return MEASURED[node.op] if node.op in MEASURED else GUESSED[node.op]
