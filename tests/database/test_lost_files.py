"""The file of a database is removed or replaced while a run writes to it: nothing of it is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from metalgen.calls.verify import Verification
from metalgen.chips import get_chip
from metalgen.cli.app import run
from metalgen.database import exchange
from metalgen.database.errors import DatabaseError
from metalgen.database.merging import merge_rows
from metalgen.database.rows import row_of_measurement
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.testing.rows import CONFIG, FIRST, HASH, PROBLEM, SECOND, THIRD, row
from metalgen.tuning.runner import tune

PASSED = Verification(True, 1e-4, 1e-3, "Lq=9", "")
SMALL = [Problem(AttentionConfig(head_dim=8), 2, 16, size, family="forward") for size in (16, 32)]


def remove(path: Path) -> None:
    """What ``rm tuning.db`` does."""
    path.unlink()


def remove_with_log(path: Path) -> None:
    """What ``rm tuning.db*`` does."""
    for each in path.parent.glob(path.name + "*"):
        each.unlink()


def replace(path: Path) -> None:
    """What ``mv other.db tuning.db`` does; the other one has a row of its own."""
    with Store.open(path.with_name("other.db")) as store:
        number = store.begin_run("M3", 0)
        store.add_measurement(row(chip="M3", cores=10, run=number))
    os.replace(path.with_name("other.db"), path)


def empty(path: Path) -> None:
    """What ``: > tuning.db`` does."""
    path.write_bytes(b"")


LOSSES: dict[str, Callable[[Path], None]] = {
    "removed": remove,
    "removed with its log": remove_with_log,
    "replaced": replace,
    "emptied": empty,
}


@contextlib.contextmanager
def lost(store: Store, moment: int, loss: Callable[[Path], None]) -> Iterator[None]:
    """Lose a store's file before its transaction of a number, or within it; counted in halves."""
    real, done = store.writing, 0

    @contextlib.contextmanager
    def writing() -> Iterator[None]:
        nonlocal done
        done += 1
        if done == moment:
            loss(store.path)
        with real():
            done += 1
            if done == moment:
                loss(store.path)
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "writing", writing)
        yield


def tuned(store: Store) -> list[Any]:
    """Tune two problems; the schedules that win."""
    report = tune(
        *(SMALL, get_chip("M3Max"), store),
        trials=6,
        checker=get_device("reference"),
        verify=lambda *_, **__: PASSED,
    )
    return [outcome.winner and outcome.winner.schedule for outcome in report.outcomes]


