"""`metalgen check FILE.metal`: which kernels compile, and a launch that a TOML file describes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metalgen.cli.app import run
from metalgen.simulator import LaunchError
from metalgen.simulator.launch_file import LaunchFile

SCALE = """#include <metal_stdlib>
using namespace metal;
constant bool twice [[function_constant(0)]];
kernel void scale(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                  constant uint& n [[buffer(2)]], threadgroup float* s [[threadgroup(0)]],
                  uint i [[thread_position_in_grid]]) {
  s[i] = x[i];
  if (i < n) y[i] = twice ? 2 * s[i] : s[i];
}
"""
LAUNCH = """
kernel = "scale"
grid = [10, 1, 1]
threadgroup = [10, 1, 1]
constants = { 0 = true }
threadgroup_memory = { 0 = 48 }
[buffers.0]
shape = [10]
fill = "normal"
[buffers.1]
shape = [10]
output = true
expected = "2 * b[0]"
[buffers.2]
type = "uint32"
fill = 10
"""
WRONG = """#include <metal_stdlib>
using namespace metal;
inline float f(float* p) { return p[0]; }
template <typename T> kernel void g(device T* x [[buffer(0)]]) {
  x[0] = T(undefined);
}
template [[host_name("g1")]] kernel void g<float>(device float* x);
template [[host_name("g2")]] kernel void g<half>(device half* x);
kernel void t(texture2d<float> a [[texture(0)]], device float* x [[buffer(0)]]) { x[0] = 1; }
"""


def files(folder: Path, source: str = SCALE, launch: str = LAUNCH) -> list[str]:
    (folder / "k.metal").write_text(source)
    (folder / "k.toml").write_text(launch)
    return [str(folder / "k.metal"), "--launch", str(folder / "k.toml")]


def test_every_kernel_is_compiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["check", files(tmp_path)[0]]) == 0
    assert "(1 kernel compiled, 0 findings)" in capsys.readouterr().out


def test_what_does_not_compile_is_named_with_the_line_of_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = files(tmp_path, WRONG)[0]
    assert run(["check", path]) == 2
    out, err = capsys.readouterr()
    assert "(0 kernels compiled, 1 not executed here, 2 wrong" in out
    assert f"g1, g2: {path}:5: use of undeclared identifier 'undefined'" in err
    assert "not executed: 't' takes a texture" in err


def test_what_apple_s_compiler_refuses_is_a_finding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = WRONG.replace("undefined", "f((thread float*)0)")
    assert run(["check", "--json", files(tmp_path, source)[0]]) == 1
    (subject,) = json.loads(capsys.readouterr().out)["subjects"]
    assert [(each["kind"], each["line"]) for each in subject["lints"]] == [
        ("pointer without an address space", 3)
    ]


def test_a_launch_is_run_and_its_values_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", *files(tmp_path)]) == 0
    assert "clean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("2 * b[0]", "3 * b[0]", "buffer 1: 10 of 10 elements are wrong; the first, at 0, is"),
        ("fill = 10", "fill = 9", "buffer 1 (y): 4 of its 40 bytes were never written"),
        ("fill = 10", "fill = 0", "nothing was written to y, an output of 40 bytes"),
        ("0 = 48", "0 = 32", "past the end of threadgroup s, which has 32 bytes"),
    ],
)
def test_wrong_values_and_unwritten_outputs_are_reported(
    before: str,
    after: str,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["check", *files(tmp_path, launch=LAUNCH.replace(before, after))]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("launch", "message"),
    [
        ("grid = [1]", "grid: expected three extents, but got [1]"),
        (LAUNCH + "[buffers.x]\n", "buffers.x: expected an index"),
        (LAUNCH + "[buffers.3]\nshaep = [1]\n", "buffers.3.shaep: expected one of"),
        (LAUNCH + '[buffers.3]\ntype = "float"\n', "buffers.3.type: expected one of bool, int8"),
        (LAUNCH + "[buffers.3]\nfill = 'np.nope'\n", "buffers.3.fill: AttributeError"),
        (LAUNCH + "[buffers.3]\nshape = [2]\nfill = 'np.ones(3)'\n", "expected the shape (2,)"),
        ("grid = ", "Invalid value"),
    ],
)
def test_a_launch_file_that_cannot_be_is_an_error(
    launch: str, message: str, tmp_path: Path
) -> None:
    files(tmp_path, launch=launch)
    with pytest.raises(LaunchError) as caught:
        LaunchFile.read(tmp_path / "k.toml")
    assert message in str(caught.value) and "k.toml" in str(caught.value)
