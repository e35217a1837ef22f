"""Rows that survive an edit of the templates: which are kept, and what becomes of the others."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import metalgen.resources
import metalgen.source.hashes
import metalgen.source.render
from metalgen.chips import get_chip
from metalgen.database import exchange
from metalgen.database.errors import DatabaseError
from metalgen.database.measurement import Measurement
from metalgen.database.refresh import (
    Refreshed,
    refresh_rows,
    refresh_store,
    refreshed_records,
)
from metalgen.database.store import Store
from metalgen.families import APPLE, Limits, Schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.resources import templates_dir, tuning_db_dir
from metalgen.source.digests import Present, _source_hash, code_of, source_hash
from metalgen.source.hashes import template_hash
from metalgen.testing.fuzz import made_up
from metalgen.testing.rows import CONFIG, FIRST, PROBLEM, SECOND, THIRD, modelled, row

OLD = "f" * 16
DECODE = Problem(CONFIG, 32, 1, 4096)
SPLIT = Schedule(bq=8, bk=SECOND.bk, bd=SECOND.bd, simdgroups=1, splits=4, family="decode")


def old(schedule: Schedule = FIRST, **changes: object) -> Measurement:
    """A row of other templates whose kernel is the same."""
    fields = {"template_hash": OLD, "source_hash": source_hash(CONFIG, schedule)} | changes
    return row(schedule, **fields)


def filled(path: Path, *rows: Measurement) -> Path:
    """A database with these rows."""
    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurements(dataclasses.replace(m, run=run) for m in rows)
    return path


@pytest.fixture
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the templates that the renderer uses; it forgets what it rendered before."""
    copy = tmp_path / "templates"
    shutil.copytree(templates_dir(), copy)

    def forget() -> None:
        metalgen.source.hashes._hash.cache_clear()
        metalgen.source.render._environment_of.cache_clear()

    monkeypatch.setattr(metalgen.resources, "templates_dir", lambda: copy)
    forget()
    yield copy
    monkeypatch.undo()
    forget()


def edit(templates: Path, name: str, old_text: str, new_text: str) -> None:
    """Change the first occurrence of a text in a template."""
    path = templates / name
    text = path.read_text()
    assert old_text in text
    path.write_text(text.replace(old_text, new_text, 1))
    stamp = path.stat().st_mtime + 10
    os.utime(path, (stamp, stamp))
    metalgen.source.hashes._hash.cache_clear()
    metalgen.source.render._environment_of.cache_clear()


# The source hash


def test_a_source_hash_belongs_to_one_kernel() -> None:
    seen = {
        source_hash(CONFIG, schedule)
        for schedule in (FIRST, SECOND, dataclasses.replace(FIRST, math_mode="fast"))
    }
    seen |= {
        source_hash(dataclasses.replace(CONFIG, softcap=cap), FIRST) for cap in (None, 30.0, 50.0)
    }
    seen |= {source_hash(CONFIG, SPLIT)}
    assert len(seen) == 6
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in seen)


