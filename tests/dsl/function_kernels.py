"""A kernel of nothing but printed functions: one thread an element, all functions in each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from metalgen import simulator
from metalgen.dsl.printer import array_names, print_graph
from metalgen.dsl.trace import Traced
from metalgen.languages import METAL
from metalgen.source.render import _environment

ELEMENTS = 64
_NAMES = {"score": "score", "b": "batch", "h": "head", "q": "q_idx", "kv": "kv_idx"}


def places() -> tuple[mx.array, mx.array, mx.array, mx.array, mx.array]:
    """Scores of both signs, and indices that cover all orders of i and j."""
    n = mx.arange(ELEMENTS)
    score = mx.random.normal((ELEMENTS,), key=mx.random.key(9)) * 3
    return score, n % 3, n % 4, (n * 7) % 50, (n * 11) % 30


def run(functions: Sequence[Traced], *, checked: bool = False) -> list[NDArray[np.float32]]:
    """The values of graphs at `places`, as float32, computed by Metal in the simulator."""
    header = _environment().get_template("languages/metal/functions.jinja").render()
    names, arrays, body = ["score_in", "places_in"], [], []
    for n, function in enumerate(functions):
        printed = print_graph(function.graph, METAL, f"f{n}", _NAMES)
        names += array_names(function.graph, f"f{n}")
        arrays += [mx.contiguous(a) for a in function.arrays]
        body += [*printed.group, *printed.row, *printed.element]
        body.append(f"out[{n} * {ELEMENTS} + at] = float({printed.result});")
    lines = [
        "const int at = thread_position_in_grid.x;",
        "const float score = score_in[at];",
        *(
            f"const int {name} = places_in[{row} * {ELEMENTS} + at];"
            for row, name in enumerate(("batch", "head", "q_idx", "kv_idx"))
        ),
        *body,
    ]
    kernel = simulator.metal_kernel(
        name="functions",
        input_names=names,
        output_names=["out"],
        source="\n".join(lines),
        header=f"using namespace metal;\n{header}",
    )
    score, *indices = places()
    inputs: list[Any] = [score, mx.stack(indices).astype(mx.int32), *arrays]
    with simulator.record(checked=checked, raise_on_findings=checked):
        out = kernel(
            inputs=inputs,
            output_shapes=[(len(functions), ELEMENTS)],
            output_dtypes=[mx.float32],
            grid=(ELEMENTS, 1, 1),
            threadgroup=(32, 1, 1),
        )[0]
    return list(np.array(out))
