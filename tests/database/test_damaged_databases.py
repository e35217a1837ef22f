"""A damaged database ends no call and no command with anything but its answer or one line."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen.calls.resolve import forget_kernels
from metalgen.calls.verify import Verification
from metalgen.chips import get_chip
from metalgen.cli.app import run
from metalgen.database.connect import open_for_reading
from metalgen.database.errors import UnreadableDatabase
from metalgen.database.lookup import checked, last_chip, lookup
from metalgen.database.store import Store
from metalgen.families import Schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.reference import attention_float64
from metalgen.source.hashes import template_hash, template_hashes
from metalgen.testing.rows import FIRST, SECOND, THIRD, modelled, row

CONFIG = AttentionConfig(head_dim=64, causal=True)
FORWARD = Problem(CONFIG, 4, 128, 128)
DECODE = Problem(CONFIG, 4, 1, 128)
DEFAULT = default_schedule(CONFIG, get_chip("M3Max").limits)
SPLIT = Schedule(bq=8, bk=SECOND.bk, bd=SECOND.bd, simdgroups=1, splits=4, family="decode")
SIZES = ("--head-dim", "64", "--causal", "--heads", "4", "--q-len", "128")
SAMPLE, ALL, CHUNK = 500, 10_000, 500


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound database with rows of every kind, checks, runs and a pin, in one file."""
    path = tmp_path_factory.mktemp("sound") / "sound.db"
    known: dict[str, Any] = {"template_hash": template_hash(FIRST), "verified": True}
    with Store.open(path) as store:
        number = store.begin_run("M3Max", 0, {"trials": 3})
        known["run"] = number
        store.add_measurements(
            [
                row(FIRST, 2e-3, problem=FORWARD, samples=(2e-3, 2e-3), phase="final", **known),
                row(SECOND, 3e-3, problem=FORWARD, mlx_seconds=4e-3, **known),
                row(THIRD, 3e-3, problem=FORWARD, chip="M3Max-30", cores=30, **known),
                row(THIRD, None, problem=FORWARD, status="compile", detail="no", run=number),
                modelled(SECOND, 1e-3, problem=dataclasses.replace(FORWARD, kv_len=256), **known),
                row(SPLIT, 1e-3, problem=DECODE, **known),
            ]
        )
        store.note_run(number, FORWARD.key, {"noise_floor": 0.01, "drift": [0.1], "outliers": 2})
        store.record_check(CONFIG, FIRST, known["template_hash"], "metal", "ok", error=1e-4)
        store.record_check(CONFIG, THIRD, known["template_hash"], "simulator", "wrong", error=2.0)
        store.pin(dataclasses.replace(FORWARD, batch_heads=8), SECOND, "A/B")
        store.end_run(number, "finished")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
    return path


