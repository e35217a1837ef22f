"""`simulator.metal_kernel` behaves as `mx.fast.metal_kernel` does on a Mac."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen import simulator
from metalgen.simulator.errors import CompileError, LaunchError
from metalgen.simulator.generator import METAL_TYPES

COPY = "uint i = thread_position_in_grid.x; out[i] = x[i];"
STRIDED = (
    "uint i = thread_position_in_grid.x; "
    "out[i] = x[elem_to_loc(int64_t(i), x_shape, x_strides, x_ndim)];"
)
REAL = [d for d in METAL_TYPES if d != mx.complex64]


def build(source: str = COPY, inputs: int = 1, outputs: int = 1, **options: Any) -> Any:
    return simulator.metal_kernel(
        name="k",
        input_names=["x", "y", "z"][:inputs],
        output_names=["out", "out2", "out3"][:outputs],
        source=source,
        **options,
    )


def call(kernel: Any, inputs: list[Any], size: int = 8, **changes: Any) -> list[mx.array]:
    arguments: dict[str, Any] = dict(
        inputs=inputs,
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
        grid=(size, 1, 1),
        threadgroup=(4, 1, 1),
    )
    return list(kernel(**{**arguments, **changes}))


def numpy(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)


@pytest.mark.parametrize("dtype", METAL_TYPES, ids=str)
def test_every_type_travels_through_a_kernel_unchanged(dtype: mx.Dtype) -> None:
    values = mx.array([0, 1, 0, 3, 100, 7, 0, 2]).astype(dtype)
    (out,) = call(build(), [values], output_dtypes=[dtype])
    assert out.dtype == dtype
    assert mx.array_equal(out, values).item()


@pytest.mark.parametrize("size", [1, 7, 8, 9])
def test_small_inputs_in_constant_give_the_same_values_as_large_ones(size: int) -> None:
    values = mx.arange(size, dtype=mx.float32) + 0.5
    (out,) = call(build(), [values], size=size)
    assert out.tolist() == [i + 0.5 for i in range(size)]


def test_python_scalars_and_numpy_arrays_are_taken_as_inputs() -> None:
    kernel = build("uint i = thread_position_in_grid.x; out[i] = x * 10 + y + z[i];", inputs=3)
    (out,) = call(kernel, [3, 0.5, np.arange(8, dtype=np.float32)])
    assert out.tolist() == [30.5 + i for i in range(8)]


def test_templates_take_types_integers_and_booleans() -> None:
    kernel = build(
        "uint i = thread_position_in_grid.x; out[i] = FLAG ? T(x[i]) + N : T(-1);", inputs=1
    )
    template = [("T", mx.int32), ("N", -3), ("FLAG", True)]
    (out,) = call(kernel, [mx.arange(8) + 0.75], template=template)
    assert out.tolist() == [i - 3 for i in range(8)]
    (out,) = call(kernel, [mx.arange(8)], template=[*template[:2], ("FLAG", False)])
    assert out.tolist() == [-1] * 8


VIEWS = {
    "transposed": lambda a: a.T,
    "every second row": lambda a: a[::2],
    "reversed rows": lambda a: a[::-1],
    "reversed in both axes": lambda a: a[::-1, ::-1],
    "a slice of columns": lambda a: a[:, 1:4],
    "broadcast": lambda a: mx.broadcast_to(a[:, None, :], (4, 3, 6)),
    "one row": lambda a: a[2:3],
    "contiguous": lambda a: a,
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.int8], ids=str)
@pytest.mark.parametrize("contiguous", [True, False])
def test_strided_inputs_are_copied_or_read_in_place(
    view: str, dtype: mx.Dtype, contiguous: bool
) -> None:
    array = VIEWS[view](mx.arange(24, dtype=mx.float32).reshape(4, 6).astype(dtype))
    kernel = build(COPY if contiguous else STRIDED, ensure_row_contiguous=contiguous)
    (out,) = call(
        kernel, [array], size=array.size, output_dtypes=[dtype], output_shapes=[array.shape]
    )
    assert np.array_equal(numpy(out), numpy(array))


def test_strides_of_a_view_are_those_of_its_storage() -> None:
    kernel = build(
        "uint i = thread_position_in_grid.x; out[i] = x_strides[i] + 100 * x_shape[i];",
        ensure_row_contiguous=False,
    )
    array = mx.zeros((4, 6))[::-1].T
    (out,) = call(kernel, [array], size=2)
    assert out.tolist() == [600 + 1, 400 - 6]


def test_an_output_without_an_initial_value_is_poisoned() -> None:
    kernel = build("if (thread_position_in_grid.x == 0) out[0] = x[0];")
    (out,) = call(kernel, [mx.ones((8,))])
    assert out[0].item() == 1 and mx.all(mx.isnan(out[1:])).item()
    (out,) = call(kernel, [mx.ones((8,))], output_dtypes=[mx.int32])
    assert out.tolist() == [1] + [-1] * 7


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_an_initial_value_is_converted_to_the_type_of_each_output(dtype: mx.Dtype) -> None:
    kernel = build("if (thread_position_in_grid.x == 99) out[0] = x[0];")
    (out,) = call(kernel, [mx.ones((8,))], output_dtypes=[dtype], init_value=1.0)
    assert mx.array_equal(out, mx.ones((8,), dtype)).item()


def test_several_outputs_of_several_shapes_and_types() -> None:
    kernel = build(
        "uint i = thread_position_in_grid.x; out[i] = x[i]; if (i < 2) out2[i] = i; "
        "if (i == 0) out3[0] = 2;",
        outputs=3,
    )
    outputs = call(
        kernel,
        [mx.arange(8, dtype=mx.float32)],
        output_shapes=[(2, 4), (2,), ()],
        output_dtypes=[mx.float16, mx.uint8, mx.int64],
    )
    assert [x.shape for x in outputs] == [(2, 4), (2,), ()]
    assert [x.dtype for x in outputs] == [mx.float16, mx.uint8, mx.int64]
    assert [x.tolist() for x in outputs] == [[[0, 1, 2, 3], [4, 5, 6, 7]], [0, 1], 2]


def test_atomic_outputs_add_up_over_threadgroups_and_processes() -> None:
    kernel = build(
        "atomic_fetch_add_explicit(&out[thread_position_in_grid.x % 4], 1, memory_order_relaxed);",
        atomic_outputs=True,
    )
    (out,) = call(
        kernel,
        [mx.zeros((8,))],
        output_shapes=[(4,)],
        output_dtypes=[mx.int32],
        init_value=0,
        grid=(16384, 1, 1),
        threadgroup=(256, 1, 1),
    )
    assert out.tolist() == [4096] * 4


def test_the_last_threadgroup_of_a_row_may_be_partial() -> None:
    kernel = build(
        "uint i = thread_position_in_grid.x; "
        "out[i] = threads_per_threadgroup.x * 100 + dispatch_threads_per_threadgroup.x;"
    )
    (out,) = call(kernel, [mx.zeros((8,))], size=10)
    assert out.tolist() == [404.0] * 8 + [204.0] * 2


def test_the_threadgroup_is_clamped_to_the_grid() -> None:
    kernel = build("out[thread_position_in_grid.x] = threads_per_threadgroup.x;")
    (out,) = call(kernel, [mx.zeros((8,))], size=3, threadgroup=(64, 1, 1))
    assert out.tolist() == [3.0] * 3


def test_a_grid_of_three_dimensions_has_metal_s_positions() -> None:
    kernel = build(
        "uint3 p = thread_position_in_grid; uint3 n = threads_per_grid;"
        "uint3 g = threadgroup_position_in_grid; uint3 t = thread_position_in_threadgroup;"
        "out[(p.z * n.y + p.y) * n.x + p.x] = g.x * 1e5 + g.y * 1e4 + g.z * 1e3 + t.x * 100 "
        "+ t.y * 10 + t.z;"
    )
    (out,) = call(
        kernel, [mx.zeros((8,))], grid=(4, 6, 2), threadgroup=(2, 3, 1), output_shapes=[(2, 6, 4)]
    )
    z, y, x = np.meshgrid(range(2), range(6), range(4), indexing="ij")
    expected = (x // 2) * 1e5 + (y // 3) * 1e4 + z * 1e3 + (x % 2) * 100 + (y % 3) * 10
    assert np.array_equal(np.array(out), expected.astype(np.float32))


def test_verbose_prints_the_source_as_mlx_does(capsys: pytest.CaptureFixture[str]) -> None:
    kernel = build()
    call(kernel, [mx.zeros((8,))], verbose=True)
    text = kernel.generated_source([mx.zeros((8,))], [mx.float32]).text
    assert capsys.readouterr().out == f"Generated source code for `k`:\n```\n{text}\n```\n"


@pytest.mark.parametrize("mode, expected", [("safe", 0.0), ("fast", 1.0)])
def test_the_math_mode_defines_the_macro_that_source_can_ask_for(
    mode: str, expected: float
) -> None:
    source = """
        #if defined(__FAST_MATH__) && __FAST_MATH__
        out[thread_position_in_grid.x] = 1.0f;
        #else
        out[thread_position_in_grid.x] = 0.0f;
        #endif
    """
    (out,) = call(build(source, compile_options={"math_mode": mode}), [mx.zeros((8,))])
    assert out.tolist() == [expected] * 8


def test_two_kernels_of_one_name_keep_their_own_code() -> None:
    first = build("out[thread_position_in_grid.x] = 1;")
    second = build("out[thread_position_in_grid.x] = 2;")
    assert call(first, [mx.zeros((8,))])[0].tolist() == [1.0] * 8
    assert call(second, [mx.zeros((8,))])[0].tolist() == [2.0] * 8


def test_an_empty_input_may_be_bound() -> None:
    kernel = build("out[thread_position_in_grid.x] = x_shape[0];")
    (out,) = call(kernel, [mx.zeros((0, 3))])
    assert out.tolist() == [0.0] * 8


def test_a_lazy_input_is_evaluated() -> None:
    (out,) = call(build(), [mx.exp(mx.zeros((8,))) * 2])
    assert out.tolist() == [2.0] * 8


@pytest.mark.parametrize(
    "numbers",
    [
        lambda *n: tuple(np.int64(x) for x in n),
        lambda *n: np.array(n, np.uint8),
        lambda *n: list(n),
    ],
    ids=["scalars", "array", "list"],
)
def test_extents_may_be_numbers_of_numpy_as_for_mlx(numbers: Callable[..., Any]) -> None:
    (out,) = call(
        build("out[thread_position_in_grid.x] = threads_per_threadgroup.x;"),
        [mx.zeros((8,))],
        grid=numbers(8, 1, 1),
        threadgroup=numbers(4, 1, 1),
        output_shapes=[numbers(2, 4)],
    )
    assert out.tolist() == [[4.0] * 4] * 2


# Errors. Those that MLX raises on any machine are compared with MLX itself.

BAD_CONSTRUCTORS: dict[str, dict[str, Any]] = {
    "no output": dict(output_names=[]),
    "an unknown compile option": dict(compile_options={"opt": 1}),
    "an unknown math mode": dict(compile_options={"math_mode": "precise"}),
    "compile options that are no dict": dict(compile_options=3),
    "a name that is no string": dict(name=3),
    "a source that is no string": dict(source=None),
}
BAD_CALLS: dict[str, dict[str, Any]] = {
    "too few inputs": dict(inputs=[]),
    "too many inputs": dict(inputs=[1, 2]),
    "an input that is no array": dict(inputs=["x"]),
    "an integer that fits no type": dict(inputs=[2**70]),
    "too few output shapes": dict(output_shapes=[]),
    "too many output types": dict(output_dtypes=[mx.float32] * 2),
    "an output type that is no dtype": dict(output_dtypes=["float32"]),
    "an output shape that is no sequence": dict(output_shapes=[3]),
    "an output shape of floats": dict(output_shapes=[(1.5,)]),
    "a template value that is a float": dict(template=[("T", 1.5)]),
    "a template value that is a string": dict(template=[("T", "float")]),
    "a template value beyond 32 bits": dict(template=[("N", 2**40)]),
    "a template without values": dict(template=["T"]),
    "a grid of two numbers": dict(grid=(1, 1)),
    "a grid of floats": dict(grid=(1.0, 1, 1)),
    "a threadgroup of two numbers": dict(threadgroup=(1, 1)),
    "an initial value that is no number": dict(init_value="0"),
    "an unknown keyword": dict(shared_memory=3),
}


def raised(function: Any, *args: Any, **kwargs: Any) -> tuple[type, str]:
    with pytest.raises(Exception) as caught:
        function(*args, **kwargs)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("title", BAD_CONSTRUCTORS)
def test_a_bad_constructor_raises_what_mlx_raises(title: str) -> None:
    good = dict(name="k", input_names=["x"], output_names=["out"], source=COPY)
    arguments = {**good, **BAD_CONSTRUCTORS[title]}
    kind, message = raised(simulator.metal_kernel, **arguments)
    their_kind, their_message = raised(mx.fast.metal_kernel, **arguments)
    assert kind is their_kind
    assert kind is TypeError or message == their_message


@pytest.mark.parametrize("title", BAD_CALLS)
def test_a_bad_call_raises_what_mlx_raises(title: str) -> None:
    arguments: dict[str, Any] = dict(
        inputs=[mx.zeros((8,))],
        output_shapes=[(8,)],
        output_dtypes=[mx.float32],
        grid=(8, 1, 1),
        threadgroup=(4, 1, 1),
    )
    arguments.update(BAD_CALLS[title])
    reference = mx.fast.metal_kernel(name="k", input_names=["x"], output_names=["out"], source=COPY)
    kind, message = raised(build(), **arguments)
    their_kind, their_message = raised(reference, **arguments)
    assert "No Metal back-end" not in their_message
    assert issubclass(kind, their_kind)
    assert kind is TypeError or message == their_message


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(stream=mx.cpu), "Only supports the GPU"),
        (dict(grid=(0, 1, 1)), "grid: expected three extents of at least 1"),
        (dict(grid=(-4, 1, 1)), "grid: expected three extents of at least 1"),
        (dict(threadgroup=(4, 0, 1)), "threadgroup: expected three extents of at least 1"),
        (dict(threadgroup=(2048, 1, 1)), r"Thread group size \(2048\) is greater than"),
        (dict(output_shapes=[(-1,)]), "output_shapes"),
        (dict(output_shapes=[(2**33,)]), "output_shapes: expected extents of 32 bits"),
        (dict(output_shapes=[(np.int64(2**33),)]), "output_shapes: expected extents of 32 bits"),
        (dict(output_shapes=[np.array([2**33])]), "output_shapes: expected extents of 32 bits"),
        (dict(output_dtypes=[mx.float64]), "float64 is not supported on the GPU"),
        (dict(template=[("T", mx.float64)]), "float64 is not supported on the GPU"),
    ],
)
def test_a_launch_that_a_gpu_would_refuse_is_a_launch_error(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(LaunchError, match=words) as caught:
        call(build(), [mx.zeros((8,))], **changes)
    assert isinstance(caught.value, ValueError)


def test_more_than_31_buffers_are_a_launch_error() -> None:
    names = [f"a{i}" for i in range(31)]
    kernel = simulator.metal_kernel(
        name="k",
        input_names=names,
        output_names=["out"],
        source="out[0] = thread_position_in_grid.x;",
    )
    with pytest.raises(LaunchError, match="binds 32 buffers, and Metal has 31"):
        call(kernel, [1.0] * 31)


def test_a_source_that_does_not_compile_names_the_line_of_the_user_s_text() -> None:
    kernel = build("uint i = thread_position_in_grid.x;\nout[i] = no_such_name;")
    with pytest.raises(CompileError, match="no_such_name") as caught:
        call(kernel, [mx.zeros((8,))])
    text = kernel.generated_source([mx.zeros((8,))], [mx.float32]).text
    assert caught.value.line is not None
    assert "no_such_name" in text.split("\n")[caught.value.line - 1]
    assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize(
    "source",
    [
        "out[0] = thread_index;",
        "out[0] = 1; int x = ;",
        "double d = 1.0; out[0] = float(d);",
        "device float* p = &thread_position_in_grid;",
        "a_missing_brace {",
    ],
)
def test_source_with_an_error_is_a_compile_error_with_a_line(source: str) -> None:
    with pytest.raises(CompileError) as caught:
        call(build(source), [mx.zeros((8,))])
    assert caught.value.line is not None


def test_a_missing_attribute_with_two_outputs_is_a_compile_error() -> None:
    kernel = build("out[0] = x_shape[0];", outputs=2)
    with pytest.raises(CompileError):
        call(
            kernel,
            [mx.zeros((8,))],
            output_shapes=[(1,), (1,)],
            output_dtypes=[mx.float32] * 2,
        )


def test_install_runs_code_that_calls_mlx_itself() -> None:
    def softplus(x: mx.array) -> mx.array:
        assert mx.metal.is_available() and mx.default_device() == mx.gpu
        assert mx.is_available(mx.gpu)
        kernel = mx.fast.metal_kernel(
            name="softplus",
            input_names=["x"],
            output_names=["out"],
            source="uint i = thread_position_in_grid.x; out[i] = metal::log(1 + metal::exp(x[i]));",
        )
        return kernel(
            inputs=[x],
            grid=(x.size, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
            stream=mx.gpu,
        )[0]

    x = mx.linspace(-3, 3, 50)
    with simulator.install():
        compiled = mx.compile(softplus)
        out = compiled(x)
    assert np.allclose(np.array(out), np.log1p(np.exp(np.array(x, dtype=np.float64))), rtol=1e-6)


def test_install_leaves_nothing_behind_even_after_an_error() -> None:
    before = (mx.fast.metal_kernel, mx.metal.is_available, mx.default_device, mx.is_available)
    with pytest.raises(ZeroDivisionError), simulator.install():
        assert mx.fast.metal_kernel is simulator.metal_kernel
        raise ZeroDivisionError
    after = (mx.fast.metal_kernel, mx.metal.is_available, mx.default_device, mx.is_available)
    assert after == before


def test_record_collects_the_launches_of_a_block() -> None:
    kernel = build()
    with simulator.record() as outer:
        call(kernel, [mx.zeros((8,))])
        with simulator.record() as inner:
            call(kernel, [mx.zeros((8,))])
    call(kernel, [mx.zeros((8,))])
    assert (len(outer), len(inner)) == (2, 1)
    assert inner[0].kernel == "custom_kernel_k_float_float"
    assert inner[0].grid == (8, 1, 1) and inner[0].threadgroup == (4, 1, 1)
    assert inner[0].findings is None and inner[0].counters is None


def test_install_may_be_nested() -> None:
    with simulator.install():
        with simulator.install():
            assert mx.fast.metal_kernel is simulator.metal_kernel
        assert mx.fast.metal_kernel is simulator.metal_kernel and mx.metal.is_available()
    assert mx.fast.metal_kernel is not simulator.metal_kernel


def test_install_stands_in_for_devices_and_streams_of_the_gpu() -> None:
    kernel_source = "out[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];"
    with simulator.install():
        before = mx.default_device()
        mx.set_default_device(mx.cpu)
        assert mx.default_device() == mx.cpu
        mx.set_default_device(before)
        assert mx.default_device() == mx.gpu
        stream = mx.new_stream(mx.default_device())
        with mx.stream(mx.gpu):
            x = mx.ones((8,)) + 1
        kernel = mx.fast.metal_kernel(
            name="k", input_names=["x"], output_names=["out"], source=kernel_source
        )
        assert call(kernel, [x], stream=stream)[0].tolist() == [4.0] * 8
        with pytest.raises(LaunchError, match="Only supports the GPU"):
            call(kernel, [x], stream=mx.cpu)
    assert mx.default_device() == mx.cpu
