"""Matrix products that need not wait for one another are given to the runtime together."""

from __future__ import annotations

import re

import mlx.core as mx
import numpy as np
import pytest

from metalgen.simulator import Output, record, run_metal
from metalgen.simulator.compiler.own_memory import without_own
from metalgen.simulator.compiler.products import gather_products


def product(result: str, c: str, debug: int = 1) -> str:
    operands = ", ".join(f"float {name}" for name in ("%a", "%a", "%a", "%a", c, c))
    return (
        f"  %{result} = call preserve_nonecc i64 @mg_multiply_accumulate({operands}), !dbg !{debug}"
    )


def gathered(*lines: str) -> list[str]:
    body = "\n".join(lines)
    code = gather_products(f"define void @f(float %a) {{\nstart:\n{body}\n  ret void\n}}\n")
    return re.findall(r"batch\(i32 (\d)\)", code)


def test_products_that_do_not_depend_on_one_another_go_together() -> None:
    assert gathered(*(product(f"r{n}", "%a") for n in range(10))) == ["8", "2"]


def test_a_product_waits_for_its_operand() -> None:
    chain = ["  %c = bitcast i64 %r0 to <2 x float>", "  %d = extractelement <2 x float> %c, i64 0"]
    assert gathered(product("r0", "%a"), *chain, product("r1", "%d"), product("r2", "%a")) == [
        "2",
        "1",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "  store float %a, ptr %p, align 4",
        "  call preserve_nonecc void @mg_simdgroup_barrier(i32 0)",
        "  %x = load atomic i32, ptr %p monotonic, align 4",
        "  br label %next\nnext:",
    ],
)
def test_a_store_or_a_wait_between_products_keeps_them_apart(line: str) -> None:
    assert gathered(product("r0", "%a"), line, product("r1", "%a")) == ["1", "1"]


def test_products_of_different_lines_stay_apart_so_that_findings_name_theirs() -> None:
    assert gathered(product("r0", "%a", 1), product("r1", "%a", 2)) == ["1", "1"]


def test_checks_of_a_thread_s_own_variables_go_and_others_stay() -> None:
    code = """define void @f(ptr %q) {
  %v = alloca [4 x float], align 4
  %w = getelementptr inbounds nuw i8, ptr %v, i64 8
  %x = getelementptr inbounds i8, ptr %v, i64 %i
  %1 = call ptr @mg_read_any(ptr nonnull align 4 dereferenceable(4) %w, i32 262148), !dbg !1
  %2 = call ptr @mg_write_any(ptr %x, i32 262148)
  %3 = call ptr @mg_read_any(ptr %q, i32 262148)
  %4 = call ptr @mg_read_range(ptr %v, i64 16, i32 4)
}
"""
    left = re.findall(r"@mg_\w+\(ptr (%\w+)", without_own(code))
    assert left == ["%x", "%q"]


SOURCE = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
kernel void k(const device float* a [[buffer(0)]], const device float* b [[buffer(1)]],
              device float* c [[buffer(2)]]) {
  simdgroup_float8x8 x[2], y[3], z[2][3];
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j) z[i][j] = simdgroup_float8x8(0);
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < 2; ++i) simdgroup_load(x[i], a + 8 * i * 32 + 8 * k, 32);
    for (int j = 0; j < 3; ++j) simdgroup_load(y[j], b + 8 * k * 24 + 8 * j, 24);
    for (int i = 0; i < 2; ++i)
      for (int j = 0; j < 3; ++j) simdgroup_multiply_accumulate(z[i][j], x[i], y[j], z[i][j]);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 3; ++j) simdgroup_store(z[i][j], c + 8 * i * 24 + 8 * j, 24);
}
"""


@pytest.mark.parametrize("checked", [False, True])
def test_values_and_counts_are_those_of_single_products(checked: bool) -> None:
    random = np.random.default_rng(1)
    a = random.integers(-4, 5, (16, 32)).astype(np.float32)
    b = random.integers(-4, 5, (32, 24)).astype(np.float32)
    with record(checked=checked) as runs:
        outputs = run_metal(
            SOURCE,
            "k",
            {0: mx.array(a), 1: mx.array(b), 2: Output((16, 24), mx.float32)},
            (32, 1, 1),
            (32, 1, 1),
        )
    np.testing.assert_array_equal(np.array(outputs[2]), a @ b)
    if checked:
        assert not runs[0].findings
        assert runs[0].counters.multiply_accumulates == 24
