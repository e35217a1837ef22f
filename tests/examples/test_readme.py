"""What the README says to type works."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from metalgen.cli.app import run

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SESSION = (ROOT / "docs" / "tuning.md").read_text()


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs_from_top_to_bottom():
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["out"].shape == (1, 8, 100, 64)
    assert names["lse"].shape == (1, 8, 100)
    assert names["kernel"].backend == "metalgen"


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`metalgen (\w+)`", README))))
def test_every_command_that_the_readme_names_exists(command):
    done = subprocess.run(
        [sys.executable, "-m", "metalgen", command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["--head-dim 64", "--head-dim 128 --dtype bfloat16"])
def test_the_rows_that_the_session_shows_are_what_tune_prints(kind, capsys):
    shape = f"{kind} --causal --heads-per-kv 4 --heads 32 --q-len 2048"
    assert run(["tune", "--chip", "M3Max", "--device", "simulator", *shape.split()]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("D")]
    shown = [" ".join(line.split()) for line in SESSION.splitlines()]
    assert " ".join(row.split()) in shown


PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_links_to_exists(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text())
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_every_page_can_be_reached_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    assert [p.name for p in PAGES if p.name != "index.md" and f"{p.name})" not in index] == []
