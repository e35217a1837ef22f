"""What Apple's compiler refuses and clang takes is found in the source, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from metalgen import simulator
from metalgen.families import default_schedule
from metalgen.problem.config import AttentionConfig
from metalgen.simulator import lints
from metalgen.simulator.api import PREAMBLE, mlx_include_dir
from metalgen.simulator.lints import HELPER_VARIABLE, NARROWING, RECURSION, UNQUALIFIED
from metalgen.source.render import render

KERNEL = """
[[kernel]] void k(const device float* x [[buffer(0)]], device float* out [[buffer(1)]],
                  device bfloat16_t* b [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  BODY
}
"""


def lint(helpers: str, body: str = "") -> list[tuple[str, str]]:
    """Return (kind, source line) of each finding in helpers and the kernel's body."""
    text = helpers + KERNEL.replace("BODY", body)
    unit = f'#include "{PREAMBLE}"\n#line 1 "program.metal"\n{text}'
    found = lints.lint(unit, "k", include_dirs=[mlx_include_dir()])
    lines = text.split("\n")
    assert all(each.file == "program.metal" and each.line for each in found)
    return [(each.kind, lines[(each.line or 1) - 1].strip()) for each in found]


BAD = {
    "a pointer parameter": ("float f(float* p) { return p[0]; }", "", UNQUALIFIED),
    "a pointer to const": ("float f(const float* p) { return p[0]; }", "", UNQUALIFIED),
    "a reference parameter": ("void f(float& p) { p = 1; }", "", UNQUALIFIED),
    "a reference to const": ("float f(const float& p) { return p; }", "", UNQUALIFIED),
    "a pointer to a template's parameter": (
        "template <typename T> T f(T* p) { return p[0]; }",
        "",
        UNQUALIFIED,
    ),
    "a pointer to a structure": (
        "struct S { int a; };\nint f(S* s) { return s->a; }",
        "",
        UNQUALIFIED,
    ),
    "a pointer variable": ("", "float4* p;", UNQUALIFIED),
    "a pointer cast": ("", "out[i] = ((const float*)&x[i])[0];", UNQUALIFIED),
    "a function that calls itself": (
        "int f(int n) { return n < 2 ? 1 : f(n - 1); }",
        "",
        RECURSION,
    ),
    "two functions that call each other": (
        "int g(int n);\nint f(int n) { return g(n); }\nint g(int n) { return n ? f(n - 1) : 0; }",
        "",
        RECURSION,
    ),
    "an instantiated template that calls itself": (
        "template <typename T> T f(T n) { return n < 2 ? n : f<T>(n - 1); }",
        "out[i] = f<int>(3);",
        RECURSION,
    ),
    "a threadgroup array in a helper": (
        "void f() { threadgroup float tile[32]; tile[0] = 1; }",
        "",
        HELPER_VARIABLE,
    ),
    "a threadgroup scalar in a helper": (
        "int f(int n) { n++; threadgroup int s; s = n; return s; }",
        "",
        HELPER_VARIABLE,
    ),
    "a float assigned to a bfloat": ("", "b[i] = x[i];", NARROWING),
    "a float literal assigned to a bfloat": ("", "b[i] = 0.0f;", NARROWING),
    "a bfloat initialised by a float": ("", "bfloat y = x[i];", NARROWING),
    "a product with a float assigned to a bfloat": ("", "b[i] = b[i] * 2.0f;", NARROWING),
    "a bfloat returned from a float": ("bfloat f(float y) { return y; }", "", NARROWING),
    "a template instantiated for bfloat": (
        "template <typename T> T f(float y) { T z = y; return z; }",
        "b[i] = f<bfloat>(x[i]);",
        NARROWING,
    ),
}


@pytest.mark.parametrize("title", BAD)
def test_it_is_found_once_on_its_line(title: str) -> None:
    helpers, body, kind = BAD[title]
    found = lint(helpers, body)
    assert {each for each, _ in found} == {kind}
    assert len(found) == (2 if "each other" in title else 1)


GOOD = {
    "qualified pointers and references": (
        "float f(device float* a, const device float4* b, thread float& c, constant int& d,"
        " threadgroup half* e, float device* g) { return a[0] + b[0].x + c + d + e[0] + g[0]; }",
        "const device float4* p = (const device float4*)x; out[i] = p[0].x;",
    ),
    "products and conjunctions": (
        "",
        "float a = x[0], c = x[1]; int m = 3, n = 5; bool q = (a * c > 1) && (m & n);"
        " out[i] = a * c + (m & n) + q;",
    ),
    "auto pointers and references": ("", "auto p = x + i; auto q = &out[i]; *q = *p;"),
    "overloads that call each other": (
        "float f(float y) { return y; }\nhalf f(half y) { return half(f(float(y))); }",
        "",
    ),
    "a template that recurses at compile time": (
        "template <int N> int f() { return N + f<N - 1>(); }\ntemplate <> int f<0>() { return 0; }",
        "out[i] = f<4>();",
    ),
    "threadgroup variables in the kernel": (
        "void f(threadgroup float* t) { threadgroup float* u = t; u[0] = 1; }",
        "threadgroup float tile[32]; threadgroup int s; f(tile); s = 0; out[i] = s;",
    ),
    "explicit conversions to bfloat": (
        "",
        "b[i] = bfloat(x[i]); b[i] = static_cast<bfloat16_t>(x[i]); bfloat y = (bfloat)x[i];"
        " half h = x[i]; out[i] = y + h; b[i] = b[i] + b[i];",
    ),
}


@pytest.mark.parametrize("title", GOOD)
def test_what_metal_takes_is_left_alone(title: str) -> None:
    assert lint(*GOOD[title]) == []


HEADERS = {
    "softmax.h": ("softmax_looped", "bfloat16_t, float"),
    "sdpa_vector.h": ("sdpa_vector", "bfloat16_t, 64, 64"),
    "sort.h": ("block_sort", "bfloat16_t, bfloat16_t, false, 128, 8"),
    "steel/attn/kernels/steel_attention.h": ("attention", "bfloat16_t, 32, 32, 64, 64, 4, 1"),
}


@pytest.mark.parametrize("header", HEADERS)
def test_mlx_s_headers_which_apple_s_compiler_takes_are_clean(header: str) -> None:
    function, arguments = HEADERS[header]
    folder = Path(PREAMBLE).parent
    unit = f'#include "{PREAMBLE}"\n#include "{folder}/{header}"\n'
    unit += f'instantiate_kernel("k", {function}, {arguments})\n'
    constants: dict[int | str, object] = {
        **dict.fromkeys((20, 21, 22, 23, 24, 25, 200, 201, 300, 301, 302, 303), False),
        26: 1,
    }
    found = lints.lint(
        unit, "k", constants=constants, include_dirs=[mlx_include_dir()], everywhere=True
    )
    assert found == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_our_forward_kernel_is_clean(dtype: str) -> None:
    config = AttentionConfig(64, dtype=dtype, causal=True, return_lse=True)
    source = render(config, default_schedule(config))
    kernel = simulator.metal_kernel(
        source.name, list(source.inputs), list(source.outputs), source.source, source.header
    )
    inputs = [mx.zeros((1, 1, 9, 64), mx.uint8)] * 3 + [1.0]
    text = kernel.generated_source(inputs, [getattr(mx, dtype), mx.float32])
    unit = f'#include "{PREAMBLE}"\n#line 1 "program.metal"\n{text.text}'
    assert lints.lint(unit, text.kernel_name, include_dirs=[mlx_include_dir()]) == ()


def test_lints_are_among_the_findings_of_a_checked_launch() -> None:
    kernel = simulator.metal_kernel(
        name="narrow",
        input_names=["x"],
        output_names=["out"],
        source="uint i = thread_position_in_grid.x;\nout[i] = x[i];",
    )
    with simulator.record(checked=True) as runs:
        kernel(
            inputs=[mx.ones((9,))],
            grid=(9, 1, 1),
            threadgroup=(9, 1, 1),
            output_shapes=[(9,)],
            output_dtypes=[mx.bfloat16],
        )
    assert runs[0].findings is not None
    (finding,) = runs[0].findings
    assert finding.kind == NARROWING and finding.access is None
    assert "out[i] = x[i];" in runs[0].source.split("\n")[(finding.line or 1) - 1]
