"""A traced function of other batch entries and heads than it was traced for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import mlx.core as mx

from metalgen.dsl.graph import INPUTS, Builder, Captured, Node
from metalgen.dsl.trace import Traced


def reindexed(traced: Traced, entries: Mapping[str, Sequence[int]]) -> Traced:
    """The same function, with an index of some inputs replaced.

    Args:
        traced: the function.
        entries: by the names of inputs (``"b"``, ``"h"``), the old index of each new one. Inputs
            that the function does not read are left alone.
    """
    graph, builder = traced.graph, Builder()
    arrays = list(traced.arrays)
    builder.arrays = list(graph.arrays)
    places: list[int] = []
    for node in graph.nodes:
        if node.op not in entries:
            args = tuple(places[n] for n in node.args)
            places.append(builder.add(replace(node, args=args)))
            continue
        chosen = list(entries[node.op])
        dtype = INPUTS[node.op]
        if len(chosen) == 1:
            places.append(builder.constant(chosen[0], dtype))
            continue
        own = builder.add(node)
        if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
            first = builder.constant(chosen[0], dtype)
            places.append(builder.add(Node("add", dtype, (own, first))))
            continue
        arrays.append(mx.array(chosen, mx.int32))
        builder.arrays.append(Captured(dtype, (len(chosen),)))
        places.append(builder.add(Node("load", dtype, (own,), array=len(arrays) - 1)))
    found, kept = builder.graph(places[-1])
    return Traced(found, tuple(arrays[n] for n in kept), traced.captured)
