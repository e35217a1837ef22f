"""The pytest plugin: kernels of a test suite run under the checker, and findings fail tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metalgen.cli.app import run

SUITE = """
import mlx.core as mx
import pytest

kernel = mx.fast.metal_kernel(  # made as the module is imported
    name="twice", input_names=["x"], output_names=["out"],
    source="uint i = thread_position_in_grid.x; out[i + OFF] = 2 * x[i];", header="HEAD",
)

def call():
    return kernel(
        inputs=[mx.arange(8, dtype=mx.float32)], grid=(8, 1, 1), threadgroup=(8, 1, 1),
        output_shapes=[(8,)], output_dtypes=[mx.float32],
    )[0].tolist()

def test_values():
    call()

@pytest.mark.metal_check
def test_of_nothing():
    pass
"""


def suite(folder: Path, offset: int) -> Path:
    path = folder / "test_suite.py"
    path.write_text(SUITE.replace("OFF", str(offset)).replace("HEAD", ""))
    return path


def pytest_on(path: Path, *arguments: str) -> str:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "metalgen-simulator"),
            *("-p", "no:cacheprovider", str(path), *arguments),
        ],
        capture_output=True,
        text=True,
        cwd=path.parent,
    )
    return done.stdout + done.stderr


def test_a_suite_without_findings_passes_but_for_tests_that_launch_nothing(tmp_path: Path) -> None:
    out = pytest_on(suite(tmp_path, 0), "--metal-check")
    assert "1 failed, 1 passed" in out and "the test launched no Metal kernel" in out
    assert "metal: 1 launches checked, 0 findings" in out


def test_a_finding_fails_the_test(tmp_path: Path) -> None:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmetal_check = true\n")
    out = pytest_on(suite(tmp_path, 1), "-k", "values")
    assert "1 failed" in out and "ends 4 bytes past the end of out, which has 32 bytes" in out


def test_check_runs_a_module_such_as_pytest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "metalgen", "check", "-m", "pytest", "-q"),
            *("-p", "no:cacheprovider", str(suite(tmp_path, 1)), "-k", "values"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 1, done.stderr
    assert "FOUND  pytest  (1 launch, 1 finding)" in done.stdout
    assert "test_suite.py:7: program.metal:" in done.stdout


def test_a_recipe_that_launches_nothing_is_an_error() -> None:
    from metalgen import simulator

    with (
        pytest.raises(simulator.CheckFailed, match="no kernel was launched in the block"),
        simulator.record(checked=True, raise_on_findings=True),
    ):
        pass


def test_options_of_a_metal_file_are_refused_with_another(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["check", "--kernel", "k", "script.py"]) == 2
    assert "--kernel, --launch, -I: expected with a .metal FILE" in capsys.readouterr().err
