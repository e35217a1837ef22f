"""docs/testing.md: its Python runs, and the suites find what is wrong with a device."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$",
    (ROOT / "docs" / "testing.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
SOME = "test_empty_arrays_give_zeros or test_any_finite_scale or test_lengths_of_one"
"""A few tests of the first two suites."""


def run_suites(folder: Path, text: str) -> tuple[int, str]:
    (folder / "test_my_device.py").write_text(text)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SOME, str(folder)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        cwd=folder,
        check=False,
    )
    return done.returncode, done.stdout


def test_a_device_that_is_right_passes_and_one_that_is_not_fails(tmp_path: Path) -> None:
    code, printed = run_suites(tmp_path, BLOCKS[0])
    assert code == 0, printed
    assert re.search(r"^8 passed, [5-9]\d\d deselected", printed, re.MULTILINE), printed
    wrong = BLOCKS[0].replace(
        "        return super().compile(source)",
        "        right = super().compile(source)\n"
        "        return lambda **k: [x * 1.01 for x in right(**k)]",
    )
    code, printed = run_suites(tmp_path, wrong)
    assert code == 1, printed
    assert "relative_error" in printed


def test_the_other_blocks_run_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in BLOCKS[1:]:
        exec(compile(block, "docs/testing.md", "exec"), names)
    assert capsys.readouterr().out == ""  # no combination failed
