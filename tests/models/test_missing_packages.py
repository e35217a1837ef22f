"""A program of mlx-lm that misses a package says so in one line, even when it finds out late."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from metalgen.cli.app import run
from metalgen.mlx_lm import is_patched, programs


@pytest.mark.parametrize("flag", ["--use-flash-attention", "--disable-flash-attention"])
def test_a_package_that_is_missing_once_the_program_runs_is_named(
    flag: str,
    own_database: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def main() -> None:
        importlib.import_module("no_such_package.anywhere")

    monkeypatch.setattr(programs, "_main", lambda program: main)
    assert run(["lm", "perplexity", flag, "--model", "folder"]) == 2
    expected = "needs no_such_package, which is not installed: pip install no_such_package"
    assert capsys.readouterr().err == f"metalgen: mlx_lm.perplexity {expected}\n"
    assert not is_patched()


def test_an_error_of_mlx_lm_itself_is_not_hidden(
    own_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        importlib.import_module("mlx_lm.no_such_module")

    monkeypatch.setattr(programs, "_main", lambda program: main)
    with pytest.raises(ModuleNotFoundError, match="mlx_lm"):
        programs.run("perplexity", [], programs.Settings())