@pytest.fixture
def quick_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels pass their check without being executed: this is about files."""
    passed = Verification(True, 1e-4, 1e-3, "Lq=9", "")
    monkeypatch.setattr("metalgen.calls.verify.verify", lambda *_, **__: passed)


# Damage


def flip(draw: random.Random, path: Path) -> None:
    """Change some bits, more often than not where the schema is."""
    data = bytearray(path.read_bytes())
    for _ in range(draw.choice((1, 1, 1, 8, 64))):
        end = draw.choice((100, 4096, 4096, len(data)))
        data[draw.randrange(end)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def overwrite(draw: random.Random, path: Path) -> None:
    """Put other bytes in the place of some, often where the schema is."""
    data = bytearray(path.read_bytes())
    at, length = draw.randrange(draw.choice((4096, len(data)))), draw.choice((1, 2, 16, 512, 4096))
    length = min(length, len(data) - at)
    other = draw.randrange(len(data) - length)
    new = (b"\xff" * length, bytes(length), draw.randbytes(length), data[other : other + length])
    data[at : at + length] = draw.choice(new)
    path.write_bytes(data)


def cut(draw: random.Random, path: Path) -> None:
    """Lose the end."""
    data = path.read_bytes()
    path.write_bytes(data[: draw.choice((0, 1, 100, 4096, draw.randrange(len(data))))])


VALUES = (
    *("NULL", "''", "'x'", "x''", "x'ff00'", "CAST(x'ff6e' AS TEXT)", "9e999", "-1", "7", "0.5"),
    *("zeroblob(3000000)", "char(27) || '[2J'", "replace(hex(zeroblob(9999)), '00', '[')"),
    *("9223372036854775807", "'{}'", "'[1'", "'\"' || char(55296) || '\"'", "'wrong'", "'M3Max'"),
)


def spoil(draw: random.Random, path: Path) -> None:
    """Put any value anywhere, also where the tables would not take it."""
    tables = ("measurements", "measurements", "problems", "schedules", "runs", "checks", "pins")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("writable_schema = ON", "ignore_check_constraints = ON"):
            connection.execute(f"PRAGMA {pragma}")
        change = "replace(replace(replace(sql, ' NOT NULL', ''), 'STRICT', ''), ' UNIQUE', '')"
        connection.execute(f"UPDATE sqlite_master SET sql = {change} WHERE type = 'table'")
        if draw.random() < 0.2:
            name, text = draw.choice(tables), draw.choice(("bytes", "CHECK", "TEXT", "(", "key"))
            connection.execute(
                "UPDATE sqlite_master SET sql = replace(sql, ?, CAST(x'fffe' AS TEXT)) "
                "WHERE name = ?",
                [text, name],
            )
    with (
        contextlib.suppress(sqlite3.Error, UnicodeError),
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection,
    ):
        for pragma in ("ignore_check_constraints = ON", "foreign_keys = OFF"):
            connection.execute(f"PRAGMA {pragma}")
        for _ in range(draw.choice((1, 1, 4))):
            table = draw.choice(tables)
            columns = [name for _, name, *_ in connection.execute(f"PRAGMA table_info({table})")]
            which = draw.choice(("1", "id = 1", "rowid = 2"))
            with contextlib.suppress(sqlite3.Error):
                connection.execute(
                    f"UPDATE {table} SET {draw.choice(columns)} = {draw.choice(VALUES)} "
                    f"WHERE {which}"
                )


def rebuild(draw: random.Random, path: Path) -> None:
    """Change what the database is made of."""
    statements = (
        "DROP TABLE pins",
        "DROP TABLE measurements",
        "DROP TABLE checks | CREATE VIEW checks AS SELECT * FROM runs",
        "ALTER TABLE runs RENAME TO races",
        "ALTER TABLE measurements DROP COLUMN detail",
        "ALTER TABLE measurements DROP COLUMN source_hash | PRAGMA user_version = 1",
        "CREATE TRIGGER t BEFORE INSERT ON runs BEGIN SELECT raise(ABORT, 'no'); END",
        "PRAGMA user_version = 0",
        "PRAGMA user_version = 1",
        "PRAGMA user_version = 99",
        "PRAGMA application_id = 7",
        "DELETE FROM schedules",
        "DELETE FROM problems",
        "DROP INDEX measurements_identity",
    )
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in draw.choice(statements).split(" | "):
            connection.execute(statement)


KINDS = (flip, flip, flip, overwrite, overwrite, cut, spoil, spoil, rebuild)


def damaged(number: int, sound: Path, path: Path) -> random.Random:
    """Write the `number`-th damaged database; returns what chose it."""
    draw = random.Random(number)
    shutil.copyfile(sound, path)
    for end in ("-wal", "-shm", "-journal"):
        path.with_name(path.name + end).unlink(missing_ok=True)
    draw.choice(KINDS)(draw, path)
    if draw.random() < 0.1:
        with (
            contextlib.suppress(sqlite3.Error, UnicodeError),
            contextlib.closing(sqlite3.connect(path)) as connection,
        ):
            connection.execute("PRAGMA journal_mode = WAL")
    return draw


# What is done with it


def call(chip: str | None) -> None:
    """A call gets a kernel of ours with one of the schedules that the sound database has."""
    forget_kernels()
    kernel = metalgen.get_kernel(CONFIG, heads=4, q_len=128, device="simulator", chip=chip)
    assert kernel.backend == "metalgen"
    assert kernel.schedule in (DEFAULT, FIRST, SECOND, THIRD)
    assert kernel.explain()


COMMANDS = (
    "show",
    "show --json --chip M3Max",
    "doctor",
    "doctor --json",
    "explain --chip M3Max --device simulator *",
    "explain --json --device simulator *",
    "render --chip M3Max *",
    "db stats",
    "db stats --json",
    "db show *",
    "db show --json *",
    "db export",
    "db export --verified @out.jsonl",
    "db export --contribute @records",
    "db import @good.jsonl",
    "db import --dry-run @good.jsonl",
    "db refresh",
    "db refresh --dry-run --json",
    "db prune --modelled",
    "db unpin *",
    "db pin --schedule {} *",
    "db study -o @study.log",
    "db verify @mine.db",
    "db diff @mine.db @sound.db",
    "db merge @other.db @mine.db",
    "report -o @report.html",
    "report -o @report.html @mine.db",
    "tune --chip M3Max --device simulator --trials 3 *",
    "tune --chip M3Max --dry-run *",
)


def words(line: str, folder: Path) -> list[str]:
    """A line of `COMMANDS` as arguments; files are in a folder."""
    found: list[str] = []
    for word in line.split():
        named = str(folder / word[1:]) if word.startswith("@") else word
        found += SIZES if word == "*" else [FIRST.key if word == "{}" else named]
    return found


def command(line: str, folder: Path) -> tuple[int, str]:
    """Run a command; its exit code is one that is documented, and a complaint is one line."""
    (folder / "study.log").unlink(missing_ok=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(words(line, folder))
    assert code in (0, 1, 2), line
    if code == 2:
        assert err.getvalue().startswith("metalgen: "), line
        assert err.getvalue().count("\n") == 1, (line, err.getvalue())
    if "--json" in line and code < 2:
        json.loads(out.getvalue())
    assert "Traceback" not in out.getvalue() + err.getvalue(), line
    return code, err.getvalue()


def try_damaged(sound: Path, folder: Path, numbers: range) -> dict[str, int]:
    """Use damaged databases in a call and in some commands each; exit codes of these, counted."""
    path = folder / "mine.db"
    (folder / "records").mkdir()
    shutil.copyfile(sound, folder / "sound.db")
    good = row(SECOND, 5e-3, problem=FORWARD, policy="q", template_hash=template_hash(SECOND))
    (folder / "good.jsonl").write_text(good.to_line() + "\n")
    counts: dict[str, int] = {"0": 0, "1": 0, "2": 0}
    for number in numbers:
        draw = damaged(number, sound, path)
        broken = path.read_bytes()
        try:
            lookup(
                FORWARD,
                get_chip("M3Max"),
                template_hashes(FORWARD.family, "metal"),
                shipped=folder / "none",
            )
            checked(CONFIG, FIRST, template_hash(FIRST))
            last_chip()
            assert path.read_bytes() == broken  # a look-up writes nothing
            call(draw.choice(("M3Max", "M3", None)))
            for line in draw.sample(COMMANDS, 2):
                if draw.random() < 0.5:
                    damaged(number, sound, path)
                code, _ = command(line, folder)
                counts[str(code)] += 1
        except Exception as error:
            error.add_note(f"damaged database {number}")
            raise
    return counts


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's database is in these tests."""
    path = tmp_path / "mine.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    return path