@pytest.mark.parametrize("part", ["forward", "combine"])
def test_a_source_hash_covers_all_of_a_kernel_but_its_name(
    monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Of a call's second kernel, too."""
    rendered = metalgen.source.render.render
    schedule = FIRST if part == "forward" else SPLIT
    changes: dict[str, object] = {
        "name": "another", "header": "int x;", "source": "int x;", "inputs": ("x",),
        "outputs": ("x",), "math_mode": "fast", "threads": 7, "bq": 7, "shared_memory": 7,
    }  # fmt: skip
    assert changes.keys() == {
        f.name for f in dataclasses.fields(metalgen.source.render.KernelSource)
    }

    def digest(**changed: Any) -> str:
        def render(config: Any, schedule: Any, step: Any) -> Any:
            found = rendered(config, schedule, step)
            return dataclasses.replace(found, **changed) if step.name == part else found

        monkeypatch.setattr(metalgen.source.render, "render", render)
        _source_hash.cache_clear()
        return source_hash(CONFIG, schedule)

    plain = digest()
    found = {name: digest(**{name: value}) for name, value in changes.items()}
    _source_hash.cache_clear()
    assert {name for name, other in found.items() if other == plain} == {"name"}
    assert len(set(found.values())) == len(found)


def test_comments_names_and_spacing_are_not_code_and_texts_are() -> None:
    source = '/* a\n b */ int  x = 1; // why\n\n\t asm("a // b\\" c", \'"\');\n'
    assert code_of(source) == 'int x = 1;\nasm("a\\u0020//\\u0020b\\"\\u0020c", \'"\');'
    assert code_of('asm("a  b")') != code_of('asm("a b")')
    assert code_of("int x;") != code_of("int y;")


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("languages/metal/memory.jinja", "\n", "\n// A remark that every kernel carries.\n"),
        ("families/forward.jinja", "{#", "{# A remark to whoever reads the template. #}\n{#"),
        ("families/forward.jinja", "\n\n", "\n  \n\n"),
    ],
)
def test_an_edit_of_comments_or_spacing_keeps_every_row(
    templates: Path, tmp_path: Path, name: str, before: str, after: str
) -> None:
    was = template_hash(FIRST)
    rows = [row(s, template_hash=was, source_hash=source_hash(CONFIG, s)) for s in (FIRST, SECOND)]
    split = source_hash(CONFIG, SPLIT)
    rows.append(row(SPLIT, problem=DECODE, template_hash=template_hash(SPLIT), source_hash=split))
    edit(templates, name, before, after)
    assert template_hash(FIRST) != was
    found, counts = refresh_rows(rows, Present())
    assert counts == Refreshed(kept=3)
    assert found == [dataclasses.replace(m, template_hash=template_hash(m.schedule)) for m in rows]


def test_an_edit_of_comments_keeps_rows_of_a_cuda_chip_and_leaves_the_others_alone(
    templates: Path,
) -> None:
    h200 = get_chip("H200")
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    schedule = default_schedule(config, h200.limits)
    was = template_hash(schedule)
    measured = row(
        *(schedule, 1e-3),
        problem=dataclasses.replace(PROBLEM, config=config),
        chip="H200",
        cores=132,
        device="cuda",
        template_hash=was,
        source_hash=source_hash(config, schedule),
    )
    apple = row(template_hash=template_hash(FIRST), source_hash=source_hash(CONFIG, FIRST))
    edit(templates, "languages/cuda/copies.jinja", "\n", "\n// A remark in the CUDA header.\n")
    assert template_hash(schedule) != was
    found, counts = refresh_rows([measured, apple], Present())
    assert counts == Refreshed(current=1, kept=1)
    assert found[0].template_hash == template_hash(schedule)
    assert found[1] == apple
    edit(templates, "languages/cuda/copies.jinja", "\n", "\nstruct another {};\n")
    assert refresh_rows(found, Present())[1] == Refreshed(current=1, changed=1)


@pytest.mark.parametrize("limits", [APPLE, get_chip("H200").limits], ids=["metal", "cuda"])
def test_a_kernel_is_the_same_when_its_config_and_schedule_are_read_back(limits: Limits) -> None:
    seen = set()
    for number in range(20):
        case = made_up(number, limits)
        digests = {
            Present().source_hash(case.family, case.config.key, case.schedule.key, limits.language),
            source_hash(case.config, case.schedule),
        }
        assert len(digests) == 1 and None not in digests, case
        seen |= digests
    assert len(seen) == 20


def test_an_edit_of_one_step_loses_the_rows_that_run_it_and_keeps_the_others(
    templates: Path,
) -> None:
    """The combine step belongs to decode kernels of several splits only."""
    was, whole = template_hash(SPLIT), dataclasses.replace(SPLIT, splits=1)
    rows = [
        row(s, problem=DECODE, template_hash=was, source_hash=source_hash(CONFIG, s))
        for s in (SPLIT, whole)
    ]
    edit(templates, "families/combine.jinja", ";", "; int unused = 0;")
    found, counts = refresh_rows(rows, Present())
    assert counts == Refreshed(kept=1, changed=1)
    assert {m.schedule: m.template_hash for m in found} == {SPLIT: was, whole: template_hash(SPLIT)}


