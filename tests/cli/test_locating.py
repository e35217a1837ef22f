"""A finding in Metal source is named by the line of the Python file that it was written on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from metalgen.cli.app import run
from metalgen.cli.locating import line_in

PROGRAM = ["kernel void f() {", "  int a = 1;", "  a += 1;", "  a += 1;", "}"]


def test_a_line_is_found_whatever_its_indentation() -> None:
    file = [
        "import mlx",
        "source = '''",
        "      int a = 1;",
        "      a += 1;",
        "      a += 1;",
        "'''",
    ]
    assert [line_in(file, PROGRAM, line) for line in (1, 2, 3, 4)] == [None, 3, 4, 5]


def test_of_equal_lines_the_one_with_the_most_equal_lines_around_counts() -> None:
    file = ["a += 1;", "x", "int a = 1;", "a += 1;", "y"]
    assert line_in(file, PROGRAM, 3) == 4


def test_a_line_that_could_be_two_is_none() -> None:
    assert line_in(["a += 1;", "x", "a += 1;"], ["a += 1;"], 1) is None
    assert line_in(["", ""], ["", "a"], 1) is None


FILE = """import mlx.core as mx

kernel = mx.fast.metal_kernel(
    name="shift",
    input_names=["a"],
    output_names=["b"],
    source='''
        uint i = thread_position_in_grid.x;
        b[i] = a[i - 1];
    ''',
)
kernel(
    inputs=[mx.arange(8.0)],
    output_shapes=[(8,)],
    output_dtypes=[mx.float32],
    grid=(8, 1, 1),
    threadgroup=(8, 1, 1),
)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "shift.py"
    path.write_text(FILE)
    return str(path)


def test_a_finding_starts_with_the_file_and_its_line(
    file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", file]) == 1
    printed = capsys.readouterr().out
    assert f"\n{file}:9: program.metal:7: wild access: read of 4 bytes at 0x" in printed
    assert "near no buffer; 2^32 elements too far, as an unsigned index below zero is" in printed
    assert run(["check", file, "--json"]) == 1
    (subject,) = json.loads(capsys.readouterr().out)["subjects"]
    (finding,) = subject["launches"][0]["findings"]
    assert (finding["line"], finding["written"]) == (7, {"file": file, "line": 9})


def test_a_kernel_of_an_imported_file_is_found_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels_of_this_test.py").write_text(FILE)
    (tmp_path / "main.py").write_text("import kernels_of_this_test")
    monkeypatch.chdir(tmp_path)
    assert run(["check", "main.py"]) == 1
    printed = capsys.readouterr().out
    assert "\nkernels_of_this_test.py:9: program.metal:7: wild access" in printed


@pytest.mark.parametrize("option", [["--bk", "16"], ["--all"], ["--causal"], ["--q-len", "3"]])
def test_options_of_our_own_kernels_are_refused_beside_a_file(
    option: list[str], file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["check", file, *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"metalgen: {option[0]}: expected none with a FILE")


def test_an_endless_loop_ends_with_the_time_limit(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(file).write_text(FILE.replace("b[i] = a[i - 1];", "while (a[i] < 100) {}"))
    assert run(["check", file, "--time-limit", "0.5"]) == 2
    assert "not finished after 0.5 s" in capsys.readouterr().err
    assert run(["check", file, "--time-limit", "0"]) == 2
    assert (
        "--time-limit: expected seconds above 0, up to a million, but got 0.0"
        in capsys.readouterr().err
    )
