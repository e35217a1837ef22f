"""`metalgen db export` writes a file of records, and over nothing else than one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metalgen.cli.app import run


@pytest.fixture(autouse=True)
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user database of this test's own, with some predictions."""
    path = tmp_path / "mine" / "tuning.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    tune = "tune --chip M3Max --head-dim 16 --trials 3 --device simulator"
    assert run(tune.split()) in (0, 1)
    return path


def complaint(capsys: pytest.CaptureFixture[str], target: Path | str) -> str:
    capsys.readouterr()
    assert run(["db", "export", str(target)]) == 2
    return capsys.readouterr().err


def test_what_is_no_file_of_records_is_not_written_over(
    tmp_path: Path, database: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, pipe, other = (tmp_path / name for name in ("thesis.txt", "pipe", "package.json"))
    text.write_text("years of work")
    other.write_text('{"name":"app"}')
    os.mkfifo(pipe)
    before = database.read_bytes()
    for target in (text, database, other):
        expected = "FILE: expected a new file, or an earlier file of records, but got "
        assert complaint(capsys, target) == f"metalgen: {expected}{str(target)!r}\n"
    assert complaint(capsys, pipe).startswith("metalgen: FILE: expected a new file, but got ")
    assert pipe.is_fifo()
    assert text.read_text() == "years of work"
    assert other.read_text() == '{"name":"app"}'
    assert database.read_bytes() == before


@pytest.mark.parametrize("target", ["", "/", ".", "no/such/folder.jsonl"])
def test_what_cannot_be_a_file_is_one_line_and_leaves_nothing_behind(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = "metalgen: FILE: expected a file in a folder that exists, but got "
    assert complaint(capsys, target).startswith(expected)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_earlier_file_of_records_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    assert run(["db", "export", str(target)]) == 0
    first = target.read_bytes()
    assert first.startswith(b'{"batch_heads":')
    assert run(["db", "export", "--measured", str(target)]) == 0
    assert target.read_bytes() == b""
    assert run(["db", "export", str(target)]) == 0
    assert target.read_bytes() == first
