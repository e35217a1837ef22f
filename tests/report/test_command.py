"""``metalgen report``: what it writes, prints and returns, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_samples import DEFAULT, OTHER, database, final, modelled, records, row

from metalgen.cli import main


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``metalgen report``."""
    with pytest.raises(SystemExit) as stop:
        main(["report", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert isinstance(stop.value.code, int)
    return stop.value.code, out, err


def test_without_a_file_the_page_is_about_the_users_database(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, no_database: Path
):
    monkeypatch.chdir(tmp_path)
    database(no_database, [final(OTHER, 1e-3), modelled(DEFAULT, 1e-3)])
    assert run(capsys) == (0, "report.html: 1 measured and 1 modelled results from 2 rows\n", "")
    assert "1.000 ms" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_dash_is_standard_output(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    path = records(tmp_path / "r.jsonl", [final(OTHER, 1e-3)])
    code, page, err = run(capsys, path, "-o", "-")
    assert (code, err) == (0, "")
    assert page.startswith("<!doctype html>") and "1.000 ms" in page
    assert [each.name for each in tmp_path.iterdir()] == ["r.jsonl"]
    code, out, err = run(capsys, path, "-o", "-", "--json")
    assert (code, out) == (2, "")
    assert "--output: expected the name of a file" in err


def test_a_page_to_be_shared_names_no_folder(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, no_database: Path
):
    monkeypatch.chdir(tmp_path)
    database(no_database, [final(OTHER, 1e-3)])
    folder = tmp_path / "folder-of-mine"
    folder.mkdir()
    path = records(folder / "r.jsonl", [row()])
    path.write_text(path.read_text() + "rubbish\n")
    assert run(capsys, path, no_database)[0] == 1
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"<code>{no_database.name}</code>" in page and "<code>r.jsonl</code>" in page
    assert "folder-of-mine" not in page and str(no_database.parent) not in page


def test_json_tells_what_was_written(tmp_path: Path, capsys):
    path = records(tmp_path / "r.jsonl", [final(OTHER, 1e-3), row(chip="M1", cores=8)])
    page = tmp_path / "page.html"
    code, out, _ = run(capsys, path, "-o", page, "--chip", "M1", "--json")
    assert code == 0
    assert json.loads(out) == {
        "page": str(page),
        "bytes": page.stat().st_size,
        "sources": [str(path)],
        "rows": 1,
        "left_out": 0,
        "results": {"measured": 1, "modelled": 0},
    }
    assert "M3Max" not in page.read_text(encoding="utf-8")


def test_rows_that_are_left_out_are_named_and_counted(tmp_path: Path, capsys):
    path = records(tmp_path / "r.jsonl", [row()])
    path.write_text(path.read_text() + "rubbish\n" * 9)
    code, out, _ = run(capsys, path, "-o", tmp_path / "page.html")
    assert code == 1
    assert "1 measured result from 1 row" in out and "left out: 9 rows" in out
    assert out.count("r.jsonl: line ") == 5 and "r.jsonl: line 2: " in out
    assert "Left out: 9 rows" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_everything_that_cannot_be_is_one_line_and_writes_nothing(tmp_path: Path, capsys):
    good = records(tmp_path / "r.jsonl", [row()])
    empty, text = database(tmp_path / "empty.db", []), tmp_path / "notes.txt"
    text.write_text("no records\n")
    (tmp_path / "zero.db").touch()
    page = tmp_path / "page.html"
    missing, inside = tmp_path / "no" / "page.html", good / "page.html"
    before = sorted(tmp_path.iterdir())
    for arguments, expected in (
        ((), "tuning database"),
        ((tmp_path / "none.db",), "does not exist"),
        ((tmp_path,), "is a folder, not a file"),
        ((empty,), "at least one row; `metalgen tune` makes some"),
        ((tmp_path / "zero.db",), "at least one row"),
        ((text,), "a tuning database or a file of records"),
        ((good, text), "a tuning database or a file of records"),
        ((good, "--chip", "M1"), "--chip: expected a chip with rows"),
        ((good, "--chip", "Z80"), "Z80"),
        ((good, "-o", missing), "--output: expected a file in a folder that exists"),
        ((good, "-o", inside), "--output: expected a file in a folder that exists"),
        ((good, "-o", tmp_path), "--output: expected a file in a folder that exists"),
        ((good, "-o", "/dev/null"), "--output: expected a new file"),
        ((good, "-o", tmp_path / ("x" * 300)), "--output: expected a file to write"),
        ((good, "-o", good), "--output: expected a new file, or an earlier page"),
    ):
        output = () if "-o" in arguments else ("-o", page)
        code, out, err = run(capsys, *arguments, *output)
        assert (code, out) == (2, ""), arguments
        assert expected in err and err.count("\n") == 1, err
    assert sorted(tmp_path.iterdir()) == before
