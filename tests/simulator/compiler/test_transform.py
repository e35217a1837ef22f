"""The source transformation, rule by rule: Metal text in, C++ for OpenCL out."""

from __future__ import annotations

import re

import numpy as np
import pytest

from metalgen.simulator.compiler.kernels import Parameter
from metalgen.simulator.compiler.tokens import Tokens
from metalgen.simulator.compiler.transform import TransformError, literal, transform


def squeeze(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def rewritten(text: str, **constants: object) -> str:
    given: dict[str | int, object] = dict(constants.items())
    return squeeze(transform(text, given).text)


@pytest.mark.parametrize(
    ("metal", "expected"),
    [
        # constructors and casts of vectors
        ("x = float4(a, b);", "x = mg::make<float4>(a, b);"),
        ("x = metal::float4(1);", "x = mg::make<metal :: float4> (1);"),
        ("return half4(f4);", "return mg::make<half4>(f4);"),
        ("x = vec<T, 4>(y);", "x = mg::make<vec < T , 4 >> (y);"),
        ("x = (int4)y;", "x = mg::caster<int4>{}->* y;"),
        ("x = (int4)-y.x;", "x = mg::caster<int4>{}->* -y.x;"),
        ("x = (float4)(1, 2, 3, 4);", "x = mg::make<float4> (1, 2, 3, 4);"),
        ("x = static_cast<half4>(y);", "x = mg::cast<half4>(y);"),
        ("x = static_cast<T>(y);", "x = mg::cast<T>(y);"),
        ("short2 v((i % n) * m, i / n);", "short2 v = mg::make<short2>((i % n) * m, i / n);"),
        ("using w = vec<int, 4>; x = w(f);", "using w = vec<int, 4>; x = mg::make<w>(f);"),
        # ... and what only looks like one
        ("float4 f(float x, int n);", "float4 f(float x, int n);"),
        ("float4 f(float4);", "float4 f(float4);"),
        ("float4 x = {1, 2, 3, 4};", "float4 x = {1, 2, 3, 4};"),
        ("n = sizeof(float4);", "n = sizeof(float4);"),
        ("x = static_cast<device float4*>(p);", "x = static_cast<device float4*>(p);"),
        ("auto p = (device float4*)q;", "auto p = (device float4*)q;"),
        ("y = v.float4(1);", "y = v.float4(1);"),
        # vectors whose elements may be bool
        ("typedef vec<T, 2> pair;", "typedef mapped_vec<T, 2> pair;"),
        ("vec<bool, 2> m;", "mapped_vec<bool, 2> m;"),
        ("template <class U> using f = vec<U, 2>;", "template <class U> using f = vec<U, 2>;"),
        # literals and casts of bfloat
        ("x = 1.5bf;", "x = ((bfloat)1.5f);"),
        ("x = 2e3bf;", "x = ((bfloat)2e3f);"),
        ("x = bfloat16_t(h);", "x = mg::cast<bfloat16_t>(h);"),
        # thread on constructors, conversion operators and references to const
        ("struct S { S(int x) thread : y(x) {} };", "struct S { S(int x) : y(x) {} };"),
        ("struct S { int f() const thread; };", "struct S { int f() const thread; };"),
        (
            "struct S { operator T() const thread noexcept; };",
            "struct S { operator T() const noexcept; };",
        ),
        ("struct S { T operator()(T a) thread; };", "struct S { T operator()(T a) thread; };"),
        ("void f(thread const T& x);", "void f( const T& x);"),
        ("void f(const thread vec<T, 2>& x);", "void f(const vec<T, 2>& x);"),
        ("void f(thread T& x, thread const T* y);", "void f(thread T& x, thread const T* y);"),
        # attributes
        ("int x [[maybe_unused]] = 3;", "int x = 3;"),
        ("int y = a[b[i]];", "int y = a[b[i]];"),
    ],
)
def test_a_spelling_is_rewritten(metal: str, expected: str) -> None:
    assert rewritten(metal) == expected


def test_a_threadgroup_array_refers_to_the_arena() -> None:
    out = rewritten("void f() { threadgroup T x[N][2], y; threadgroup float* p = z; }")
    assert "typedef T mg_type_x[ N ] [ 2 ]; __local mg_type_x& x = *(__local mg_type_x*)" in out
    assert "mg_threadgroup_variable(0, sizeof(mg_type_x), alignof(mg_type_x))" in out
    assert "mg_threadgroup_variable(1, sizeof(mg_type_y), alignof(mg_type_y))" in out
    assert "threadgroup float* p = z;" in out


def test_the_initial_value_of_a_threadgroup_array_is_dropped() -> None:
    out = rewritten("void f() { threadgroup float x[32] = {0}; }")
    assert "{0}" not in out and "mg_type_x[ 32 ];" in out


def test_function_constants_get_their_values() -> None:
    text = "constant bool a [[function_constant(3)]]; constant int n [[function_constant(4)]];"
    assert rewritten(text, a=True) == "constant bool a = true; constant int n = {};"
    by_index = squeeze(transform(text, {3: False, 4: 7}).text)
    assert by_index == "constant bool a = false; constant int n = 7;"
    defined = rewritten(text + "int x = is_function_constant_defined(n);", n=15)
    assert defined.endswith("constant int n = 15;int x = true ;")


@pytest.mark.parametrize(
    ("value", "same"),
    [
        (np.True_, True),
        (np.int16(-7), -7),
        (np.float32(0.1), 0.10000000149011612),
        (np.float64(1e30), 1e30),
        (np.array(2.0), 2.0),
    ],
)
def test_function_constants_may_be_numbers_of_numpy(value: object, same: object) -> None:
    assert literal(value) == literal(same)


KERNEL = """
template <typename T, int N>
[[kernel, max_total_threads_per_threadgroup(64)]] void add(
    const device T* a [[buffer(0)]],
    device atomic<int>* out [[buffer(2)]],
    constant int& n,
    threadgroup T* shared [[threadgroup(1)]],
    uint3 where [[thread_position_in_grid]],
    ushort lane [[thread_index_in_simdgroup]]) { }
template [[host_name("add_float")]] [[kernel]] decltype(add<float, 4>) add<float, 4>;
template [[host_name("add_half")]] [[kernel]] void add<half, 2>(const device half* a);
kernel void plain(device float* x [[buffer(5)]], device float* y) {}
"""


def test_a_kernel_is_noted_with_its_parameters() -> None:
    unit = transform(KERNEL)
    add = unit.kernels["add"]
    assert add.template and not unit.kernels["plain"].template
    assert add.parameters == (
        Parameter("a", "buffer", "const device T *", 0),
        Parameter("out", "buffer", "device atomic < int > *", 2),
        Parameter("n", "buffer", "constant int &", 3),
        Parameter("shared", "threadgroup", "threadgroup T *", 1),
        Parameter("where", "position", "uint3", attribute="thread_position_in_grid"),
        Parameter("lane", "position", "ushort", attribute="thread_index_in_simdgroup"),
    )
    assert [p.index for p in unit.kernels["plain"].parameters] == [5, 6]


def test_explicit_instantiations_are_noted_and_removed() -> None:
    unit = transform(KERNEL)
    assert unit.instantiations["add_float"].expression == "add < float , 4 >"
    assert unit.instantiations["add_half"].expression == "add < half , 2 >"
    assert "add<float, 4>" not in unit.text and "[[" not in unit.text


def test_other_instantiations_stay() -> None:
    assert rewritten("template struct S<int>;") == "template struct S<int>;"


def test_every_line_stays_in_its_place() -> None:
    text = (
        KERNEL + '\n# 12 "other.h"\nstruct S {\n  S(int x)\n  thread : y(x) {}\n};\nvoid f() {\n  '
        "threadgroup float\n    z[4],\n    w;\n float4 v = float4(\n 1,\n 2, 3, 4);\n}\n"
    )
    before, after = text.split("\n"), transform(text).text.split("\n")
    assert len(before) == len(after)
    for marker in ('# 12 "other.h"', "void f() {", " 2, 3, 4);", "}"):
        assert before.index(marker) == after.index(marker)


def test_a_parameter_without_an_attribute_is_refused() -> None:
    with pytest.raises(TransformError, match="parameter 'x' of kernel 'k' needs an attribute"):
        transform("kernel void k(uint x) {}")


def test_tokens_keep_the_text_and_know_their_brackets() -> None:
    text = 'a<b<1>, c>(x[i + 1], "s)", /* ) */ 2.5h) // )\n# 3 "f"\n>>='
    tokens = Tokens(text)
    assert tokens.text() == text
    opening = tokens.words.index("(")
    assert tokens.word(tokens.close(opening)) == ")"
    assert tokens.opening(tokens.close(opening)) == opening
    assert tokens.close_angle(1) == tokens.words.index("(") - 1
    parts = [tokens.source(a, b) for a, b in tokens.split(opening + 1, tokens.close(opening) - 1)]
    assert parts == ["x [ i + 1 ]", '"s)"', "2.5h"]
