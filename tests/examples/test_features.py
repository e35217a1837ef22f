"""Each example of a feature runs and agrees with plain MLX, and so does the documentation."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FEATURES = ROOT / "examples" / "features"
PAGE = (ROOT / "docs" / "attention.md").read_text()


@pytest.mark.parametrize("name", sorted(p.stem for p in FEATURES.glob("[a-z]*.py")))
def test_an_example_of_a_feature_agrees_with_plain_mlx(
    name: str, device: str, own_database: Path
) -> None:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(FEATURES / f"{name}.py"), device],
        capture_output=True,
        text=True,
        env=os.environ | {"METALGEN_DB": str(own_database), "PYTHONPATH": paths},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    errors = [float(e) for e in re.findall(rf"relative error (\S+) .*'{device}'", done.stdout)]
    assert errors and all(0 < error < 2e-3 for error in errors), done.stdout


def test_there_is_one_for_each_that_the_page_names() -> None:
    named = set(re.findall(r"examples/features/([a-z]\w*)\.py", PAGE))
    assert named == {p.stem for p in FEATURES.glob("[a-z]*.py")}


def test_the_python_of_the_page_runs_from_top_to_bottom(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    sections = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    for section in sections:
        for block in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
            exec(compile(block, f"docs/attention.md, {section.splitlines()[0]}", "exec"), names)
    assert names["lse"].shape == (2, 8, 5)
    assert names["out"].shape == (2, 8, 5, 64)
    printed = capsys.readouterr().out
    assert re.search(r"^kv_lens\S*: expected .*, but got 101$", printed, re.MULTILINE)
    assert "D64 float16 causal sinks gqa4: " in printed


def test_the_page_names_every_option() -> None:
    from metalgen.calls.options import Options

    for name in [*Options.__optional_keys__, "scale", "return_lse"]:
        if name not in ("device", "chip"):  # the README's
            assert re.search(rf"\b{name}\b", PAGE), name
