"""Storages where workers meet: what is refused, what is never shown, and the journal's lock."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import optuna
import pytest
from recorded_gpu import SMALL
from tuning_fakes import SimulatedGpu

from metalgen.chips import get_chip
from metalgen.cli import tune as command
from metalgen.cli.app import run as main
from metalgen.database.store import Store
from metalgen.errors import ArgumentError
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning import presets
from metalgen.tuning.runner import tune
from metalgen.tuning.study.storage import FileLock, StorageError, masked, open_storage
from metalgen.tuning.study.trials import Share


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host:5432/db", "postgresql://me:***@host:5432/db"),
        ("postgresql://me:se@cr:et/@host/db", "postgresql://me:***@host/db"),
        ("postgresql+psycopg://:secret@host/db", "postgresql+psycopg://:***@host/db"),
        ("postgresql://host/db?user=me&password=secret&x=1", "password=***&x=1"),
        ("postgresql://me:secret/db", "postgresql://me:***/db"),
        ("postgresql://host:5432/db", "postgresql://host:5432/db"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("journal:study.log", "journal:study.log"),
    ],
)
def test_a_password_is_masked_wherever_it_stands(url: str, shown: str) -> None:
    assert shown in masked(url)
    assert "secret" not in masked(url) and "cr:et" not in masked(url)
    assert "secret" not in repr(Share(url))


@pytest.mark.parametrize(
    "url", ["sqlite:///a.db", "mysql://me:secret@h/d", "a.db", "", "journal:", "postgresql://"]
)
def test_what_is_no_shared_storage_is_refused(url: str) -> None:
    with pytest.raises(ArgumentError, match="storage: expected postgresql://") as caught:
        open_storage(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_clear_error_without_the_password() -> None:
    pytest.importorskip("psycopg", reason="needs psycopg (metalgen[distributed])")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url in (
        f"postgresql://me:secret@127.0.0.1:{port}/db",
        "postgresql://me:secret/db",
        "postgresql://me:secret@host:port/db",
    ):
        with pytest.raises(StorageError, match=r"^storage postgresql://me:\*\*\*") as caught:
            open_storage(url)
        report = "".join(traceback.format_exception(caught.value))
        assert "\n" not in str(caught.value)
        assert "secret" not in report.replace('"postgresql://me:secret', "")


def test_a_wrong_password_is_not_shown(postgresql: str) -> None:
    wrong = postgresql.replace("tuner:", "tuner:wr0ng")
    with pytest.raises(StorageError, match="password authentication failed") as caught:
        open_storage(wrong)
    assert "wr0ng" not in "".join(traceback.format_exception(caught.value))


def test_a_folder_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="is a folder"):
        open_storage(f"journal:{tmp_path}")


def test_a_line_that_was_torn_is_cut_off_before_the_next_is_written(tmp_path: Path) -> None:
    journal = tmp_path / "j"
    storage = open_storage(f"journal:{journal}")
    study = storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], "a")
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code": 4, "wor')
    storage.create_new_trial(study)
    assert journal.read_bytes().startswith(whole + b"{")
    assert len(open_storage(f"journal:{journal}").get_all_trials(study)) == 1


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    (tmp_path / "j").touch()
    code = (
        "import sys, time; from pathlib import Path;"
        "from metalgen.tuning.study.storage import FileLock;"
        "lock = FileLock(Path(sys.argv[1])); lock.acquire();"
        "print('mine', flush=True); time.sleep(600)"
    )
    path = tmp_path / "j.lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"mine\n"
    lock, got = FileLock(path), threading.Event()
    waiting = threading.Thread(target=lambda: (lock.acquire(), got.set()))
    waiting.start()
    held = not got.wait(0.2)
    holder.kill()
    holder.communicate()
    assert held
    assert got.wait(10.0)
    waiting.join()
    lock.release()


def test_sharing_what_is_predicted_makes_no_sense(tmp_path: Path) -> None:
    with (
        Store.open(tmp_path / "t.db") as store,
        pytest.raises(ArgumentError, match="share: expected a device that measures"),
    ):
        tune([SMALL], get_chip("M3Max"), store, share=Share(f"journal:{tmp_path / 'j'}"))
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("study", ["", "x" * 101, "a\nb"])
def test_a_study_needs_a_name(study: str) -> None:
    with pytest.raises(ArgumentError, match="study: expected a name"):
        Share("journal:j", study)


@pytest.fixture
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tiny problem, on a GPU that is the simulator."""
    problem = Problem(AttentionConfig(head_dim=8), 2, 16, 16, family="forward")
    chosen = presets.Preset("small", (problem,))
    monkeypatch.setattr(presets, "preset", lambda name: chosen)
    monkeypatch.setattr(command, "local_gpu", lambda: (get_chip("M3Max"), SimulatedGpu()))


@pytest.mark.usefixtures("small_preset")
def test_two_runs_of_the_command_share_one_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found: list[Any] = []
    monkeypatch.setenv("METALGEN_STORAGE", f"journal:{tmp_path / 'study'}")
    for name in ("a", "b"):
        monkeypatch.setenv("METALGEN_DB", str(tmp_path / f"{name}.db"))
        words = ["tune", "--trials", "2", "--jobs", "0", "--study", "mine", "--json"]
        assert main(words) == 0
        (problem,) = json.loads(capsys.readouterr().out)["problems"]
        found.append(problem)
    assert [problem["new"] for problem in found] == [2, 0]
    assert found[0]["winner"] == found[1]["winner"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--storage", "mysql://me:secret@h/d"], "storage: expected postgresql://"),
        (["--study", "mine"], "study: expected none without --storage"),
        (["--storage", "journal:j", "--device", "simulator"], "none when times are predicted"),
        (["--storage", "postgresql://me:secret@h/d", "--chip", "M1Max"], "none when times are"),
        (["--storage", "journal:j", "--study", ""], "study: expected a name"),
    ],
)
@pytest.mark.usefixtures("small_preset")
def test_bad_options_are_one_line_without_a_password_and_nothing_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "t.db"))
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert message in err and "secret" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("small_preset")
def test_a_storage_named_in_the_environment_is_for_measuring_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "t.db"))
    monkeypatch.setenv("METALGEN_STORAGE", f"journal:{tmp_path / 'study'}")
    assert main(["tune", "--chip", "M1Max", "--trials", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["provenance"] == "modelled"
    assert not (tmp_path / "study").exists()


@pytest.mark.usefixtures("small_preset")
def test_the_command_to_go_on_with_does_not_show_the_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any, **options: Any) -> Any:
        from metalgen.tuning.progress import Report

        return Report("", "M3Max", "measured", stopped="interrupted")

    monkeypatch.setattr("metalgen.tuning.runner.tune", interrupted)
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "t.db"))
    assert main(["tune", "--storage", "postgresql://me:secret@h/d"]) == 130
    out, err = capsys.readouterr()
    assert "--storage 'postgresql://me:***@h/d'" in err and "secret" not in out + err
