"""Metal that Apple's compiler takes and C++ for OpenCL does not: each kind of it, and its value.

Every kernel `k` maps x = 1, 2, 3, 4 to y, under the checker, which must have nothing to say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.simulator import CompileError, LaunchError, Output, record, run_metal

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
PARAMETERS = (
    "(device const float* x [[buffer(0)]], device float* y [[buffer(1)]], "
    "uint i [[thread_position_in_grid]])"
)
X = np.arange(1.0, 5.0, dtype=np.float32)
Array = Any


@dataclass(frozen=True)
class Case:
    """`P` in the source stands for the parameters."""

    source: str
    expected: Callable[[Array], Array]
    kernel: str = "k"
    constants: dict[int | str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return HEAD + self.source.replace(" P ", f" {PARAMETERS} ")


def run(case: Case, **more: Any) -> np.ndarray:
    outputs = run_metal(
        case.text,
        case.kernel,
        {0: mx.array(X), 1: Output((4,), mx.float32)},
        (4, 1, 1),
        (4, 1, 1),
        constants=case.constants,
        **more,
    )
    return np.array(outputs[1])


TEMPLATE = (
    "template <typename T> kernel void g(device const T* x [[buffer(0)]], "
    "device T* y [[buffer(1)]], uint i [[thread_position_in_grid]]) { y[i] = x[i] + 1; }\n"
)
CASES = {
    "an instantiation by a typedef": Case(
        TEMPLATE
        + 'typedef decltype(g<float>) g_t;\ntemplate [[host_name("k")]] kernel g_t g<float>;',
        lambda x: x + 1,
    ),
    "an instantiation whose arguments are deduced": Case(
        TEMPLATE + 'template [[host_name("k")]] [[kernel]] void g(device const float* x '
        "[[buffer(0)]], device float* y [[buffer(1)]], uint i [[thread_position_in_grid]]);",
        lambda x: x + 1,
    ),
    "a kernel in a namespace": Case(
        "namespace n { inline float one(float v) { return v + 1; }\n"
        "kernel void k P { y[i] = one(x[i]); } }",
        lambda x: x + 1,
    ),
    "a host name in a namespace": Case(
        f'namespace n {{ {TEMPLATE} template [[host_name("k")]] kernel void '
        "g<float>(device const float*, device float*, uint); }",
        lambda x: x + 1,
    ),
    "a prototype of a kernel, and another function of its name's beginning": Case(
        "kernel void k P ;\ninline float kk(float v) { return v; }\n"
        "kernel void k P { y[i] = kk(x[i]); }",
        lambda x: x,
    ),
    "a function constant at an expression": Case(
        "#define BASE 300\nenum { FIRST = 20, SECOND };\n"
        "constant int f [[function_constant(BASE + SECOND + 1)]];\n"
        "constant bool g [[function_constant(BASE)]];\n"
        "kernel void k P { y[i] = x[i] * f + is_function_constant_defined(g); }",
        lambda x: 3 * x,
        constants={322: 3},
    ),
    "a buffer at an expression": Case(
        "constant constexpr int OUT = 1;\nkernel void k(device const float* x [[buffer(OUT - 1)]], "
        "device float* y [[buffer(OUT)]], uint i [[thread_position_in_grid]]) { y[i] = x[i]; }",
        lambda x: x,
    ),
    "template after a scope": Case(
        "template <typename T> struct A { template <typename U> struct B { U v; }; };\n"
        "template <typename T> inline float f(T x, thread typename A<T>::template B<float>& b) "
        "{ b.v = x; return b.v; }\nkernel void k P { A<float>::B<float> b; y[i] = f(x[i], b); }",
        lambda x: x,
    ),
    "braces for vectors": Case(
        "inline float f(uint3 e) { return e.x + e.y; }\n"
        "template <int N> inline float g() { vec<float, N> v = {7}; return v[0] + v[N - 1]; }\n"
        "struct S { float2 v[2]; };\n"
        "kernel void k P { float4 a = {0.f}; float2 s = {5}; float4 b[2] = {{1}}; S t = {{{2}}}; "
        "y[i] = x[i] + a.w + s.x + s.y + b[0].x + b[1].x + t.v[0].x + t.v[1].y + g<3>() + "
        "f({i, i, i}); }",
        lambda x: x + 5 + 1 + 2 + 7 + 2 * (x - 1),
    ),
    "a vector with a scalar of higher rank": Case(
        "kernel void k P { half4 h = half4(x[i]); h *= 2.0f; h = h + 1.0; h.xy *= 2.0f; "
        "int4 n = int4(3); n = n * 2.5f; y[i] = float(h.x) + 100 * float(h.z) + 1000 * n.x; }",
        lambda x: 2 * (2 * x + 1) + 100 * (2 * x + 1) + 6000,  # 2.5 becomes 2
    ),
    "a function as a template argument": Case(
        "inline float two(float v) { return 2 * v; }\n"
        "template <typename T> using F1 = T (*)(T);\n"
        "template <float (*F)(float)> inline float apply(float v) { return F(v) + (*F)(v); }\n"
        "template <typename T, F1<T> F> inline T once(T v) { return F(v); }\n"
        "kernel void k P { y[i] = apply<two>(x[i]) + once<float, two>(x[i]); }",
        lambda x: 6 * x,
    ),
    "member functions without an address space": Case(
        "struct S { float d[4]; thread float& operator[](int j) { return d[j]; }\n"
        "  thread float* at(int j) { return &d[j]; } S() : d{} {}\n"
        "  const thread float& get(int j) const { return d[j]; }\n"
        "  float sum() const { return get(0) + get(1); } };\n"
        "struct M { simdgroup_matrix<float, 8, 8> m;\n"
        "  float first() { m.thread_elements()[0] = 3; return m.thread_elements()[0]; }\n"
        "  float again() const { thread const auto& e = m.thread_elements(); return e[0]; } };\n"
        "kernel void k P { S s; s[0] = x[i]; *s.at(1) = 2; M m; "
        "y[i] = s.sum() + m.first() + m.again(); }",
        lambda x: x + 8,
    ),
    "packed vectors": Case(
        "kernel void k P { packed_float3 p = {1, 2, 3}; packed_char4 c = {1, 2, 3, 4};\n"
        "packed_half4 h = packed_half4(half4(2)); float3 a = float3(p); half4 z = half4(h);\n"
        "y[i] = x[i] + (p * 2.0f).z + (p + a).y + float4(c).w + z.x; }",
        lambda x: x + 6 + 4 + 4 + 2,
    ),
    "matrices of another element type": Case(
        "kernel void k P { float4x4 f = float4x4(x[i]); half4x4 h = half4x4(f); "
        "half4x4 c = (half4x4)f; y[i] = h[0][0] + c[3][3] + c[0][1]; }",
        lambda x: 2 * x,
    ),
    "a pragma with a macro": Case(
        "#define MIN(a, b) ((a) < (b) ? (a) : (b))\nkernel void k P { float s = 0;\n"
        "#pragma unroll (MIN(2, 4))\nfor (int j = 0; j < 4; ++j) s += x[i];\ny[i] = s; }",
        lambda x: 4 * x,
    ),
    "an array in constant memory as a pointer": Case(
        "constexpr constant static float T[4] = {1, 2, 3, 4};\n"
        "inline float g(constant float* t, uint j) { return t[j]; }\n"
        "kernel void k P { y[i] = x[i] * g(T, i); }",
        lambda x: x * x,
    ),
    "a thread array of pointers to device": Case(
        "kernel void k P { thread const device float* p[2]; p[0] = x; p[1] = x + 1; "
        "y[i] = p[0][i] + p[1][0]; }",
        lambda x: x + 2,
    ),
    "names of the library": Case(
        "kernel void k P { assert(i < 4); bfloat b = bfloat(x[i]); half h = half(b), g = (half)b;\n"
        "metal::nullptr_t n = nullptr; const device float* p = n; "
        "y[i] = b == HUGE_VALBF ? 0 : h + g + vec_elements<float4>::value + (p == nullptr);\n"
        'os_log_default.log("%f", y[i]); }',
        lambda x: 2 * x + 5,
    ),
    "a literal of float in a template": Case(
        "template <typename T> inline float f(T v) { return (v + 0.1) - v; }\n"
        "kernel void k P { y[i] = f(x[i]); }",
        lambda x: (x + np.float32(0.1)) - x,
    ),
    "a field with the name of a type's variable": Case(
        "typedef struct { half d; uchar q[4]; } blk;\n"
        "kernel void k P { half d = 2; float z[1]; z[0] = d * x[i]; blk b; b.d = d; "
        "y[i] = z[0] + b.d; }",
        lambda x: 2 * x + 2,
    ),
    "a product of a variable with the name of a template's parameter": Case(
        "template <typename S0, typename S1> inline float f(S0 a, S1 b) { return a + b; }\n"
        "kernel void k P { const float S0 = 2, S1 = 3; const float s = S0*x[i] + S1*x[i]; "
        "y[i] = s + f(1, 2); }",
        lambda x: 5 * x + 3,
    ),
    "textures and vertex functions elsewhere in the file": Case(
        "struct V { float4 p [[position]]; };\n"
        "inline float4 at(texture2d<float> t, sampler s) { return t.sample(s, float2(0)); }\n"
        "kernel void t(texture2d<float> a [[texture(0)]], sampler s [[sampler(0)]], "
        "device float* y [[buffer(0)]]) { y[0] = at(a, s).x; }\n"
        "vertex V vs(uint id [[vertex_id]]) { V v; v.p = float4(id); return v; }\n"
        "fragment float4 fs(V v [[stage_in]]) { return v.p; }\nkernel void k P { y[i] = x[i]; }",
        lambda x: x,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_compiles_and_has_the_value_that_metal_gives(name: str) -> None:
    with record(checked=True) as runs:
        found = run(CASES[name])
    np.testing.assert_array_equal(found, CASES[name].expected(X))
    assert not runs[0].findings, runs[0].findings.report()


def refusal(case: Case, **more: Any) -> str:
    with pytest.raises((CompileError, LaunchError)) as caught:
        run(case, **more)
    return str(caught.value).split("\n")[0]


def test_a_kernel_with_a_texture_is_refused_by_name() -> None:
    source = CASES["textures and vertex functions elsewhere in the file"].source
    assert refusal(Case(source, abs, "t")) == (
        "'t' takes a texture (parameter 'a'), which the simulator does not have"
    )
    assert refusal(Case(source, abs, "vs")) == "'vs' is a vertex function"


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ({"nope": 1}, "constants: the source has no function constant 'nope'; it has f (7), b (9)"),
        ({8: 1}, "constants: the source has no function constant 8; it has f (7), b (9)"),
        ({7: 2.5}, "constants['f']: expected int, but got 2.5"),
        ({"f": 1 << 31}, "constants['f']: expected int, but got 2147483648"),
        ({9: 2}, "constants['b']: expected a bool, but got 2"),
    ],
)
def test_a_function_constant_that_cannot_be_is_an_error(
    constants: dict[int | str, Any], message: str
) -> None:
    source = (
        "constant int f [[function_constant(7)]]; constant bool b [[function_constant(9)]];\n"
        "kernel void k P { y[i] = f + b; }"
    )
    assert refusal(Case(source, abs, constants=constants)) == message


def test_an_index_that_is_not_known_is_an_error() -> None:
    source = "constant int f [[function_constant(sizeof(int))]];\nkernel void k P { y[i] = f; }"
    assert "the index 'sizeof ( int )' is no integer expression" in refusal(Case(source, abs))


def test_the_error_that_no_attempt_solves_is_the_one_shown() -> None:
    source = (
        "template <typename T> inline T to(float4 v) { return (T)v; }\n"
        "kernel void k P { half4 h = to<half4>(float4(x[i])); h *= 2.0f; y[i] = h.x + missing; }"
    )
    caught = refusal(Case(source, abs))
    assert caught == "program.metal:4: use of undeclared identifier 'missing'"


DYNAMIC = """
kernel void k(device const float* x [[buffer(0)]], device float* y [[buffer(1)]],
              threadgroup float* s [[threadgroup(0)]], threadgroup float* r [[threadgroup(1)]],
              uint i [[thread_position_in_grid]]) {
  for (uint j = i; j < 700; j += 4) s[j] = 1;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint j = i; j < 700; j += 4) r[j] = 2;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float a = 0;
  for (int j = 0; j < 700; ++j) a += s[j];
  y[i] = a;
}
"""


@pytest.mark.parametrize("checked", [False, True])
def test_threadgroup_arguments_have_the_bytes_that_the_launch_gives(checked: bool) -> None:
    with record(checked=checked) as runs:
        found = run(Case(DYNAMIC, abs), threadgroup_memory={0: 2800, 1: 2800})
    np.testing.assert_array_equal(found, np.full(4, 700.0))
    if checked:
        assert not runs[0].findings and runs[0].counters.threadgroup_memory == 5600


def test_an_access_past_a_threadgroup_argument_names_it() -> None:
    with record(checked=True) as runs:
        run(Case(DYNAMIC, abs), threadgroup_memory={0: 2800, 1: 2784})
    (finding,) = runs[0].findings
    assert (finding.kind, finding.memory, finding.line) == ("out of bounds", "threadgroup r", 9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({0: 16}, "kernel k has 'r' at [[threadgroup(1)]], whose size the host sets"),
        ({0: 16, 1: 16, 2: 16}, "kernel k has no [[threadgroup(2)]]; it has 0, 1"),
        ({0: 20, 1: 16}, "threadgroup_memory[0]: expected a multiple of 16 bytes"),
        ({0: -16, 1: 16}, "threadgroup_memory[0]: expected bytes from 0 to 262,144, got -16"),
        ({0: 32768, 1: 16}, "32,784 bytes of threadgroup memory, and a threadgroup has 32,768"),
    ],
)
def test_threadgroup_memory_that_cannot_be_is_an_error(given: dict[int, int], message: str) -> None:
    assert message in refusal(Case(DYNAMIC, abs), threadgroup_memory=given)


def test_too_much_threadgroup_memory_is_a_finding_of_a_checked_run() -> None:
    with record(checked=True) as runs:
        run(Case(DYNAMIC, abs), threadgroup_memory={0: 32768, 1: 2800})
    assert [each.kind for each in runs[0].findings] == ["too much threadgroup memory"]