def held(path: Path) -> tuple[list[str], int, list[str | None]]:
    """Rows about M3Max without their dates, checks, and how runs about it ended."""
    with Store.open(path) as store:
        assert store.health()["integrity"] == "ok"
        rows = [dataclasses.replace(m, run="", created="") for m in store.measurements()]
        lines = sorted(m.to_line() for m in rows if m.chip == "M3Max")
        outcomes = [r.outcome for r in store.runs() if r.chip == "M3Max"]
        return lines, store.health()["rows"]["checks"], outcomes


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[Any]]:
    """What a run leaves whose file stays, and what won."""
    path = tmp_path_factory.mktemp("undisturbed") / "t.db"
    with Store.open(path) as store:
        winners = tuned(store)
    return held(path), winners


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("moment", range(3, 11))
def test_a_run_whose_file_is_lost_at_any_moment_leaves_what_it_leaves_otherwise(
    loss: str, moment: int, undisturbed: tuple[Any, list[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "t.db"
    expected, winners = undisturbed
    with Store.open(path) as store, lost(store, moment, LOSSES[loss]):
        assert tuned(store) == winners
    assert held(path) == expected
    (notice,) = store.notices
    word = "removed" if loss.startswith("removed") else "replaced"
    assert notice.startswith(f"{path} was {word} while it was in use; ")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["t.db"]
    with Store.open(path) as store:
        others = [m for m in store.measurements() if m.chip == "M3"]
    assert len(others) == (loss == "replaced")


@pytest.mark.parametrize("foreign", ["text", "folder", "newer"])
def test_what_took_the_place_of_the_file_and_is_not_ours_is_left_alone(
    foreign: str, tmp_path: Path
) -> None:
    path = tmp_path / "t.db"
    with Store.open(path) as store:
        number = store.begin_run("M3Max", 0)
        store.add_measurement(row(FIRST, run=number))
        remove_with_log(path)
        if foreign == "text":
            path.write_text("a text")
        elif foreign == "folder":
            path.mkdir()
        else:
            Store.open(path).close()
            with contextlib.closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA user_version = 99")
        before = path.read_bytes() if path.is_file() else None
        store.add_measurement(row(SECOND, run=number))
    assert (path.read_bytes() if path.is_file() else None) == before
    kept = tmp_path / "t-kept.db"
    assert store.path == kept
    (notice,) = store.notices
    happened = "was replaced while it was in use; 2 commits of this run were written again"
    assert notice == f"{path} {happened} to {kept}."
    with Store.open(kept) as store:
        assert [m.schedule for m in store.measurements()] == [FIRST, SECOND]


def test_every_kind_of_commit_of_a_run_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with Store.open(path) as store:
        number = store.begin_run("M3Max", 7, {"trials": 3})
        store.add_measurements([row(FIRST, run=number), row(SECOND, run=number)])
        store.record_check(CONFIG, FIRST, HASH, "metal", "ok", error=1e-4, tolerance=1e-3)
        store.note_run(number, "noise", 0.5)
        merge_rows(store, [row_of_measurement(row(THIRD, samples=(1e-3,)))])
        store.end_run(number, "finished")
        before = store.measurements(), store.runs(), store.find_check(CONFIG, FIRST, HASH)
        remove(path)
    with Store.open(path) as store:
        assert (store.measurements(), store.runs()) == before[:2]
        assert store.find_check(CONFIG, FIRST, HASH) == before[2]
        assert [m.verified for m in store.measurements(PROBLEM)] == [True, False, False]
        assert store.runs()[0].notes == json.dumps({"noise": 0.5, "trials": 3})


def test_two_that_lost_the_same_file_come_together_in_one(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with Store.open(path) as a, Store.open(path) as b:
        runs = [store.begin_run("M3Max", 0) for store in (a, b)]
        a.add_measurement(row(FIRST, run=runs[0]))
        b.add_measurement(row(SECOND, run=runs[1]))
        remove(path)
        a.add_measurement(row(THIRD, run=runs[0]))
        b.end_run(runs[1], "finished")
    with Store.open(path) as store:
        assert {m.schedule for m in store.measurements()} == {FIRST, SECOND, THIRD}
        assert len(store.runs()) == 2
        assert store.health()["integrity"] == "ok"


def test_what_a_command_wrote_to_a_lost_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    source = tmp_path / "s.jsonl"
    source.write_text(row(FIRST).to_line() + "\n")
    store = Store.open(path)
    exchange.merge(store, [source])
    remove(path)
    with pytest.raises(DatabaseError, match="was removed while it was in use; what was written"):
        store.close()
    assert not path.exists()


def test_an_error_that_ends_a_run_is_heard_of_and_not_the_loss_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "t.db"
    with pytest.raises(KeyError), Store.open(path) as store:
        store.pin(PROBLEM, FIRST)
        remove(path)
        raise KeyError


def test_tune_says_that_its_file_was_removed_and_keeps_what_won(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "t.db"
    monkeypatch.setenv("METALGEN_DB", str(path))

    def verify(*_: Any, **__: Any) -> Verification:
        remove_with_log(path)
        return PASSED

    monkeypatch.setattr("metalgen.calls.verify.verify", verify)
    line = ["tune", "--chip", "M3Max", "--device", "simulator", "--trials", "5", "--q-len", "128"]
    assert run(line) == 0
    printed = capsys.readouterr().out
    assert f"Kept in {path}" in printed
    assert (
        f"{path} was removed while it was in use; 2 commits of this run were written again"
        in printed
    )
    assert run(["show", "--json"]) == 0
    (winner,) = json.loads(capsys.readouterr().out)["winners"]
    assert winner["chip"] == "M3Max"
    assert run([*line, "--head-dim", "128", "--json"]) == 0
    (notice,) = json.loads(capsys.readouterr().out)["notices"]
    assert "was removed while it was in use" in notice