def test_calls_go_on_and_commands_end_in_one_line_whatever_is_damaged(
    sound: Path, mine: Path, quick_checks: None, tmp_path: Path
) -> None:
    counts = try_damaged(sound, tmp_path, range(SAMPLE))
    assert sum(counts.values()) == 2 * SAMPLE
    assert min(counts.values()) > SAMPLE / 20  # some files are harmless, some are refused


def rename_a_table(path: Path) -> None:
    """Give a table a name that is not UTF-8, as one damaged byte of the schema does."""
    data = path.read_bytes()
    assert data.count(b"CREATE TABLE schedules") == 1
    path.write_bytes(data.replace(b"CREATE TABLE schedules", b"CREATE TABLE \xffchedules"))


def test_a_name_that_is_not_text_is_a_miss_to_a_call_whose_numbers_are_right(
    sound: Path, mine: Path, the_simulator: str
) -> None:
    shutil.copyfile(sound, mine)
    rename_a_table(mine)
    with pytest.raises(UnreadableDatabase, match=r"mine\.db: damaged \(.*; move it away"):
        open_for_reading(mine)
    forget_kernels()
    kernel = metalgen.get_kernel(CONFIG, heads=4, q_len=9, device=the_simulator, chip="M3Max")
    assert "user database not used: tuning database" in kernel.explain()
    draw = np.random.default_rng(0)
    q, k, v = (draw.standard_normal((1, 4, 70, 64)).astype(np.float16) for _ in range(3))
    out = kernel(*map(mx.array, (q, k, v)))
    expected, _ = attention_float64(q, k, v, scale=0.125, causal=True)
    assert np.linalg.norm(np.array(out) - expected) < 1e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_name_that_is_not_text_is_one_line_to_every_command(
    line: str, sound: Path, mine: Path, quick_checks: None, tmp_path: Path
) -> None:
    shutil.copyfile(sound, mine)
    shutil.copyfile(sound, tmp_path / "sound.db")
    (tmp_path / "good.jsonl").write_text("")
    (tmp_path / "records").mkdir()
    rename_a_table(mine)
    before = mine.read_bytes()
    code, complaint = command(line, tmp_path)
    goes_on = line.split()[0] in ("explain", "render", "doctor") or (
        "tune" in line and "dry" in line
    )
    names_it_among_others = line.startswith(("db verify", "db diff", "db merge"))
    assert code == (0 if goes_on else 1 if names_it_among_others else 2)
    assert code != 2 or "mine.db" in complaint
    assert mine.read_bytes() == before