def test_a_kernel_that_can_no_longer_be_rendered_has_changed() -> None:
    broken = dataclasses.replace(FIRST, bq=8)
    hashes = {"template_hash": OLD, "source_hash": "0" * 16}
    rows = [row(broken, None, status="invalid", **hashes)]
    assert refresh_rows(rows, Present()) == (rows, Refreshed(changed=1))


# Databases


def test_a_refresh_keeps_rows_of_the_same_kernel_and_removes_none(tmp_path: Path) -> None:
    now = template_hash(FIRST)
    rows = [
        old(FIRST),
        old(SECOND, source_hash="0" * 16),
        row(THIRD, template_hash=OLD),
        row(SECOND, template_hash=now),
        modelled(FIRST, template_hash=now, source_hash=source_hash(CONFIG, FIRST)),
    ]
    path = filled(tmp_path / "t.db", *rows)
    with Store.open(path) as store:
        before = store.measurements()
        plan = refresh_store(store, Present(), dry_run=True)
        assert store.measurements() == before
        assert refresh_store(store, Present()) == plan
        after = store.measurements()
        again = refresh_store(store, Present())
    assert plan == Refreshed(current=2, filled=1, kept=1, changed=1, unknown=1)
    assert plan.rows == 5
    assert again == Refreshed(current=3, changed=1, unknown=1)
    hashes = [(m.template_hash, m.source_hash) for m in after]
    assert hashes == [
        (now, source_hash(CONFIG, FIRST)),
        (OLD, "0" * 16),
        (OLD, ""),
        (now, source_hash(CONFIG, SECOND)),
        (now, source_hash(CONFIG, FIRST)),
    ]
    assert [m.run for m in after] == [m.run for m in before]


def test_rows_of_one_measurement_are_joined_as_a_merge_joins_them(tmp_path: Path) -> None:
    a = old(samples=(1e-3, 2e-3), seconds=1.5e-3, mlx_seconds=4e-3)
    b = old(template_hash="e" * 16, samples=(5e-3,), seconds=5e-3, mlx_seconds=3e-3)
    c = dataclasses.replace(a, template_hash=template_hash(FIRST), samples=(3e-3,), seconds=3e-3)
    path = filled(tmp_path / "t.db", a, b, c)
    with Store.open(path) as store:
        assert refresh_store(store, Present()) == Refreshed(current=1, kept=2, joined=2)
        (found,) = store.measurements()
    expected = exchange.join(
        exchange.join(c, dataclasses.replace(a, template_hash=template_hash(FIRST))),
        dataclasses.replace(b, template_hash=template_hash(FIRST)),
    )
    assert expected.samples == (1e-3, 2e-3, 3e-3, 5e-3) and expected.mlx_seconds == 3e-3
    assert dataclasses.replace(found, run="") == expected
    assert refresh_rows([a, b, c], Present()) == (
        [expected],
        Refreshed(current=1, kept=2, joined=2),
    )


def test_checks_move_with_their_kernels_and_a_failure_outlives_a_pass(tmp_path: Path) -> None:
    now, digest = template_hash(FIRST), source_hash(CONFIG, FIRST)
    with Store.open(filled(tmp_path / "t.db", row(FIRST, template_hash=now))) as store:
        known = {"source_hash": digest}
        store.record_check(CONFIG, FIRST, OLD, "metal", "wrong", detail="no", error=0.5, **known)
        store.record_check(CONFIG, FIRST, now, "metal", "ok", error=1e-4, **known)
        store.record_check(CONFIG, SECOND, OLD, "metal", "ok", source_hash="0" * 16)
        assert store.measurements()[0].verified
        assert refresh_store(store, Present()) == Refreshed(current=1, filled=1, checks=1)
        check = store.find_check(CONFIG, FIRST, now, "metal")
        assert check is not None and (check.status, check.detail) == ("wrong", "no")
        assert store.find_check(CONFIG, FIRST, OLD) is None
        assert store.find_check(CONFIG, SECOND, OLD) is not None
        (m,) = store.measurements()
    assert (m.status, m.verified, m.detail, m.error) == ("wrong", False, "no", 0.5)


