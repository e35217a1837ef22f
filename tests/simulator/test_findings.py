"""Each kind of defect, in a kernel of a few lines: found, placed, counted; and nothing else."""

from __future__ import annotations

import io
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from rich.console import Console

from metalgen import simulator
from metalgen.simulator import CheckFailed, Counters, Finding, Findings
from metalgen.simulator.findings import excerpt
from metalgen.simulator.harness import Constant, InOut, Output, run_metal


def check(source: str, *, size: int = 64, seed: int = 0, **changes: Any) -> simulator.Launch:
    """Run one checked threadgroup of 64 threads unless ``changes`` say otherwise."""
    options = {key: changes.pop(key) for key in ("header", "atomic_outputs") if key in changes}
    kernel = simulator.metal_kernel(
        name="k", input_names=["x"], output_names=["out"], source=source, **options
    )
    arguments: dict[str, Any] = dict(
        inputs=[mx.arange(size, dtype=mx.float32)],
        output_shapes=[(size,)],
        output_dtypes=[mx.float32],
        grid=(64, 1, 1),
        threadgroup=(64, 1, 1),
    )
    with simulator.record(checked=True, seed=seed) as runs:
        kernel(**{**arguments, **changes})
    return runs[0]


def only(launch: simulator.Launch, kind: str) -> Finding:
    """Return the launch's one finding, which must be of this kind."""
    assert launch.findings is not None
    assert [each.kind for each in launch.findings] == [kind], launch.findings.report()
    finding: Finding = launch.findings[0]
    return finding


def line(launch: simulator.Launch, number: int | None) -> str:
    assert number is not None
    return launch.source.split("\n")[number - 1].strip()


HEAD = "uint t = thread_position_in_threadgroup.x;\nuint i = thread_position_in_grid.x;\n"
FENCE = "threadgroup_barrier(mem_flags::mem_threadgroup);\n"


def test_a_clean_kernel_has_no_findings() -> None:
    launch = check(
        HEAD + "threadgroup float tile[64];\ntile[t] = x[i];\n" + FENCE + "out[i] = tile[63 - t];"
    )
    assert launch.findings is not None and len(launch.findings) == 0
    assert launch.findings.report() == "no findings"
    assert launch.findings.kinds() == {}


def test_a_race_in_threadgroup_memory_names_both_accesses() -> None:
    launch = check(
        HEAD
        + "threadgroup float tile[64];\ntile[t] = 0;\n"
        + FENCE
        + "float y = tile[(t + 32) % 64];\ntile[t] = x[i] + y;\nout[i] = y;"
    )
    finding = only(launch, "race")
    assert finding.memory == "threadgroup tile"
    assert finding.access is not None and finding.other is not None
    pair = {finding.access.kind: finding.access, finding.other.kind: finding.other}
    assert line(launch, pair["read"].line) == "float y = tile[(t + 32) % 64];"
    assert line(launch, pair["write"].line) == "tile[t] = x[i] + y;"
    assert pair["read"].thread != pair["write"].thread
    assert finding.kernel == "custom_kernel_k_float_float"
    assert finding.count >= 1


@pytest.mark.parametrize("flag", ["mem_none", "mem_device"])
def test_a_barrier_with_the_wrong_flag_does_not_order_threadgroup_memory(flag: str) -> None:
    launch = check(
        HEAD
        + "threadgroup float tile[64];\ntile[t] = x[i];\n"
        + FENCE.replace("mem_threadgroup", flag, 1)
        + "out[i] = tile[63 - t];"
    )
    assert launch.findings is not None and "race" in launch.findings.kinds()
    race = next(f for f in launch.findings if f.kind == "race")
    assert "and no barrier with mem_threadgroup orders it after a " in race.message


def test_a_barrier_with_the_wrong_flag_does_not_order_device_memory() -> None:
    source = HEAD + "out[t] = x[i];\nBARRIER\nout[t + 64] = out[63 - t];"
    changes: dict[str, Any] = dict(output_shapes=[(128,)])
    wrong = check(source.replace("BARRIER", FENCE), **changes)
    finding = only(wrong, "race")
    assert finding.memory == "out"
    assert "and no barrier with mem_device orders it after a " in finding.message
    right = check(
        source.replace("BARRIER", FENCE.replace("mem_threadgroup", "mem_device")), **changes
    )
    assert right.findings is not None and not len(right.findings)