def _pipe(folder: Path) -> str:
    os.mkfifo(folder / "pipe")
    return str(folder / "pipe")


def _under_a_file(folder: Path) -> str:
    (folder / "file").touch()
    return str(folder / "file" / "t.db")


PLACES: dict[str, Callable[[Path], str]] = {
    "the home of nobody": lambda folder: "~no-such-user/tuning.db",
    "a name too long": lambda folder: str(folder / ("n" * 300)),
    "a file in a file": _under_a_file,
    "a pipe": _pipe,
    "a device": lambda folder: "/dev/null",
    "a folder": lambda folder: str(folder),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_where_no_database_can_be_is_a_miss_and_one_line(
    place: str, quick_checks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALGEN_DB", PLACES[place](tmp_path))
    call("M3Max")
    for line in ("show", "db stats", "explain *", "db unpin *", "doctor"):
        code, _ = command(line, tmp_path)
        assert code == 2 or line in ("show", "explain *", "doctor"), line


def test_a_name_that_is_not_text_is_opened_and_printed(
    sound: Path, quick_checks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / os.fsdecode(b"\xffmine.db")
    shutil.copyfile(sound, path)
    monkeypatch.setenv("METALGEN_DB", str(path))
    hit = lookup(
        FORWARD, get_chip("M3Max"), template_hashes(FORWARD.family, "metal"), shipped=tmp_path
    )
    assert hit is not None and hit.schedule == FIRST
    for line in ("show", "db stats", "db export", "doctor", "db unpin *", "report -o @r.html"):
        done = subprocess.run(
            [sys.executable, "-m", "metalgen", *words(line, tmp_path)],
            capture_output=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b""), line


@pytest.mark.slow
@pytest.mark.parametrize("begin", range(0, ALL, CHUNK))
def test_ten_thousand_damaged_databases_end_no_call_and_no_command(
    begin: int, sound: Path, mine: Path, quick_checks: None, tmp_path: Path
) -> None:
    try_damaged(sound, tmp_path, range(begin, begin + CHUNK))