def test_a_kept_row_is_verified_where_its_kernel_passed_meanwhile(tmp_path: Path) -> None:
    with Store.open(filled(tmp_path / "t.db", old(FIRST), old(SECOND))) as store:
        store.record_check(CONFIG, FIRST, template_hash(FIRST), "metal", "ok", error=1e-4)
        refresh_store(store, Present())
        found = {m.schedule: (m.verified, m.error) for m in store.measurements()}
    assert found == {FIRST: (True, 1e-4), SECOND: (False, None)}


def test_only_the_problems_and_the_chip_that_were_asked_for_are_refreshed(tmp_path: Path) -> None:
    other = dataclasses.replace(PROBLEM, q_len=2048)
    rows = [old(), old(problem=other), old(chip="M1", cores=8)]
    with Store.open(filled(tmp_path / "t.db", *rows)) as store:
        assert refresh_store(store, Present(), problems=[PROBLEM], chip="M3Max") == Refreshed(
            kept=1
        )
        assert [m.template_hash == OLD for m in store.measurements()] == [False, True, True]


def test_a_refresh_that_fails_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with Store.open(filled(tmp_path / "t.db", old(FIRST), old(SECOND))) as store:
        before = store.measurements()
        monkeypatch.setattr(Store, "settle", full)
        with pytest.raises(DatabaseError):
            refresh_store(store, Present())
        assert store.measurements() == before


def test_a_row_that_changed_while_kernels_were_rendered_is_left_alone(tmp_path: Path) -> None:
    path = filled(tmp_path / "t.db", old(FIRST), old(SECOND), old(THIRD))

    class Slow(Present):
        """Another process refreshes the first row and removes the second one meanwhile."""

        def source_hash(self, family: str, config: str, schedule: str, language: str) -> str | None:
            with contextlib.closing(sqlite3.connect(path)) as other:
                other.execute("UPDATE measurements SET template_hash = ? WHERE id = 1", ["a" * 16])
                other.execute("DELETE FROM measurements WHERE id = 2")
                other.commit()
            return super().source_hash(family, config, schedule, language)

    with Store.open(path) as store:
        refresh_store(store, Slow())
        hashes = {m.schedule: m.template_hash for m in store.measurements()}
    assert hashes == {FIRST: "a" * 16, THIRD: template_hash(THIRD)}


def test_databases_and_record_files_come_to_the_same(tmp_path: Path) -> None:
    draw = random.Random(5)
    rows = {}
    for _ in range(60):
        schedule = draw.choice((FIRST, SECOND, THIRD))
        samples = tuple(draw.choice((1e-3, 2e-3, 3e-3)) for _ in range(3))
        m = row(
            *(schedule, sorted(samples)[1]),
            problem=dataclasses.replace(PROBLEM, q_len=draw.choice((512, 1024))),
            template_hash=draw.choice((OLD, "e" * 16, "d" * 16, template_hash(FIRST))),
            source_hash=draw.choice((source_hash(CONFIG, schedule), "0" * 16, "")),
            samples=tuple(sorted(samples)),
            verified=draw.random() < 0.5,
            created=f"2026-11-{draw.randint(10, 21)}T08:00:00Z",
        )
        rows[exchange.identity(m)] = m
    with Store.open(filled(tmp_path / "t.db", *rows.values())) as store:
        counts = refresh_store(store, Present())
        lines = list(exchange.export(store))
    found, expected = refresh_rows(rows.values(), Present())
    assert lines == sorted(m.to_line() for m in found)
    assert counts == expected
    assert 0 < counts.joined <= counts.kept and counts.changed and counts.unknown and counts.filled


# Record files


