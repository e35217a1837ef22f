"""``metalgen tune`` as a process on the simulator: whole, killed, interrupted, resumed."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.tuning.presets import preset

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None,
    reason="the simulator's compiler (ziglang) is not installed",
)

COMMAND = ["tune", "--chip", "M3Max", "--preset", "smollm2-135m", "--trials", "200"]
PROBLEMS = preset("smollm2-135m").problems


def start(database: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a metalgen process on a database."""
    return subprocess.Popen(
        [sys.executable, "-m", "metalgen", *arguments],
        env={**os.environ, "METALGEN_DB": str(database)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_after(process: subprocess.Popen[str], problem: int, number: int) -> tuple[str, str]:
    """Send a signal when the progress says that a problem is done; the rest of the output."""
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith(f"{problem}/{len(PROBLEMS)} "):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=120)
    return out, said + err


def rows(database: Path) -> list[Measurement]:
    """The committed rows."""
    with Store.open(database) as store:
        assert store.health()["integrity"] == "ok"
        return store.measurements()


def identity(measurements: list[Measurement]) -> list[tuple[str, str, str, float | None]]:
    """What may not change about a row once it is committed."""
    return [(m.problem.key, m.schedule.key, m.run, m.seconds) for m in measurements]


def test_a_killed_run_keeps_every_committed_row_and_the_same_command_goes_on(
    tmp_path: Path,
) -> None:
    database = tmp_path / "tuning.db"
    process = start(database, *COMMAND)
    stop_after(process, 3, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    kept = rows(database)
    done = {m.problem for m in kept if m.verified}
    assert done.issuperset(PROBLEMS[:3])

    process = start(database, *COMMAND, "--json")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    report = json.loads(out)
    assert [p["new"] for p in report["problems"]][:3] == [0, 0, 0]
    assert all(p["winner"] for p in report["problems"])
    after = rows(database)
    assert identity(after)[: len(kept)] == identity(kept)
    assert {m.problem for m in after if m.verified} == set(PROBLEMS)
    assert {m.provenance for m in after} == {"modelled"}
    # Undisturbed, the run ends with the same winners.
    process = start(tmp_path / "undisturbed.db", *COMMAND, "--json")
    undisturbed = json.loads(process.communicate(timeout=300)[0])
    assert [p["winner"] for p in undisturbed["problems"]] == [
        p["winner"] for p in report["problems"]
    ]


def test_an_interrupted_run_ends_with_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    database = tmp_path / "tuning.db"
    process = start(database, *COMMAND)
    out, err = stop_after(process, 2, signal.SIGINT)
    assert process.returncode == 130, err
    last = err.splitlines()[-1]
    assert last == (
        "metalgen: interrupted; everything that was finished is kept. To continue: metalgen tune "
        "--chip M3Max --preset smollm2-135m --trials 200"
    )
    assert "Traceback" not in err
    assert "times are MODELLED by the chip model, not measured" in out
    assert {m.problem for m in rows(database) if m.verified}.issuperset(PROBLEMS[:2])
    with Store.open(database, read_only=True) as store:
        (run,) = store.db.query("SELECT outcome, chip FROM runs")
    assert run == {"outcome": "interrupted", "chip": "M3Max"}


def test_two_runs_into_one_database_at_once_lose_nothing(tmp_path: Path) -> None:
    database = tmp_path / "tuning.db"
    chips = ("M1Max", "M3Max")
    processes = [
        start(database, "tune", "--chip", chip, "--preset", "smollm2-135m", "--trials", "100")
        for chip in chips
    ]
    for process in processes:
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    winners = {(m.chip, m.problem) for m in rows(database) if m.verified}
    assert winners == {(chip, problem) for chip in chips for problem in PROBLEMS}
