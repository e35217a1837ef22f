"""Databases and record files from elsewhere: each kind of damage is refused with a named reason."""

from __future__ import annotations

import contextlib
import json
import random
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from metalgen.database import exchange, untrusted
from metalgen.database.exchange import Summary
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.database.untrusted import open_untrusted
from metalgen.testing.rows import FIRST, SECOND, THIRD, row

SAMPLE = 60
"""Damaged files that every run of the tests tries; all thousand are behind the marker slow."""


def good(path: Path) -> Path:
    """A sound database of three rows."""
    import dataclasses

    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0)
        rows = [row(s, verified=True, samples=(1e-3, 1e-3)) for s in (FIRST, SECOND, THIRD)]
        store.add_measurements(dataclasses.replace(m, run=run) for m in rows)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    return path


def change(*statements: str) -> Callable[[Path], None]:
    """Damage by SQL, with SQLite's protections off."""

    def apply(path: Path) -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
            for pragma in ("writable_schema = ON", "ignore_check_constraints = ON"):
                connection.execute(f"PRAGMA {pragma}")
            for statement in statements:
                connection.execute(statement)

    return apply


def cut(path: Path) -> None:
    """Lose the second half."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a view": (change("CREATE VIEW v AS SELECT 1"), "has a view that is not ours: v"),
    "a trigger": (
        change("CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM pins; END"),
        "has a trigger that is not ours: t",
    ),
    "a virtual table": (
        change("CREATE VIRTUAL TABLE f USING fts5(x)"),
        "has a table that is not ours: f",
    ),
    "a view in place of a table": (
        change("DROP TABLE pins", "CREATE VIEW pins AS SELECT load_extension('x')"),
        "its table pins is not as metalgen made it",
    ),
    "an expression index": (
        change("CREATE INDEX e ON runs (abs(seed))"),
        "has a index that is not ours: e",
    ),
    "a generated column": (
        change("ALTER TABLE pins ADD COLUMN g BLOB AS (zeroblob(schedule))"),
        "its table pins is not as metalgen made it",
    ),
    "a table that is missing": (change("DROP TABLE pins"), "lacks the table pins"),
    "another application": (change("PRAGMA application_id = 7"), "not a metalgen database"),
    "a later schema": (change("PRAGMA user_version = 99"), "written by a later metalgen"),
    "an earlier schema": (change("PRAGMA user_version = 0"), "has schema 0, not"),
    "half a file": (cut, "damaged"),
    "a text": (lambda p: p.write_text("hello"), "line 1"),
    "an empty header": (lambda p: p.write_bytes(untrusted.MAGIC), "not an SQLite database"),
    "a log beside it": (
        lambda p: p.with_name(p.name + "-wal").write_bytes(b"x" * 99),
        "is in use (it has a write-ahead log)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_database_is_refused_by_name_and_nothing_of_it_is_kept(
    tmp_path: Path, name: str
) -> None:
    damage, reason = REFUSED[name]
    path = good(tmp_path / "bad.db")
    damage(path)
    with Store.open(tmp_path / "mine.db") as store:
        summary = exchange.merge(store, [path])
        assert store.measurements() == []
    assert summary.new == summary.pooled == 0
    assert any(reason in text or reason == place for _, place, text in summary.reasons), summary


BAD_ROWS = {
    "a huge blob": ("samples = zeroblob(3000000)", None),
    "text for a number": ("seconds = 'fast'", "seconds: expected a finite number"),
    "a negative time": ("seconds = -1.0", "seconds: expected a finite number"),
    "infinity": ("seconds = 9e999", "seconds: expected a finite number"),
    "an unknown status": ("status = 'great'", "status: expected one of"),
    "a path for a chip": ("chip = '../../etc/passwd'", "chip: expected the name of a chip"),
    "a template's text for a hash": (
        "template_hash = '{{ 7*7 }}'",
        "template_hash: expected 16 hexadecimal digits",
    ),
    "a path for a source hash": (
        "source_hash = '../../etc/passwd'",
        "source_hash: expected 16 hexadecimal digits, or nothing",
    ),
    "an escape sequence": ("detail = char(27) || '[2J'", "detail: expected printable text"),
    "deep samples": (
        "samples = replace(hex(zeroblob(20000)), '00', '[')",
        "maximum recursion depth",
    ),
    "samples that are no numbers": ("samples = '[\"x\"]'", "samples: expected a finite number"),
    "verified though it failed": ("status = 'wrong'", "verified: expected false"),
    "a missing schedule": ("schedule = 4711", "its problem or schedule is missing"),
    "an unknown chip": ("chip = 'Z80'", "chip: expected one that"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_left_out_by_name_or_its_file_is_refused(tmp_path: Path, name: str) -> None:
    """STRICT tables refuse wrong types at quick_check; other damage costs the row alone."""
    assignment, reason = BAD_ROWS[name]
    path = good(tmp_path / "bad.db")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        try:
            connection.execute(f"UPDATE measurements SET {assignment} WHERE id = 2")
        except sqlite3.IntegrityError:  # STRICT: it cannot even be written
            return
    with Store.open(tmp_path / "mine.db") as store:
        summary = exchange.merge(store, [path])
        kept = [m.schedule for m in store.measurements()]
    assert summary.rejected + summary.refused == 1, summary
    assert kept == ([] if summary.refused else [FIRST, THIRD])
    text = summary.reasons[0][2]
    assert reason is None or reason in text or "damaged (CHECK" in text, text


LINES = {
    "": "expected a field",
    '{"a": 1, "a": 2}': "a name occurs twice",
    "[" * 100_000: "nested too deeply",
    '{"a":' * 50_000: "nested too deeply",
    "[]": "not an object",
    "NaN": "NaN is not JSON",
    "{": "Expecting property name",
    "\xff": "Expecting value",
}


@pytest.mark.parametrize("line", LINES)
def test_a_bad_line_is_left_out_by_name_and_the_others_are_read(tmp_path: Path, line: str) -> None:
    text = line or json.dumps({"family": "forward"})
    path = tmp_path / "r.jsonl"
    path.write_text(f"{row(FIRST).to_line()}\n{text}\n{row(SECOND).to_line()}\n")
    summary = Summary()
    assert [m.schedule for m in exchange.read(path, summary)] == [FIRST, SECOND]
    assert (summary.rejected, summary.reasons[0][1]) == (1, "line 2")
    if line:
        assert LINES[line] in summary.reasons[0][2]


def test_sizes_are_capped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("x" * 5000 + "\n")
    monkeypatch.setattr(untrusted, "MAX_LINE_BYTES", 1000)
    summary = Summary()
    assert list(exchange.read(path, summary)) == []
    assert summary.reasons[0][2] == "a line of more than 1000 bytes"
    monkeypatch.setattr(untrusted, "MAX_RECORDS_BYTES", 1000)
    monkeypatch.setattr(untrusted, "MAX_DATABASE_BYTES", 1000)
    for file, reason in ((path, "has 5001 bytes"), (good(tmp_path / "a.db"), "bytes, and at most")):
        summary = Summary()
        assert list(exchange.read(file, summary)) == []
        assert summary.refused == 1 and reason in summary.reasons[0][2]


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path, reason in ((tmp_path / "none", "does not exist"), (tmp_path, "is a folder")):
        summary = Summary()
        assert list(exchange.read(path, summary)) == []
        assert reason in summary.reasons[0][2]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT load_extension('x')",
        "SELECT abs(-1)",
        "ATTACH 'other.db' AS other",
        "PRAGMA writable_schema = ON",
        "DELETE FROM runs",
        "SELECT sql FROM sqlite_master",
        "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n",
        "CREATE TEMP TABLE t (x)",
    ],
)
def test_nothing_but_our_columns_can_be_selected(tmp_path: Path, statement: str) -> None:
    with open_untrusted(good(tmp_path / "a.db")) as connection:
        assert connection.execute("SELECT count FROM (SELECT id AS count FROM runs)") is not None
        with pytest.raises(sqlite3.Error):
            connection.execute(statement).fetchmany(10)


def damaged(number: int, sound: bytes, lines: bytes) -> tuple[str, bytes]:
    """The `number`-th damaged file: a name and its bytes; databases and records in turn."""
    draw = random.Random(number)
    data = bytearray(lines if number % 2 else sound)
    kind = draw.choice(("flip", "flips", "cut", "repeat", "zero", "swap", "insert"))
    at, length = draw.randrange(len(data)), draw.choice((1, 16, 512, 4096))
    if kind in ("flip", "flips"):
        for _ in range(1 if kind == "flip" else draw.choice((8, 64, 512))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "repeat":
        data[at:at] = data[at : at + length]
    elif kind == "zero":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif kind == "swap":
        other = draw.randrange(len(data))
        a, b = bytes(data[at : at + length]), bytes(data[other : other + length])
        data[at : at + length], data[other : other + length] = b, a
    else:
        data[at:at] = draw.randbytes(length)
    return ("r.jsonl" if number % 2 else "d.db"), bytes(data)


def try_damaged(folder: Path, numbers: range) -> dict[str, int]:
    """Merge damaged files, each alone: what happened, by outcome."""
    sound = good(folder / "good.db").read_bytes()
    original = {m.schedule.key: m for m in exchange.read(folder / "good.db", Summary())}
    lines = "".join(m.to_line() + "\n" for m in original.values()).encode()
    outcomes = {"refused": 0, "rejected": 0, "sound": 0}
    with Store.open(folder / "mine.db") as store:
        for number in numbers:
            name, data = damaged(number, sound, lines)
            path = folder / name
            path.write_bytes(data)
            summary = exchange.merge(store, [path])
            for m in store.measurements():  # whatever came in is typed, valid and canonical
                exchange.check(m)
                assert Measurement.from_line(m.to_line()).schedule == m.schedule
            assert all(reason for _, _, reason in summary.reasons)
            kind = "refused" if summary.refused else "rejected" if summary.rejected else "sound"
            outcomes[kind] += 1
            store.prune(keep_templates=set())
        assert store.health()["integrity"] == "ok"
    return outcomes


def test_damaged_files_are_refused_or_lose_only_what_is_damaged(tmp_path: Path) -> None:
    outcomes = try_damaged(tmp_path, range(SAMPLE))
    assert sum(outcomes.values()) == SAMPLE
    assert outcomes["refused"] > SAMPLE / 10
    assert outcomes["rejected"] > SAMPLE / 10


@pytest.mark.slow
def test_a_thousand_damaged_files_are_refused_or_lose_only_what_is_damaged(tmp_path: Path) -> None:
    outcomes = try_damaged(tmp_path, range(1000))
    assert sum(outcomes.values()) == 1000
    assert outcomes["refused"] > 100 and outcomes["rejected"] > 100
