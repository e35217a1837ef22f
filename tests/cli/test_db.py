"""``metalgen db``: what each subcommand writes, prints and returns."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
from pathlib import Path

import pytest

from metalgen.chips import get_chip
from metalgen.cli import main
from metalgen.database.lookup import lookup
from metalgen.database.measurement import Measurement, host
from metalgen.database.store import Store
from metalgen.families import Schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.digests import source_hash
from metalgen.source.hashes import template_hash, template_hashes

CONFIG = AttentionConfig(head_dim=64)
PROBLEM = Problem(CONFIG, 32, 1024, 1024)
FIRST = Schedule(bq=64, bk=32, bd=64, simdgroups=4, row_blocks=2)
SECOND = Schedule(bq=32, bk=16, bd=64, simdgroups=4)


def row(schedule: Schedule = FIRST, **changes: object) -> Measurement:
    """A final on M3Max that was measured and checked."""
    fields: dict[str, object] = {
        "template_hash": template_hash(schedule), "chip": "M3Max", "cores": 40, "device": "metal",
        "provenance": "measured", "policy": "p", "phase": "final", "verified": True,
        "seconds": 1e-3, "samples": (1e-3,), "created": "2026-11-21T08:00:00Z",
    }  # fmt: skip
    return Measurement(problem=PROBLEM, schedule=schedule, **(fields | host() | changes))  # type: ignore[arg-type]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's database, with one row."""
    path = tmp_path / "mine.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurement(dataclasses.replace(row(), run=run))
    return path


def db(*arguments: str | Path) -> int:
    """The exit code of a subcommand."""
    with pytest.raises(SystemExit) as stop:
        main(["db", *map(str, arguments)])
    code = stop.value.code
    assert isinstance(code, int)
    return code


def records(path: Path, *rows: Measurement) -> Path:
    """A record file."""
    path.write_text("".join(m.to_line() + "\n" for m in rows))
    return path


def held(path: Path) -> list[Measurement]:
    """What a database holds."""
    with Store.open(path) as store:
        return store.measurements()


