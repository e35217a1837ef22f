"""The picture at the head of README shows what the kept results say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.pictures import COUNTED, MEASURED, RESULTS, counted, draw, measured

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_figures_are_read_from_the_kept_results() -> None:
    speed = measured((RESULTS / MEASURED).read_text(encoding="utf-8"))
    assert len(speed) >= 7
    assert speed["softcap, D=64"] == 14.37  # the only form: operations written by hand
    assert speed["window of 1,024, D=64"] == 19.63  # the faster of two: the fused one, by a mask
    share = counted((RESULTS / COUNTED).read_text(encoding="utf-8"))
    assert share["steel"][128] == 66.2
    assert {*share["default"]} == {*share["steel"]}


def test_readme_names_the_files_that_are_drawn_and_rounds_their_figures() -> None:
    assert f"results/{MEASURED})" in README and f"results/{COUNTED})" in README
    speed = measured((RESULTS / MEASURED).read_text(encoding="utf-8"))
    low, high = map(int, re.findall(r"(\d+) to (\d+) times as fast as the fastest MLX", README)[0])
    shown = [ratio for name, ratio in speed.items() if not name.startswith("bias")]
    assert (low, high) == (round(min(shown)), round(max(shown)))


def test_it_can_be_drawn_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(tmp_path / "speed.svg")
    assert "</svg>" in (tmp_path / "speed.svg").read_text(encoding="utf-8")
