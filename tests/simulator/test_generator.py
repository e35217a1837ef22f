"""The generated Metal text equals MLX's own, which MLX prints while tracing on any machine."""

from __future__ import annotations

import os
import sys
import tempfile
from typing import Any

import mlx.core as mx
import pytest

from metalgen.simulator.generator import (
    METAL_TYPES,
    THREAD_ATTRIBUTES,
    InputForm,
    generate,
    used_attributes,
)

BODY = "uint i = thread_position_in_grid.x;\nout[i] = x[i];"


def mlx_text(constructor: dict[str, Any], inputs: list[mx.array], call: dict[str, Any]) -> str:
    """Let MLX trace the call and return the source that it prints to file descriptor 1."""

    def traced(*arrays: mx.array) -> Any:
        kernel = mx.fast.metal_kernel(**constructor)
        return kernel(inputs=list(arrays), verbose=True, **call)

    sys.stdout.flush()
    with tempfile.TemporaryFile() as capture:
        saved = os.dup(1)
        os.dup2(capture.fileno(), 1)
        try:
            mx.export_function(lambda event: None, traced, *inputs)
        finally:
            os.dup2(saved, 1)
            os.close(saved)
        capture.seek(0)
        printed = capture.read().decode()
    opening = f"Generated source code for `{constructor['name']}`:\n```\n"
    assert printed.startswith(opening) and printed.endswith("\n```\n")
    return printed[len(opening) : -len("\n```\n")]


def case(
    inputs: list[mx.array] | None = None,
    *,
    source: str = BODY,
    header: str = "",
    name: str = "k",
    names: list[str] | None = None,
    out_names: list[str] | None = None,
    out_dtypes: list[mx.Dtype] | None = None,
    template: list[tuple[str, Any]] | None = None,
    atomic: bool = False,
    init_value: float | None = None,
    compile_options: dict[str, str] | None = None,
    contiguous: bool = True,
) -> tuple[dict[str, Any], list[mx.array], dict[str, Any]]:
    inputs = [mx.zeros((4, 5))] if inputs is None else inputs
    out_names = out_names or ["out"]
    constructor = dict(
        name=name,
        input_names=names or ["x", "y", "z", "k"][: len(inputs)],
        output_names=out_names,
        source=source,
        header=header,
        ensure_row_contiguous=contiguous,
        atomic_outputs=atomic,
        compile_options=compile_options,
    )
    call = dict(
        output_shapes=[(3,)] * len(out_names),
        output_dtypes=out_dtypes or [mx.float32] * len(out_names),
        grid=(8, 1, 1),
        threadgroup=(4, 1, 1),
        template=template,
        init_value=init_value,
    )
    return constructor, inputs, call