def test_export_writes_canonical_lines(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db("export") == 0
    assert capsys.readouterr().out == row().to_line() + "\n"
    assert db("export", tmp_path / "out.jsonl", "--chip", "M1") == 0
    assert (tmp_path / "out.jsonl").read_text() == ""
    assert db("export", "--measured", "--verified", tmp_path / "out.jsonl") == 0
    assert (tmp_path / "out.jsonl").read_text() == row().to_line() + "\n"
    assert db("export", tmp_path / "no" / "such") == 2


def test_import_merges_into_the_users_database_and_a_dry_run_does_not(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = records(tmp_path / "other.jsonl", row(), row(SECOND))
    assert db("import", "--dry-run", file) == 0
    assert "Would merge into" in (out := capsys.readouterr().out) and "1 new, 0 pooled" in out
    assert len(held(mine)) == 1
    assert db("import", file) == 0
    assert {m.schedule for m in held(mine)} == {FIRST, SECOND}
    capsys.readouterr()
    assert db("import", "--json", file) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["new"], document["same"], document["reasons"]) == (0, 2, [])


def test_an_import_says_when_rows_are_of_other_templates(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db("import", records(tmp_path / "a.jsonl", row(SECOND))) == 0
    assert "refresh" not in capsys.readouterr().out
    assert db("import", records(tmp_path / "b.jsonl", row(SECOND, template_hash="f" * 16))) == 0
    told = "1 row in all from other template versions: see `metalgen db refresh`"
    assert told in capsys.readouterr().out


def test_merge_makes_the_target_and_names_what_it_leaves_out(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(Store.open(mine)):
        pass
    file = records(tmp_path / "other.jsonl", row(SECOND))
    file.write_text(file.read_text() + "rubbish\n")
    assert db("merge", "--dry-run", tmp_path / "t.db", file) == 1
    assert not (tmp_path / "t.db").exists()
    assert db("merge", tmp_path / "t.db", file, mine) == 1
    out = capsys.readouterr().out
    assert "2 new, 0 pooled, 0 known, 0 conflicts, 1 rejected, 0 files refused" in out
    assert "other.jsonl: line 2: " in out
    assert {m.schedule for m in held(tmp_path / "t.db")} == {FIRST, SECOND}


def test_verify_accepts_canonical_records_and_refuses_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = sorted((row(), row(SECOND)), key=Measurement.to_line)
    good = records(tmp_path / "good.jsonl", *lines)
    assert db("verify", "--canonical", good) == 0
    assert capsys.readouterr().out == "2 good rows, 0 bad, 0 files refused\n"
    other = records(tmp_path / "other.jsonl", *reversed(lines))
    assert db("verify", other) == 0
    assert db("verify", "--canonical", other) == 1
    assert "not in canonical order and form" in capsys.readouterr().out
    assert db("verify", "--canonical", tmp_path / "none", other, other) == 1  # each by itself
    out = capsys.readouterr().out
    assert "3 files refused" in out and out.count("not in canonical order and form") == 2


@pytest.mark.parametrize(("bad", "last"), [(20, "line 20: "), (21, "and 1 more bad row")])
def test_verify_shows_the_first_reasons_and_says_how_many_there_are_more(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: int, last: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("{\n" * bad)
    assert db("verify", path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"0 good rows, {bad} bad, 0 files refused"
    assert last in lines[-1] and len(lines) == bad + 1


def test_every_shipped_record_is_valid_and_canonical() -> None:
    from metalgen.resources import tuning_db_dir

    for path in sorted(tuning_db_dir().glob("*.jsonl")):
        assert path.name == path.name.lower()
        assert db("verify", "--canonical", path) == 0, path


def test_refresh_brings_a_file_of_records_into_canonical_form(tmp_path: Path) -> None:
    line = row(SECOND).to_line()
    file = tmp_path / "r.jsonl"
    file.write_text("\n" + json.dumps(dict(reversed(json.loads(line).items()))) + "\n")
    assert db("refresh", file) == 0
    assert db("verify", "--canonical", file) == 0


def test_refresh_keeps_rows_of_the_same_kernel_in_databases_and_files(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = {"template_hash": "f" * 16}
    kept = row(SECOND, **old, source_hash=source_hash(CONFIG, SECOND))
    file = records(tmp_path / "r.jsonl", kept, row(FIRST, **old, source_hash="0" * 16))
    before = file.read_bytes()
    assert db("refresh", "--dry-run", file) == 0
    out = capsys.readouterr().out
    assert f"{file}: 2 rows, 1 would be kept, whose kernel is the same, 1 whose kernel" in out
    assert file.read_bytes() == before
    assert db("refresh", file, mine) == 0
    out = capsys.readouterr().out
    assert f"{file}: 2 rows, 1 kept, whose kernel is the same, 1 whose kernel" in out
    assert f"{mine}: 1 row, 1 of the present templates, 1 of these without a source" in out
    assert "tune again" in out
    assert db("verify", "--canonical", file) == 0
    now = {"template_hash": template_hash(FIRST)}
    assert dataclasses.replace(kept, **now).to_line() in file.read_text().splitlines()
    assert held(mine)[0].source_hash == source_hash(CONFIG, FIRST)
    capsys.readouterr()
    assert db("refresh", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"][0] | {"file": "", "current": 1, "rows": 1} == {
        "file": "", "rows": 1, "current": 1, "filled": 0, "kept": 0, "joined": 0, "changed": 0,
        "unknown": 0, "checks": 0,
    }  # fmt: skip


def test_refresh_refuses_a_bad_file_before_it_writes_any(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text("rubbish\n")
    good = records(tmp_path / "r.jsonl", row())
    before = good.read_bytes()
    assert db("refresh", good, mine, bad) == 2
    assert f"{bad}: line 1: " in capsys.readouterr().err
    assert good.read_bytes() == before and held(mine)[0].source_hash == ""
    assert db("refresh", tmp_path / "none") == 2


def test_refresh_refuses_a_database_with_a_trigger_before_it_writes_any(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.db"
    assert db("merge", other, mine) == 0
    assert db("refresh", "--dry-run", other) == 0
    with contextlib.closing(sqlite3.connect(other)) as connection:
        connection.execute(
            "CREATE TRIGGER t AFTER UPDATE ON measurements BEGIN DELETE FROM pins; END"
        )
        connection.commit()
    good = records(tmp_path / "r.jsonl", row())
    before = good.read_bytes()
    assert db("refresh", good, other) == 2
    assert "has a trigger that is not ours: t" in capsys.readouterr().err
    assert good.read_bytes() == before


def test_diff_shows_rows_by_side(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = records(tmp_path / "a.jsonl", row(), row(SECOND))
    b = records(tmp_path / "b.jsonl", row(seconds=2e-3))
    assert db("diff", a, a) == 0
    capsys.readouterr()
    assert db("diff", a, b) == 1
    out = capsys.readouterr().out
    assert "- M3Max" in out and "! M3Max" in out and "-> 2.000 ms ok" in out
    assert "1 only in" in out and "1 differ, 0 are the same" in out
    assert db("diff", "--json", a, b) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["only_first"] == [row(SECOND).to_record()]


def test_stats_and_show_print_what_is_there(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert db("stats", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["chips"] == {"M3Max": 1}
    assert document["measurements"] == {"measured ok": 1}
    assert db("stats") == 0
    assert "chip M3Max          1" in capsys.readouterr().out
    assert db("show", "--json") == 0
    assert [r["chip"] for r in json.loads(capsys.readouterr().out)["rows"]] == ["M3Max"]
    assert db("show", "--chip", "M1") == 0
    assert "0 rows" in capsys.readouterr().out


def test_prune_wants_to_be_told_what_to_remove(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert db("prune") == 2
    assert db("prune", "--modelled", "--other-templates") == 0
    assert len(held(mine)) == 1
    with Store.open(mine) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurement(row(SECOND, template_hash="f" * 16, run=run))
    assert db("prune", "--other-templates", "--dry-run") == 0
    assert len(held(mine)) == 2
    assert db("prune", "--other-templates") == 0
    assert [m.schedule for m in held(mine)] == [FIRST]


def test_a_pin_answers_look_ups_until_it_is_removed(mine: Path) -> None:
    def found() -> Schedule | None:
        hit = lookup(
            PROBLEM, get_chip("M3Max"), template_hashes(PROBLEM.family, "metal"), database=mine
        )
        return hit.schedule if hit else None

    assert found() == FIRST
    assert db("pin", "--schedule", SECOND.key, "--note", "A/B") == 0
    assert found() == SECOND
    assert db("unpin") == 0
    assert found() == FIRST
    assert db("pin", "--schedule", "{") == 2
    assert db("pin", "--schedule", json.dumps(FIRST.to_dict() | {"bq": 8})) == 2


def test_pins_say_what_they_did_in_words_and_as_json(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*words: str) -> str:
        capsys.readouterr()
        assert db(*words) == 0
        return capsys.readouterr().out

    name = str(PROBLEM)
    assert said("unpin") == f"{name} was not pinned.\n"
    assert said("pin", "--schedule", SECOND.key).startswith(f"Pinned {name} to ")
    unpinned = f"Unpinned {name}: look-ups answer with its best row again.\n"
    assert said("unpin") == unpinned
    problem = {"config": CONFIG.to_dict(), "family": "forward", "batch_heads": 32}
    problem |= {"q_len": 1024, "kv_len": 1024}
    pinned = json.loads(said("pin", "--schedule", SECOND.key, "--note", "A/B", "--json"))
    assert pinned == {
        "problem": problem,
        "pinned": True,
        "schedule": SECOND.to_dict(),
        "note": "A/B",
    }
    for was_pinned in (True, False):
        found = json.loads(said("unpin", "--json"))
        assert found == {"problem": problem, "was_pinned": was_pinned, "pinned": False}


def test_an_export_is_a_document_on_request_and_a_dash_is_standard_output(
    mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = row().to_line() + "\n"
    assert db("export", "-") == 0
    assert capsys.readouterr().out == lines
    for words in (("--json",), ("-", "--json")):
        assert db("export", *words) == 0
        assert json.loads(capsys.readouterr().out) == {"rows": [row().to_record()]}
    assert db("export", "out.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"file": "out.jsonl", "rows": 1}
    assert (tmp_path / "out.jsonl").read_text() == lines
    (tmp_path / "records").mkdir()
    assert db("export", "--contribute", "records", "--json") == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file == {"file": "records/m3max.jsonl", "yours": 1, "rows": 1}
    assert db("study", "-o", "-") == 2
    assert "--output: expected the name of a file" in capsys.readouterr().err
    assert not (tmp_path / "-").exists()


def test_a_contribution_joins_the_folders_records(mine: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tuning_db"
    assert db("export", "--contribute", folder) == 2
    folder.mkdir()
    records(folder / "m3max.jsonl", row(SECOND), row(samples=(3e-3,), seconds=3e-3))
    assert db("export", "--contribute", folder) == 0
    lines = (folder / "m3max.jsonl").read_text().splitlines()
    pooled = row(samples=(1e-3, 3e-3), seconds=2e-3, spread=0.0010000000000000005)
    assert lines == sorted([row(SECOND).to_line(), pooled.to_line()])
    assert db("verify", "--canonical", folder / "m3max.jsonl") == 0
    assert db("export", "--contribute", folder) == 0
    assert (folder / "m3max.jsonl").read_text().splitlines() == lines
