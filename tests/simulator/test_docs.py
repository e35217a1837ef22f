"""docs/simulator.md shows what really happens, and names every kind of finding."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from metalgen import simulator
from metalgen.cli.app import run
from metalgen.simulator import lints, report, wording

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


def test_the_recipe_for_a_test_suite_raises_where_there_is_a_finding() -> None:
    recipe = blocks("python")[2]
    with pytest.raises(simulator.CheckFailed, match="no kernel was launched"):
        exec(compile(recipe, "simulator.md", "exec"), {})
    own = blocks("python")[0].replace("\n", "\n    ")
    racy = recipe.replace("pass  # call your own code here", f"{own}\n    # ")
    with pytest.raises(simulator.CheckFailed, match="race: write of 4 bytes of threadgroup tile"):
        exec(compile(racy, "simulator.md", "exec"), {})


def test_the_kernel_of_a_metal_file_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[3], "simulator.md", "exec"), {})
    assert capsys.readouterr().out == "18.0\n"


def test_the_metal_file_and_its_launch_are_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scale.metal").write_text(blocks("python")[3].split('"""')[1])
    (tmp_path / "scale.toml").write_text(blocks("toml")[0])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(blocks("python")[4], "simulator.md", "exec"), names)
    names["test_scale"]()
    shown = re.findall(r"\$ metalgen (check .*)\n(.*)", blocks("console")[1])
    assert len(shown) == 2
    for command, printed in shown:
        assert run(command.split()) == 0
        assert capsys.readouterr().out == printed + "\n"


@pytest.mark.parametrize("kind", [*wording.KINDS, *lints.KINDS, report.NEVER_WRITTEN])
def test_the_page_names_every_kind_of_finding(kind: str) -> None:
    table = PAGE.split("## What a checked run finds")[1].split("## ")[0]
    assert kind in table


def test_every_name_that_the_package_offers_can_be_had() -> None:
    from metalgen import simulator

    for name in simulator.__all__:
        assert callable(getattr(simulator, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = simulator.nothing


def test_importing_the_package_imports_no_room_of_it() -> None:
    import subprocess
    import sys

    code = (
        "import sys, metalgen.simulator\n"
        "print([n for n in sys.modules if n.startswith('metalgen.simulator.') or n == 'numpy'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
