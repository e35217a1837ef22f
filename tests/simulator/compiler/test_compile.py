"""compile_metal: what it makes, what it refuses and where, and its cache."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
from pathlib import Path

import pytest

from metalgen.simulator.compiler import (
    SOURCE_NAME,
    CompiledKernel,
    bitcasts,
    build,
    cache,
    compile_metal,
    front,
    toolchain,
)
from metalgen.simulator.compiler.instrument import instrument, size_of
from metalgen.simulator.errors import CompileError, MissingToolchain

HEAD = "#include <metal_stdlib>\nusing namespace metal;\n"
ADD = (
    HEAD
    + """
template <typename T>
[[kernel]] void add(const device T* a [[buffer(0)]], constant int& n [[buffer(1)]],
                    device T* out [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  threadgroup T shared[40];
  threadgroup int count;
  shared[i % 32] = a[i];
  count = n;
  out[i] = shared[i % 32] + T(count);
}
template [[host_name("add_float")]] [[kernel]] decltype(add<float>) add<float>;
"""
)


def kernel(body: str, parameters: str = "device float* out [[buffer(0)]]") -> str:
    """A source whose body starts on line 4."""
    return f"{HEAD}[[kernel]] void k({parameters}, uint i [[thread_position_in_grid]]) {{\n{body}\n}}\n"


def error(source: str, name: str = "k") -> CompileError:
    with pytest.raises(CompileError) as caught:
        compile_metal(source, name)
    return caught.value


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with the machine's runtime and headers, and no kernel."""
    machine = toolchain.machine_flags()
    made = [build.headers("plain", machine), build.runtime("plain", machine)]
    made += [path.with_suffix(".json") for path in made]
    monkeypatch.setenv("METALGEN_CACHE", str(tmp_path))
    (tmp_path / "simulator").mkdir()
    for path in made:
        (tmp_path / "simulator" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "simulator"


def test_a_compiled_kernel_knows_its_buffers_and_threadgroup_memory() -> None:
    made = compile_metal(ADD, "add_float")
    assert [
        (b.index, b.name, b.space, b.writable, b.type, b.is_reference) for b in made.buffers
    ] == [
        (0, "a", "device", False, "T", False),
        (1, "n", "constant", False, "int", True),
        (2, "out", "device", True, "T", False),
    ]
    assert made.threadgroup_variables == (("shared", 160), ("count", 4))
    assert made.threadgroup_bytes == 176


def test_a_kernel_is_named_by_host_name_or_by_instantiation() -> None:
    assert compile_metal(ADD, "add<half>").threadgroup_variables[0] == ("shared", 80)
    assert "is a template: name an instantiation" in str(error(ADD, "add"))
    assert "has no kernel 'sub'; it has add, add_float" in str(error(ADD, "sub"))
    assert "no [[kernel]] function at all" in str(error(HEAD, "sub"))


@pytest.mark.parametrize(
    ("body", "line", "message"),
    [
        ("int x = 1;\nout[i] = y;", 5, "use of undeclared identifier 'y'"),
        ("out[i] = 1\n", 4, "expected ';'"),
        ("threadgroup float s[4];\ndevice float* p = s;", 5, "cannot initialize"),
        ("double x = 1;", 4, "double"),
        ("float4 v = float4(1, 2, 3);", 4, "fill it exactly"),
        ("int4 v = float4(1.0f);", 4, "cannot initialize"),
        ("float4 v = float4(1.0f) + float3(1.0f);", 4, "vector"),
        ("int4 v = int4(float3(1.0f));", 4, "equal element counts"),
    ],
)
def test_an_error_names_the_line_of_the_source(body: str, line: int, message: str) -> None:
    caught = error(kernel(body))
    assert (caught.file, caught.line) == (SOURCE_NAME, line)
    assert message in str(caught)
    assert "__global" not in str(caught) and "__private" not in str(caught)


def test_a_line_directive_names_the_source() -> None:
    source = kernel('out[i] = 1;\n#line 7 "body"\nout[i] = y;')
    caught = error(source)
    assert (caught.file, caught.line) == ("body", 7)


def test_a_missing_include_is_an_error() -> None:
    caught = error('#include "absent.h"\n' + kernel("out[i] = 1;"))
    assert (caught.file, caught.line) == (SOURCE_NAME, 1)
    assert "'absent.h' file not found" in str(caught)


CAST = (
    HEAD
    + """
template <typename T, typename U> T to(U x) {
  return CAST;
}
[[kernel]] void k(device int4* out [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  out[i] = to<int4>(float4(1.5f)) + int4(to<half4>(float4(1.0f)));
}
"""
)


@pytest.mark.parametrize("cast", ["T(x)", "(T)x", "static_cast<T>(x)"])
def test_a_cast_to_a_template_parameter_converts(cast: str) -> None:
    compile_metal(CAST.replace("CAST", cast), "k")


def test_a_reinterpreted_vector_is_refused() -> None:
    """A cast that the transformation cannot see must not become a reinterpretation."""
    source = CAST.replace("CAST", "decltype(T{})(x)").replace(
        " + int4(to<half4>(float4(1.0f)))", ""
    )
    caught = error(source)
    assert caught.line == 5
    assert "as_type" in str(caught)


def test_a_bitcast_of_vectors_is_found_in_the_code() -> None:
    code = "  %3 = bitcast <4 x float> %2 to <4 x i32>, !dbg !7\n!7 = !DILocation(line: 12, column: 3, scope: !1)\n"
    found = bitcasts.find_reinterpretation(code)
    assert found is not None and found[0] == 12
    assert bitcasts.find_reinterpretation("  %3 = bitcast ptr %2 to ptr\n") is None


def test_lines_are_found_by_address() -> None:
    source = kernel("float x = out[i];\nx *= 2;\nout[i] = sqrt(x);")
    made = compile_metal(source, "k", mode="checked")
    lines = {
        found[1] for a in range(1 << 16) if (found := made.line_of(a)) and found[0] == SOURCE_NAME
    }
    assert {4, 6} <= lines <= set(range(3, 8))


def test_every_access_of_the_program_is_instrumented_once() -> None:
    code = (
        "%S = type { i32, float }\n"
        "define void @f(ptr addrspace(1) %0, ptr addrspace(3) %1) {\n"
        "  %2 = alloca ptr addrspace(1), align 8\n"
        "  store ptr addrspace(1) %0, ptr %2, align 8\n"
        "  %3 = load ptr addrspace(1), ptr %2, align 8\n"
        "  %4 = load <2 x half>, ptr addrspace(1) %3, align 4, !dbg !9\n"
        "  store <2 x half> %4, ptr addrspace(3) %1, align 4, !dbg !9\n"
        "  %5 = addrspacecast ptr addrspace(3) %1 to ptr addrspace(4)\n"
        "  call void @llvm.memcpy.p4.p0.i64(ptr addrspace(4) align 2 %5, ptr align 8 %2, i64 8, i1 false)\n"
        "  ret void\n}\n"
    )
    out = instrument(code)
    assert out.count("call ptr @mg_") == 3
    assert "call ptr @mg_read_device(ptr %3, i32 262148), !dbg !9" in out  # 4 bytes, aligned to 4
    assert "call ptr @mg_write_threadgroup(ptr %1, i32 262148), !dbg !9" in out
    assert "call ptr @mg_write_range(ptr %5, i64 8, i32 2)" in out
    assert "@llvm.memcpy.p0.p0.i64(ptr %mg.3, ptr align 8 %2, i64 8, i1 false)" in out
    assert "addrspace" not in out


@pytest.mark.parametrize(
    ("kind", "bytes_"),
    [
        ("half", 2),
        ("bfloat", 2),
        ("<4 x float>", 16),
        ("i1", 1),
        ("i64", 8),
        ("ptr addrspace(1)", 8),
        ("[3 x <2 x i16>]", 12),
        ("%S", 8),
        ("{ i32, <2 x float> }", 12),
        ("token", None),
    ],
)
def test_the_size_of_a_type_is_known(kind: str, bytes_: int | None) -> None:
    assert size_of(kind, {"%S": "{ i32, float }"}) == bytes_


# --- the cache -----------------------------------------------------------------------------------


def modified(made: CompiledKernel) -> int:
    return made.path.stat().st_mtime_ns


def test_the_same_source_is_compiled_once(own_cache: Path) -> None:
    first = compile_metal(ADD, "add_float")
    assert first.path.parent == own_cache
    assert compile_metal(ADD, "add_float") == first
    assert modified(compile_metal(ADD, "add_float")) == modified(first)


def test_what_the_result_depends_on_is_in_the_key(own_cache: Path) -> None:
    base = "constant int c [[function_constant(0)]];\n"
    source = base + kernel("out[i] = c;")
    paths = {compile_metal(source, "k", constants={0: n}).path for n in (1, 2)}
    paths.add(compile_metal(source + " ", "k", constants={0: 1}).path)
    assert len(paths) == 3


def test_a_changed_header_is_compiled_again(own_cache: Path, tmp_path: Path) -> None:
    header = tmp_path / "h.h"
    header.write_text("#define VALUE 1\n")
    source = '#include "h.h"\n' + kernel("out[i] = VALUE;")
    first = compile_metal(source, "k", include_dirs=[tmp_path])
    before = first.path.read_bytes()
    assert compile_metal(source, "k", include_dirs=[tmp_path]).path.read_bytes() == before
    header.write_text("#define VALUE 22\n")
    assert compile_metal(source, "k", include_dirs=[tmp_path]).path.read_bytes() != before


def test_a_damaged_note_is_compiled_again(own_cache: Path) -> None:
    made = compile_metal(ADD, "add_float")
    made.path.with_suffix(".json").write_text("{")
    assert compile_metal(ADD, "add_float") == made


HARM = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "bit-flipped": lambda path: path.write_bytes(
        bytes(
            b ^ (8 if i == path.stat().st_size // 3 else 0) for i, b in enumerate(path.read_bytes())
        )
    ),
    "removed": lambda path: path.unlink(),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("name", ["*.so", "[0-9a-f]*.json", "runtime-plain-*.o"])
def test_a_harmed_entry_is_made_anew(own_cache: Path, name: str, harm: str) -> None:
    made = compile_metal(ADD, "add_float")
    (path,) = own_cache.glob(name)
    whole = path.read_bytes()
    HARM[harm](path)
    if path.suffix == ".o":  # the next kernel needs it
        compile_metal(ADD, "add<float>")
    else:
        assert compile_metal(ADD, "add_float") == made
    if path.suffix == ".o":
        assert path.read_bytes() == whole
    note = cache.read_note(made.path.with_suffix(".json"))
    assert cache.is_whole(made.path, note["digest"])


def test_harmed_headers_are_a_miss(own_cache: Path) -> None:
    (path,) = own_cache.glob("headers-plain-*.pch")
    note = cache.read_note(path.with_suffix(".json"))
    assert cache.is_whole(path, note["digest"])
    HARM["bit-flipped"](path)
    assert not cache.is_whole(path, note["digest"])


def test_a_toolchain_is_tried(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(own_cache.iterdir())
    assert front.try_toolchain() == ""
    assert set(own_cache.iterdir()) == before
    monkeypatch.setattr(toolchain, "zig", lambda: own_cache / "zig")
    assert "does not start" in front.try_toolchain()


def _compile(cache: str) -> str:
    os.environ["METALGEN_CACHE"] = cache
    return str(compile_metal(ADD, "add_float").path)


def test_processes_may_compile_the_same_kernel_at_once(own_cache: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        paths = pool.map(_compile, [str(own_cache.parent)] * 3)
    assert len(set(paths)) == 1
    left = {p.name for p in own_cache.iterdir() if re.search(r"compile-|build-|\.json\.", p.name)}
    assert left == set()


def test_a_missing_toolchain_is_named(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    toolchain.zig.cache_clear()
    try:
        with pytest.raises(MissingToolchain, match="ziglang"):
            compile_metal(ADD, "add_float")
    finally:
        toolchain.zig.cache_clear()