SHAPE_WORDS = "x_shape[0] + y_strides[0] + z_ndim"
CASES: dict[str, tuple[dict[str, Any], list[mx.array], dict[str, Any]]] = {
    "an elementwise kernel": case(),
    "no input at all": case([]),
    "a 0-d input is a reference": case([mx.array(1.0)]),
    "7 elements lie in constant": case([mx.zeros((7,))]),
    "8 elements lie in device": case([mx.zeros((8,))]),
    "an empty array lies in constant": case([mx.zeros((0, 4))]),
    "a small 2-d array lies in constant": case([mx.zeros((2, 3))]),
    "a mixture of forms": case([mx.zeros((9,)), mx.array(2), mx.zeros((1, 1)), mx.zeros((3, 3))]),
    "shape of a device array": case(source=BODY + "x_shape[0]"),
    "strides of a device array": case(source=BODY + "x_strides[0]"),
    "ndim of a device array": case(source=BODY + "x_ndim"),
    "shape, strides and ndim together": case(source=BODY + "x_ndim x_strides x_shape"),
    "shape of a constant array": case([mx.zeros((2,))], source=BODY + "x_shape"),
    "shape words of a 0-d input add nothing": case([mx.array(1)], source=BODY + "x_shape x_ndim"),
    "shape words of three inputs": case([mx.zeros((9,))] * 3, source=BODY + SHAPE_WORDS),
    "shape words in the header add nothing": case(header="// x_shape x_strides x_ndim\n"),
    "block_shape counts as k_shape": case(
        [mx.zeros((9,))], names=["k"], source=BODY + "int block_shape = 3;"
    ),
    "my_grid_size adds grid_size": case(source="int my_grid_size = 3;"),
    "threads_per_threadgroup inside dispatch_threads_per_threadgroup": case(
        source="dispatch_threads_per_threadgroup.x"
    ),
    "thread_index_in_simdgroup inside a longer word": case(source="my_thread_index_in_simdgroups"),
    "an attribute in a comment": case(source="// simdgroup_index_in_threadgroup\nout[0] = 1;"),
    "an attribute only in the header": case(header="// thread_position_in_grid\n", source="x;"),
    "no attribute, one output": case(source="out[0] = x[0];"),
    "no attribute, two outputs": case(source="a[0] = x[0];", out_names=["a", "b"]),
    "no attribute, two outputs, shape words": case(
        source="a[0] = x_shape[0];", out_names=["a", "b"]
    ),
    "no attribute, three outputs, all shape words": case(
        source="x_shape x_strides x_ndim", out_names=["a", "b", "c"]
    ),
    "all attributes": case(source=" ".join(name for name, _ in THREAD_ATTRIBUTES)),
    "an int template": case(template=[("N", 3)]),
    "a negative int template": case(template=[("N", -3)]),
    "the smallest int": case(template=[("N", -(2**31))]),
    "a true template": case(template=[("B", True)]),
    "a false template": case(template=[("B", False)]),
    "a type template": case(template=[("T", mx.float16)]),
    "templates of each kind": case(
        template=[("T", mx.bfloat16), ("N", 64), ("B", True), ("U", mx.uint8), ("M", -1)]
    ),
    "an empty template list": case(template=[]),
    "a template with a header": case(header="using X = float;\n", template=[("T", mx.float32)]),
    "a header without a newline": case(header="#define A 1"),
    "a header": case(header="#include <metal_simdgroup_matrix>\nusing namespace metal;\n"),
    "atomic outputs": case(atomic=True),
    "atomic outputs of several types": case(
        atomic=True, out_names=["a", "b"], out_dtypes=[mx.int32, mx.uint32]
    ),
    "atomic outputs with a template": case(atomic=True, template=[("T", mx.int32)]),
    "an initial value": case(init_value=0.0),
    "three outputs of several types": case(
        out_names=["a", "b", "c"], out_dtypes=[mx.float16, mx.bool_, mx.int64]
    ),
    "strided inputs are not copied": case([mx.zeros((4, 5)).T], contiguous=False),
    "math mode fast": case(compile_options={"math_mode": "fast"}),
    "math mode relaxed": case(compile_options={"math_mode": "relaxed"}),
    "math mode safe": case(compile_options={"math_mode": "safe"}),
    "an empty body": case(source=""),
    "a body of several lines": case(source="\n\n" + BODY + "\n\n"),
    "a name with digits": case(name="my_kernel_2"),
    "an empty name": case(name=""),
    "long parameter names": case([mx.zeros((9,))], names=["a_long_parameter_name"]),
    "a name that is a prefix of another": case(
        [mx.zeros((9,)), mx.zeros((9,))], names=["q", "q_shape"], source="q_shape q_shape_shape"
    ),
    "the scalars of Python": case([mx.array(3), mx.array(2.5), mx.array(True)]),
    **{f"attribute {name}": case(source=f"{name};") for name, _ in THREAD_ATTRIBUTES},
    **{
        f"type {dtype}": case([mx.zeros((9,), dtype)], out_dtypes=[dtype], template=[("T", dtype)])
        for dtype in METAL_TYPES
    },
}


def our_text(constructor: dict[str, Any], inputs: list[mx.array], call: dict[str, Any]) -> Any:
    return generate(
        constructor["name"],
        constructor["input_names"],
        constructor["output_names"],
        constructor["source"],
        constructor["header"],
        [InputForm(x.dtype, x.ndim, x.size) for x in inputs],
        call["output_dtypes"],
        call["template"] or (),
        constructor["atomic_outputs"],
    )


@pytest.mark.parametrize("title", CASES)
def test_the_text_equals_the_one_that_mlx_generates(title: str) -> None:
    constructor, inputs, call = CASES[title]
    assert our_text(constructor, inputs, call).text == mlx_text(constructor, inputs, call)


def test_there_are_at_least_sixty_cases() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("title", CASES)
def test_the_body_line_points_at_the_first_line_of_the_body(title: str) -> None:
    constructor, inputs, call = CASES[title]
    ours = our_text(constructor, inputs, call)
    tail = "\n".join(ours.text.split("\n")[ours.body_line - 1 :])
    assert tail.startswith(constructor["source"])


def test_bindings_are_listed_in_buffer_order() -> None:
    constructor, inputs, call = case(
        [mx.zeros((9,)), mx.array(1)], source=BODY + "x_strides x_shape", out_names=["a", "b"]
    )
    bindings = our_text(constructor, inputs, call).bindings
    assert [(b.name, b.role, b.position) for b in bindings] == [
        ("x", "input", 0),
        ("x_shape", "shape", 0),
        ("x_strides", "strides", 0),
        ("y", "input", 1),
        ("a", "output", 0),
        ("b", "output", 1),
    ]


def test_attributes_are_found_by_substring() -> None:
    assert used_attributes("int my_grid_size;") == [("grid_size", "uint3")]
    assert used_attributes("thread_position_in_gri") == []