def test_a_simdgroup_barrier_does_not_order_other_simdgroups() -> None:
    source = HEAD + (
        "threadgroup float tile[64];\ntile[t] = x[i];\n"
        "simdgroup_barrier(mem_flags::mem_threadgroup);\nout[i] = tile[t ^ MASK];"
    )
    near = check(source.replace("MASK", "1"))
    assert near.findings is not None and not len(near.findings)
    far = check(source.replace("MASK", "32"))
    assert far.findings is not None and "race" in far.findings.kinds()


def test_threadgroups_race_whatever_the_barriers() -> None:
    launch = check(
        HEAD + "out[t] = x[i];\nthreadgroup_barrier(mem_flags::mem_device);",
        size=128,
        grid=(128, 1, 1),
        output_shapes=[(64,)],
    )
    finding = only(launch, "race between threadgroups")
    assert finding.access is not None and finding.other is not None
    assert {finding.access.threadgroup, finding.other.threadgroup} == {(0, 0, 0), (1, 0, 0)}


def test_an_atomic_against_a_plain_access_is_a_race() -> None:
    launch = check(
        HEAD
        + "atomic_fetch_add_explicit(&out[0], 1, memory_order_relaxed);\n"
        + "if (t == 40) ((device int*)out)[0] = 7;",
        atomic_outputs=True,
        output_shapes=[(1,)],
        output_dtypes=[mx.int32],
        init_value=0,
    )
    finding = only(launch, "atomic and plain access")
    assert finding.memory == "out"


def test_atomics_alone_are_no_race() -> None:
    launch = check(
        HEAD + "atomic_fetch_add_explicit(&out[t % 4], 1, memory_order_relaxed);",
        atomic_outputs=True,
        output_shapes=[(4,)],
        output_dtypes=[mx.int32],
        init_value=0,
    )
    assert launch.findings is not None and not len(launch.findings)


def test_a_read_past_the_end_names_the_buffer_and_the_distance() -> None:
    launch = check(HEAD + "out[i] = x[i + 3];")
    finding = only(launch, "out of bounds")
    assert finding.memory == "x" and finding.count == 3
    assert finding.offset == 4 * 64
    assert "ends 4 bytes past the end of x, which has 256 bytes" in finding.message
    assert finding.access is not None and finding.access.thread == (61, 0, 0)
    assert line(launch, finding.line) == "out[i] = x[i + 3];"


def test_a_write_before_the_start_names_the_buffer_and_the_distance() -> None:
    launch = check(HEAD + "out[int(i) - 2] = x[i];")
    finding = only(launch, "out of bounds")
    assert finding.memory == "out" and finding.count == 2
    assert "starts 8 bytes before out" in finding.message


def test_a_threadgroup_array_has_bounds_too() -> None:
    launch = check(
        HEAD + "threadgroup float tile[48];\ntile[t] = x[i];\n" + FENCE + "out[i] = tile[t / 2];"
    )
    assert launch.findings is not None
    finding = next(f for f in launch.findings if f.kind == "out of bounds")
    assert finding.memory == "threadgroup tile" and finding.offset == 4 * 48


def test_a_read_of_threadgroup_memory_that_nothing_wrote() -> None:
    launch = check(
        HEAD
        + "threadgroup float tile[64];\nif (t < 32) tile[t] = x[i];\n"
        + FENCE
        + "out[i] = tile[t];"
    )
    finding = only(launch, "uninitialised read")
    assert finding.memory == "threadgroup tile" and finding.count == 32
    assert finding.offset == 4 * 32


def test_a_read_of_an_output_that_nothing_wrote() -> None:
    source = HEAD + "out[i] = out[i] + x[i];"
    finding = only(check(source), "uninitialised read")
    assert finding.memory == "out" and finding.count == 64
    launch = check(source, init_value=0.0)
    assert launch.findings is not None and not len(launch.findings)


def test_a_barrier_in_divergent_flow() -> None:
    launch = check(HEAD + "if (t < 40) {\n" + FENCE + "}\nout[i] = x[i];")
    assert launch.findings is not None
    assert launch.findings.kinds() == {"divergent barrier": 1}
    assert "40 threads" in launch.findings[0].message


