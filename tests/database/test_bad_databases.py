"""A database that cannot be used: one typed error to a writer, a labelled miss to a look-up."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from metalgen.database import errors
from metalgen.database.connect import open_for_reading
from metalgen.database.layout import APPLICATION_ID
from metalgen.database.lookup import lookup
from metalgen.database.store import Store
from metalgen.testing.rows import CHIP, HASH, NEIGHBOURS, PROBLEM, row


def _text(path: Path) -> None:
    path.write_text("these are not the rows you are looking for\n" * 100)


def _foreign(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE recipes (name TEXT)")


def _newer(path: Path) -> None:
    Store.open(path).close()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def _folder(path: Path) -> None:
    path.mkdir()


def _damaged(path: Path) -> None:
    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurements([row(run=run, policy=str(i)) for i in range(300)])
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)


CASES: dict[str, tuple[Callable[[Path], None], type[errors.DatabaseError], str]] = {
    "text": (_text, errors.ForeignDatabase, "not an SQLite database"),
    "foreign": (_foreign, errors.ForeignDatabase, "not a metalgen database"),
    "newer": (_newer, errors.NewerDatabase, "schema 99, this one knows 3"),
    "folder": (_folder, errors.UnreadableDatabase, "is a folder"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_writer_gets_one_typed_error_and_the_file_stays_as_it_was(
    case: str, tmp_path: Path
) -> None:
    make, expected, words = CASES[case]
    path = tmp_path / "t.db"
    make(path)
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(expected, match=words) as caught:
        Store.open(path)
    assert str(caught.value).startswith(f"tuning database {path}: ")
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


@pytest.mark.parametrize("case", CASES)
def test_a_look_up_takes_it_for_a_miss_and_says_why(case: str, tmp_path: Path) -> None:
    make, _, words = CASES[case]
    path = tmp_path / "t.db"
    make(path)
    trace: list[str] = []
    hit = lookup(
        PROBLEM,
        CHIP,
        {HASH},
        database=path,
        shipped=tmp_path / "none",
        neighbours=NEIGHBOURS,
        trace=trace,
    )
    assert hit is None
    assert trace[0].startswith("user database not used: ") and words in trace[0]


def test_damaged_pages_are_an_error_to_a_reader_and_a_miss_to_a_look_up(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    _damaged(path)
    with (
        pytest.raises(errors.UnreadableDatabase, match="damaged"),
        Store.open(path, read_only=True) as store,
    ):
        store.measurements()
    trace: list[str] = []
    found = lookup(
        PROBLEM, CHIP, {HASH}, database=path, shipped=tmp_path, neighbours=(), trace=trace
    )
    assert found is None
    assert trace[0].startswith(f"user database not used: tuning database {path}: damaged (")


def test_no_database_yet_is_a_miss_that_makes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "t.db"
    trace: list[str] = []
    found = lookup(
        PROBLEM, CHIP, {HASH}, database=path, shipped=tmp_path, neighbours=(), trace=trace
    )
    assert found is None
    assert trace[0] == "user database: none yet"
    assert not path.parent.exists()
    with pytest.raises(errors.MissingDatabase):
        Store.open(path, read_only=True)


def test_a_database_that_another_process_holds_is_locked_after_the_wait(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with Store.open(path, busy=0.05) as store:
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("BEGIN IMMEDIATE")
        with pytest.raises(errors.LockedDatabase, match="locked by another process"):
            store.begin_run("M3Max", 0)
        holder.execute("ROLLBACK")
        store.begin_run("M3Max", 0)
        holder.close()


def test_readers_do_not_wait_for_a_writer(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurement(row(run=run, verified=True))
        store.db.execute("BEGIN IMMEDIATE")
        hit = lookup(
            PROBLEM, CHIP, {HASH}, database=path, shipped=tmp_path, neighbours=(), limits=None
        )
        assert hit is not None and hit.seconds == 1e-3
        store.db.execute("ROLLBACK")


def test_a_file_that_may_not_be_written_is_read_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.db"
    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurement(row(run=run, verified=True))
    # Tests may run as root, whom permissions do not stop: ask the operating system's answer.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(errors.ReadOnlyDatabase, match="read-only"):
        Store.open(path)
    hit = lookup(PROBLEM, CHIP, {HASH}, database=path, shipped=tmp_path, neighbours=())
    assert hit is not None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.db"]


def test_sqlite_that_reports_a_read_only_file_gets_the_same_error(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with Store.open(path) as store:
        store.db.execute("PRAGMA query_only = ON")
        with pytest.raises(errors.ReadOnlyDatabase):
            store.begin_run("M3Max", 0)


def test_a_full_disk_loses_only_the_row_that_did_not_fit(tmp_path: Path) -> None:
    with Store.open(tmp_path / "t.db") as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurement(row(run=run))
        pages = store.db.execute("PRAGMA page_count").fetchone()[0]
        store.db.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(errors.FullDisk, match="the disk is full"):
            store.add_measurements([row(run=run, policy=str(i) * 2000) for i in range(9)])
        assert [m.policy for m in store.measurements()] == [row().policy]


def test_an_older_schema_is_migrated_by_a_writer_and_a_miss_before_that(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute("CREATE TABLE notes (text TEXT)")
    trace: list[str] = []
    assert not lookup(PROBLEM, CHIP, {HASH}, database=path, neighbours=(), trace=trace)
    assert "has schema 0, not 3" in trace[0]
    with pytest.raises(errors.OlderDatabase):
        Store.open(path, read_only=True)
    with Store.open(path) as store:
        assert store.health()["integrity"] == "ok"
        assert store.measurements() == []


def test_an_empty_file_becomes_a_database(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    path.touch()
    with Store.open(path) as store:
        assert store.measurements() == []


def test_a_database_that_another_process_is_making_is_a_miss_and_not_foreign(
    tmp_path: Path,
) -> None:
    path = tmp_path / "tuning.db"
    path.touch()
    with pytest.raises(errors.MissingDatabase, match="is empty as yet"):
        open_for_reading(path)
    Store.open(path).close()
    open_for_reading(path).close()
