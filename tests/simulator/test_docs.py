"""docs/simulator.md shows what really happens, and names every kind of finding."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from metalgen.cli.app import run
from metalgen.simulator import lints, wording

PAGE = (Path(__file__).parents[2] / "docs" / "simulator.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_first_example_prints_what_the_page_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reverse.py").write_text(blocks("python")[0])
    monkeypatch.chdir(tmp_path)
    assert run(["check", "reverse.py"]) == 1
    shown = blocks("console")[0].split("$ metalgen check reverse.py\n")[1]
    assert capsys.readouterr().out.rstrip() == shown.rstrip()


def test_the_second_example_prints_what_its_comments_say(
    capsys: pytest.CaptureFixture[str],
) -> None:
    exec(compile(blocks("python")[1], "simulator.md", "exec"), {})
    assert capsys.readouterr().out == "no findings\n256\n"


@pytest.mark.parametrize("kind", [*wording.KINDS, *lints.KINDS])
def test_the_page_names_every_kind_of_finding(kind: str) -> None:
    table = PAGE.split("## What a checked run finds")[1].split("## ")[0]
    assert kind in table