def test_a_record_file_is_refreshed_in_canonical_form(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    rows = [old(SECOND, samples=(2e-3, 1e-3)), old(FIRST), row(THIRD, template_hash=OLD)]
    path.write_text("".join(m.to_line() + "\n" for m in rows))
    text, counts = refreshed_records(path, Present())
    assert counts == Refreshed(kept=2, unknown=1)
    expected = [
        dataclasses.replace(m, template_hash=template_hash(FIRST)) for m in rows[:2]
    ] + rows[2:]
    assert text.splitlines() == sorted(exchange.canonical(m).to_line() for m in expected)


def test_a_record_file_with_a_bad_line_is_refused_whole(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(old().to_line() + "\n{}\n")
    with pytest.raises(DatabaseError, match="line 2: family: expected one of"):
        refreshed_records(path, Present())
    with pytest.raises(DatabaseError, match="does not exist"):
        refreshed_records(tmp_path / "none", Present())


def test_every_shipped_row_of_the_present_templates_is_of_the_kernel_that_renders_now() -> None:
    """A row that fails here was measured of another kernel: it must not be dispatched."""
    seen = 0
    for path in sorted(tuning_db_dir().glob("*.jsonl")):
        for line in path.read_text().splitlines():
            m = Measurement.from_line(line)
            if m.template_hash == template_hash(m.schedule):
                digest = source_hash(m.problem.config, m.schedule)
                assert m.source_hash == digest, (path.name, str(m.problem), str(m.schedule))
                seen += 1
    if not seen:
        pytest.skip("no shipped row is of the present templates")


def test_no_shipped_row_waits_for_a_refresh() -> None:
    """After an edit of templates: `metalgen db refresh tuning_db/*.jsonl`, in the same commit."""
    for path in sorted(tuning_db_dir().glob("*.jsonl")):
        text, counts = refreshed_records(path, Present())
        assert (path.name, counts.kept, counts.filled) == (path.name, 0, 0)
        assert text == path.read_text()


# The schema before


def older(path: Path, *rows: Measurement) -> Path:
    """A database of schema 1."""
    from sqlite_utils import Database

    from metalgen.database.schema import migrate

    filled(path.with_suffix(".new"), *rows)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        migrate(Database(connection, execute_plugins=False), 1)
        connection.execute("ATTACH ? AS new", [str(path.with_suffix(".new"))])
        for table in ("problems", "schedules", "runs", "measurements", "checks"):
            found = connection.execute(f"PRAGMA main.table_info({table})").fetchall()
            columns = ", ".join(column[1] for column in found)
            connection.execute(
                f"INSERT INTO main.{table} ({columns}) SELECT {columns} FROM new.{table}"
            )
        connection.commit()
    return path


def test_a_database_of_the_first_schema_is_read_as_it_is_and_brought_up_to_date_by_a_writer(
    tmp_path: Path,
) -> None:
    rows = [row(FIRST, samples=(1e-3,)), row(SECOND, 2e-3)]
    path = older(tmp_path / "t.db", *rows)
    before = path.read_bytes()
    with Store.open(path, read_only=True) as store:
        assert [dataclasses.replace(m, run="") for m in store.measurements()] == rows
        assert store.health()["unreadable_rows"] == 0
    summary = exchange.Summary()
    assert list(exchange.read(path, summary)) == rows and not summary.reasons
    with Store.open(tmp_path / "mine.db") as store:
        assert exchange.merge(store, [path]) == exchange.Summary(new=2)
    assert path.read_bytes() == before
    with Store.open(path) as store:
        assert store.db.execute("PRAGMA user_version").fetchone() == (3,)
        assert [dataclasses.replace(m, run="") for m in store.measurements()] == rows
    found = exchange.diff(path, tmp_path / "mine.db", exchange.Summary())
    assert (found.same, found.changed) == (2, [])


def test_a_database_that_says_the_first_schema_and_has_the_second_is_refused(
    tmp_path: Path,
) -> None:
    path = filled(tmp_path / "t.db", row())
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 1")
        connection.execute("PRAGMA journal_mode = DELETE")
    summary = exchange.Summary()
    assert list(exchange.read(path, summary)) == []
    assert "its table checks is not as metalgen made it" in summary.reasons[0][2]