def test_a_shuffle_from_an_inactive_lane() -> None:
    launch = check(HEAD + "float y = x[i];\nif (t % 32 < 16) y = simd_shuffle(y, 20);\nout[i] = y;")
    assert launch.findings is not None
    assert "inactive lane" in launch.findings.kinds()
    finding = next(f for f in launch.findings if f.kind == "inactive lane")
    assert "lane 20" in finding.message


def test_a_matrix_operation_in_divergent_flow() -> None:
    launch = check(
        "uint lane = thread_index_in_simdgroup;\nsimdgroup_float8x8 a(1.0f), b(1.0f), c(0.0f);\n"
        "if (lane < 31) simdgroup_multiply(c, a, b);\n"
        "out[thread_position_in_grid.x] = c.thread_elements()[0];",
        header="#include <metal_simdgroup_matrix>\n",
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    assert launch.findings is not None and "divergent collective" in launch.findings.kinds()


def test_a_misaligned_vector_access() -> None:
    launch = check(
        HEAD
        + "const device float4* p = (const device float4*)(x + t % 2);\nif (t < 8) out[i] = p[0].x;"
    )
    finding = only(launch, "misaligned access")
    assert finding.memory == "x" and finding.count == 4


@pytest.mark.parametrize(
    "expression, words",
    [
        ("int(x[63]) * 0x7fffffff", "overflow"),
        ("1 << (int(x[i]) + 32)", "shift"),
        ("5 / (int(x[i]) - int(x[i]))", "division"),
    ],
)
def test_undefined_integer_behaviour(expression: str, words: str) -> None:
    launch = check(HEAD + f"int y = {expression};\nout[i] = y;")
    finding = only(launch, "undefined integer behaviour")
    assert words in finding.message
    assert line(launch, finding.line).startswith("int y")


def test_wrapping_unsigned_arithmetic_is_no_finding() -> None:
    launch = check(HEAD + "uint y = uint(x[i]) * 0xffffffffu;\nout[i] = y;")
    assert launch.findings is not None and not len(launch.findings)


def test_too_much_threadgroup_memory_is_found_when_checked_and_refused_when_not() -> None:
    source = HEAD + "threadgroup float tile[8200];\ntile[t] = x[i];\nout[i] = tile[t];"
    finding = only(check(source), "too much threadgroup memory")
    assert str(finding) == (
        f"{finding.kernel}: too much threadgroup memory: 32800 bytes of threadgroup memory, and a "
        "threadgroup has 32768"
    )
    kernel = simulator.metal_kernel(
        name="k", input_names=["x"], output_names=["out"], source=source
    )
    with pytest.raises(RuntimeError, match="32,800 bytes of threadgroup memory"):
        kernel(
            inputs=[mx.zeros((64,))],
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
            grid=(64, 1, 1),
            threadgroup=(64, 1, 1),
        )


@pytest.mark.parametrize("seed", range(1, 6))
def test_a_race_is_found_on_every_schedule(seed: int) -> None:
    source = HEAD + "threadgroup float tile[64];\ntile[t] = x[i];\nout[i] = tile[t ^ 32];"
    launch = check(source, seed=seed)
    assert launch.findings is not None and "race" in launch.findings.kinds()


def test_one_place_is_one_finding_over_several_threadgroups() -> None:
    launch = check(HEAD + "out[i] = x[i + 256];", size=256, grid=(256, 1, 1))
    finding = only(launch, "out of bounds")
    assert finding.count == 256


def test_findings_can_raise() -> None:
    kernel = simulator.metal_kernel(
        name="k",
        input_names=["x"],
        output_names=["out"],
        source="out[thread_position_in_grid.x + 1] = 0;",
    )
    with (
        simulator.record(checked=True, raise_on_findings=True),
        pytest.raises(CheckFailed, match="out of bounds") as caught,
    ):
        kernel(
            inputs=[mx.zeros((4,))],
            output_shapes=[(4,)],
            output_dtypes=[mx.float32],
            grid=(4, 1, 1),
            threadgroup=(4, 1, 1),
        )
    assert [f.kind for f in caught.value.findings] == ["out of bounds"]


def test_a_view_with_negative_strides_has_its_own_bounds() -> None:
    source = "out[thread_position_in_grid.x] = x[-int(thread_position_in_grid.x) - EXTRA];"
    array = mx.arange(64, dtype=mx.float32)[::-1]
    for extra, findings in ((0, 0), (1, 1)):
        kernel = simulator.metal_kernel(
            name="k",
            input_names=["x"],
            output_names=["out"],
            source=source.replace("EXTRA", str(extra)),
            ensure_row_contiguous=False,
        )
        with simulator.record(checked=True) as runs:
            (out,) = kernel(
                inputs=[array],
                output_shapes=[(64,)],
                output_dtypes=[mx.float32],
                grid=(64, 1, 1),
                threadgroup=(64, 1, 1),
            )
        assert runs[0].findings is not None and len(runs[0].findings) == findings
        if not extra:
            assert out.tolist() == list(range(63, -1, -1))


# Reports.


def test_a_report_shows_the_source_around_each_line() -> None:
    launch = check(HEAD + "out[i] = x[i + 3];")
    assert launch.findings is not None
    report = launch.findings.report()
    assert "out of bounds" in report and "(3 times)" in report
    assert "> " in report and "| out[i] = x[i + 3];" in report
    assert "read at line" in report and "thread (61, 0, 0) of threadgroup (0, 0, 0)" in report


def test_an_excerpt_marks_its_line_and_stops_at_the_ends() -> None:
    assert excerpt("a\nb\nc", 1, 1) == "  > 1 | a\n    2 | b"
    assert excerpt("a\nb\nc", 3, 1) == "    2 | b\n  > 3 | c"


def test_findings_are_a_sequence_and_plain_data() -> None:
    launch = check(HEAD + "out[i] = x[i + 3];")
    assert launch.findings is not None
    finding = launch.findings[0]
    assert list(launch.findings) == [finding]
    data = finding.as_dict()
    assert data["kind"] == "out of bounds" and data["access"]["thread"] == (61, 0, 0)
    assert Findings((finding, finding)).kinds() == {"out of bounds": 2}


# Counters.


def test_counters_equal_a_count_by_hand() -> None:
    source = HEAD + (
        "threadgroup half tile[64];\n"
        "tile[t] = half(x[i]);\n" + FENCE + "float y = exp2(float(tile[63 - t]) - 64.0f);\n"
        "y = simd_sum(y);\ny += simd_shuffle_xor(y, 1);\nout[i] = y;"
    )
    counters = check(source, size=128, grid=(128, 1, 1), output_shapes=[(128,)]).counters
    assert counters is not None
    x, out = counters.buffer("x"), counters.buffer("out")
    assert (x.bytes_read, x.distinct_read, x.reads, x.bytes_written) == (512, 512, 128, 0)
    assert (out.bytes_written, out.distinct_written, out.bytes_read) == (512, 512, 0)
    assert (counters.device_read, counters.device_written) == (512, 512)
    assert (counters.threadgroup_read, counters.threadgroup_written) == (256, 256)
    assert counters.threadgroup_memory == 128
    assert counters.exponentials == 128
    assert counters.threadgroup_barriers == 2 and counters.barriers == 4
    assert counters.shuffles == 4 and counters.reductions == 4 and counters.collectives == 8


def test_distinct_bytes_are_counted_once() -> None:
    counters = check(HEAD + "out[i] = x[i / 4] + x[i / 8];").counters
    assert counters is not None
    assert counters.buffer("x").bytes_read == 512
    assert counters.buffer("x").distinct_read == 4 * 16


def test_matrix_products_are_counted() -> None:
    launch = check(
        "simdgroup_float8x8 a(1.0f), b(1.0f), c(0.0f);\n"
        "for (int n = 0; n < 5; n++) simdgroup_multiply_accumulate(c, a, b, c);\n"
        "out[thread_position_in_grid.x] = c.thread_elements()[0];",
        header="#include <metal_simdgroup_matrix>\n",
    )
    assert launch.counters is not None
    assert launch.counters.multiply_accumulates == 2 * 5


@pytest.mark.parametrize("stride, lines", [(1, 1), (2, 2), (32, 32), (0, 1)])
def test_cache_lines_of_a_simdgroup_access_are_counted(stride: int, lines: int) -> None:
    launch = check(
        HEAD + f"out[i] = x[i * {stride}];",
        inputs=[mx.zeros((64 * 32,))],
    )
    assert launch.counters is not None
    x, out = launch.counters.buffer("x"), launch.counters.buffer("out")
    assert (x.simdgroup_accesses, x.lines) == (2, 2 * lines)
    assert x.lines_per_access == lines
    assert (out.simdgroup_accesses, out.lines) == (2, 2)
    assert launch.counters.patterns_dropped == 0


@pytest.mark.parametrize("stride, passes", [(1, 1), (2, 2), (32, 32), (33, 1), (0, 1)])
def test_bank_conflicts_are_extra_passes(stride: int, passes: int) -> None:
    launch = check(
        HEAD
        + "threadgroup float tile[1088];\nfor (uint n = t; n < 1088; n += 32) tile[n] = x[t];\n"
        + FENCE
        + f"out[i] = tile[t * {stride}];",
        grid=(32, 1, 1),
        threadgroup=(32, 1, 1),
    )
    assert launch.counters is not None
    assert launch.counters.threadgroup_accesses == 34 + 1
    assert launch.counters.bank_conflicts == passes - 1


def test_an_unknown_buffer_is_named() -> None:
    with pytest.raises(KeyError, match="no buffer 'y'"):
        Counters().buffer("y")


def test_counters_print_as_tables() -> None:
    launch = check(HEAD + "out[i] = x[i];")
    assert launch.counters is not None
    stream = io.StringIO()
    Console(file=stream, width=120).print(launch.counters)
    text = stream.getvalue()
    assert "Traffic by buffer" in text and "out" in text and "256" in text
    assert launch.counters.as_dict()["buffers"][0]["bytes_read"] == 256


# The harness.


def test_the_harness_runs_a_kernel_by_name_with_every_kind_of_buffer() -> None:
    source = """
    #include <metal_stdlib>
    using namespace metal;
    constant int factor [[function_constant(3)]];
    struct Params { int shift; float add; };
    template <typename T>
    [[kernel]] void scale(const device T* x [[buffer(0)]], device T* y [[buffer(1)]],
                          constant Params& p [[buffer(2)]], device int* total [[buffer(4)]],
                          uint i [[thread_position_in_grid]]) {
      y[i] = x[i + p.shift] * factor + p.add;
      atomic_fetch_add_explicit((device atomic_int*)total, 1, memory_order_relaxed);
    }
    template [[host_name("scale_half")]] [[kernel]] decltype(scale<half>) scale<half>;
    """
    outputs = run_metal(
        source,
        "scale_half",
        {
            0: mx.arange(8, dtype=mx.float16),
            1: Output((2, 2), mx.float16),
            2: Constant("if", 3, 0.5),
            4: InOut(mx.array([10], dtype=mx.int32)),
        },
        grid=(4, 1, 1),
        threadgroup=(4, 1, 1),
        constants={3: 2},
    )
    assert outputs[1].tolist() == [[6.5, 8.5], [10.5, 12.5]]
    assert outputs[4].tolist() == [14]


def test_extents_of_the_harness_may_be_numbers_of_numpy() -> None:
    source = """
    [[kernel]] void count(device int* y [[buffer(0)]], uint i [[thread_position_in_grid]],
                          uint n [[threads_per_threadgroup]]) { y[i] = int(i * n); }
    """
    shape: Any = np.array([2, 3])
    sizes: Any = np.array([6, 1, 1]), [np.int64(2), 1, 1]
    (out,) = run_metal(source, "count", {0: Output(shape, mx.int32)}, *sizes).values()
    assert out.tolist() == [[0, 2, 4], [6, 8, 10]]


@pytest.mark.parametrize("grid", [8, (8,), (8, 1), (8.0, 1, 1), (8, 0, 1), "811"])
def test_a_grid_that_is_none_is_refused_by_the_harness(grid: Any) -> None:
    source = "[[kernel]] void nothing(device int* y [[buffer(0)]]) { y[0] = 1; }"
    with pytest.raises(simulator.LaunchError, match="^grid: expected three extents of at least 1"):
        run_metal(source, "nothing", {0: Output((1,), mx.int32)}, grid, (1, 1, 1))


@pytest.mark.parametrize("shape", [8, (-1,), (2.0,), "8"])
def test_the_shape_of_an_output_that_is_none_is_refused(shape: Any) -> None:
    with pytest.raises(simulator.LaunchError, match=r"^Output\.shape: expected extents of at lea"):
        Output(shape, mx.int32)


def test_the_harness_names_a_buffer_of_the_wrong_kind() -> None:
    with pytest.raises(simulator.LaunchError, match=r"buffers\[0\]: expected an array"):
        run_metal("", "k", {0: 3.5}, (1, 1, 1), (1, 1, 1))  # type: ignore[dict-item]
