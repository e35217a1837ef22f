"""The SQLite file: its header, killed writers, and what it says of rows that someone spoiled."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import platformdirs
import pytest

from metalgen.database.layout import APPLICATION_ID, SCHEMA_VERSION, user_database
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.errors import ArgumentError
from metalgen.testing.rows import FIRST, SECOND, modelled, row


def test_the_file_says_that_it_is_ours_and_which_schema_it_has(tmp_path: Path) -> None:
    Store.open(tmp_path / "t.db").close()
    with contextlib.closing(sqlite3.connect(tmp_path / "t.db")) as connection:
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        names = connection.execute("SELECT name FROM _sqlite_migrations").fetchall()
    assert names == [
        ("m001_problems_schedules_measurements_checks_runs_pins",),
        ("m002_source_hash",),
        ("m003_pruned",),
    ]


def test_health_counts_rows_and_finds_those_that_someone_spoiled(tmp_path: Path) -> None:
    with Store.open(tmp_path / "t.db") as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurements([row(run=run), modelled(SECOND, run=run)])
        store.db.execute("UPDATE schedules SET key = '{\"bq\":7}' WHERE key = ?", [SECOND.key])
        store.db.conn.commit()
        assert store.health() == {
            "integrity": "ok",
            "rows": {
                "problems": 1,
                "schedules": 2,
                "measurements": 2,
                "checks": 0,
                "runs": 1,
                "pins": 0,
            },
            "measurements": {"measured ok": 1, "modelled ok": 1},
            "chips": {"M3Max": 2},
            "unreadable_rows": 1,
        }
        assert [m.schedule for m in store.measurements()] == [FIRST]


def test_a_row_with_an_endless_error_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    with Store.open(tmp_path / "t.db") as store:
        run = store.begin_run("M3Max", 0)
        sent = row(run=run, status="wrong", detail="relative error inf")
        store.add_measurement(sent)
        store.db.execute("UPDATE measurements SET error = 9e999")
        store.db.conn.commit()
        assert store.measurements() == [sent]
        assert store.health()["unreadable_rows"] == 0


@pytest.mark.parametrize(
    ("changes", "argument"),
    [
        ({"status": "good"}, "status"),
        ({"provenance": "guessed"}, "provenance"),
        ({"phase": "middle"}, "phase"),
        ({"seconds": None}, "seconds"),
        ({"seconds": 0.0}, "seconds"),
        ({"seconds": float("nan")}, "seconds"),
        ({"spread": -1.0}, "spread"),
        ({"samples": (1.0, float("inf"))}, "samples"),
    ],
)
def test_a_measurement_that_cannot_be_is_refused(changes: dict, argument: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        row(**changes)
    assert caught.value.argument == argument


def test_a_record_line_is_canonical_and_comes_back_equal() -> None:
    sent = row(samples=(1e-3, 2e-3), verified=True, error=1e-4)
    line = sent.to_line()
    assert Measurement.from_line(line) == sent
    assert line == Measurement.from_line(line).to_line()
    assert line.startswith('{"batch_heads":32,"chip":"M3Max","config":{"causal":true,')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "record: expected a line of JSON"),
        ("[1]", "record: expected an object of fields"),
        ("[" * 100_000, "record: expected a line of JSON"),
        ("{}", "family: expected one of forward"),
    ],
)
def test_a_line_that_is_no_record_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Measurement.from_line(text)
    assert str(caught.value).startswith(message)


def test_a_process_killed_while_it_adds_rows_loses_none_that_it_committed(tmp_path: Path) -> None:
    script = """
        import sys
        from metalgen.database.store import Store
        from metalgen.testing.rows import row
        with Store.open(sys.argv[1]) as store:
            run = store.begin_run("M3Max", 0)
            for i in range(100_000):
                store.add_measurement(row(run=run, policy=str(i)))
                print(i, flush=True)
    """
    path = tmp_path / "t.db"
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    seen = -1
    while seen < 20:
        seen = int(child.stdout.readline())
    os.kill(child.pid, signal.SIGKILL)
    seen = max([seen, *map(int, child.communicate()[0].split())])
    with Store.open(path) as store:
        policies = [int(m.policy) for m in store.measurements()]
        assert policies[: seen + 1] == list(range(seen + 1))
        assert store.health()["integrity"] == "ok"


def test_two_writers_that_start_together_lose_no_row(tmp_path: Path) -> None:
    script = """
        import sys
        from metalgen.database.store import Store
        from metalgen.testing.rows import row
        with Store.open(sys.argv[1]) as store:
            run = store.begin_run("M3Max", 0)
            for i in range(100):
                store.add_measurement(row(run=run, policy=sys.argv[2] + str(i)))
    """
    path = tmp_path / "t.db"
    children = [
        subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), str(path), name])
        for name in "ab"
    ]
    assert [child.wait() for child in children] == [0, 0]
    with Store.open(path) as store:
        assert sorted(m.policy for m in store.measurements()) == sorted(
            f"{name}{i}" for name in "ab" for i in range(100)
        )


@pytest.mark.parametrize("configured", ["", "/somewhere/else"])
def test_the_users_database_is_where_platformdirs_puts_it(
    configured: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("METALGEN_DB", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", configured)
    expected = Path(platformdirs.user_data_dir("metalgen", appauthor=False)) / "tuning.db"
    assert user_database() == expected
    monkeypatch.setenv("METALGEN_DB", "~/elsewhere.db")
    assert user_database() == Path.home() / "elsewhere.db"
