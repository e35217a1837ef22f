"""Where score functions load elements of captured arrays, by which gradients are summed."""

from __future__ import annotations

import functools
from typing import Any, cast

from metalgen.dsl.graph import FLOATS, INPUTS, Graph, load_place


@functools.lru_cache(maxsize=1024)
def float_loads(graph: Graph) -> tuple[int, ...]:
    """The nodes that load floats."""
    nodes = enumerate(graph.nodes)
    return tuple(n for n, node in nodes if node.op == "load" and node.dtype in FLOATS)


@functools.lru_cache(maxsize=1024)
def place_inputs(graph: Graph, load: int) -> frozenset[str]:
    """Which of `metalgen.dsl.graph.INPUTS` the element depends on that a node loads."""
    nodes = (graph.nodes[n] for n in place_nodes(graph, load))
    return frozenset(node.op for node in nodes if node.op in INPUTS)


def place_nodes(graph: Graph, load: int) -> frozenset[int]:
    """The nodes that compute which element a node loads."""
    found: set[int] = set()
    left = list(graph.nodes[load].args)
    while left:
        n = left.pop()
        if n not in found:
            found.add(n)
            left += graph.nodes[n].args
    return frozenset(found)


def places(graph: Graph, load: int, xp: Any, inputs: dict[str, Any], arrays: Any) -> Any:
    """Numbers of the elements that a node loads, counted row by row.

    Args:
        graph, load: the function and its node.
        xp, inputs, arrays: as of `Graph.evaluate`.

    Returns:
        Integers that broadcast to the shape of the inputs that they depend on.
    """
    node = graph.nodes[load]
    indices = []
    for arg in node.args:
        before = Graph(graph.arrays, graph.nodes[: arg + 1])
        indices.append(before.evaluate(xp, inputs, arrays))
    return load_place(xp, graph.arrays[cast(int, node.array)].shape, indices)
