"""``metalgen verify``: what it proves, what it finds, and the file that it leaves."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from metalgen.cli.app import run
from metalgen.devices import Runner, get_device
from metalgen.devices.reference import ReferenceDevice
from metalgen.errors import DeviceError
from metalgen.families import Schedule
from metalgen.problem.config import AttentionConfig
from metalgen.testing.cases import BY_TILES, DTYPES, FEATURES
from metalgen.verification import items, running
from metalgen.verification.running import verify_device
from metalgen.verification.workers import side_by_side


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))
    monkeypatch.chdir(tmp_path)


class Wrong(ReferenceDevice):
    """Plain MLX, but windows are one key too wide."""

    def build(self, config: AttentionConfig, schedule: Schedule | None = None) -> Runner:
        if config.window_left is None:
            return super().build(config, schedule)
        from dataclasses import replace

        wide = super().build(replace(config, window_left=config.window_left + 1), schedule)
        return wide


class Fragile(Wrong):
    """As `Wrong`; sinks end the process, biases hang, and ALiBi fails."""

    def build(self, config: AttentionConfig, schedule: Schedule | None = None) -> Runner:
        if config.sinks:
            os._exit(7)
        if config.bias and config.softcap is None:
            time.sleep(600)
        if config.alibi:
            raise RuntimeError("no such instruction")
        return super().build(config, schedule)


def test_every_feature_type_and_family_is_checked() -> None:
    report = verify_device(get_device("reference"))
    assert not report.faults
    assert len(report.outcomes) == report.total
    names = {outcome.name for outcome in report.outcomes}
    for feature in FEATURES:
        assert any(name.startswith(f"{feature} (") for name in names)
    for dtype in DTYPES:
        for family in ("forward", "decode"):
            assert {f"{dtype} D=64, {family}", f"{dtype} D=128, {family}"} <= names
    assert {outcome.group for outcome in report.outcomes} == {"types", "features", "functions"}
    assert all(outcome.error is not None for outcome in report.outcomes)


def test_a_wrong_device_is_found_and_named() -> None:
    report = verify_device(Wrong())
    every = FEATURES | BY_TILES
    expected = {name for name, fields in every.items() if "window_left" in fields}
    assert {fault.name.partition(" (")[0] for fault in report.faults} == expected
    assert all("relative error" in fault.detail for fault in report.faults)


def test_a_kernel_that_does_not_run_is_a_fault_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(device: Any, config: AttentionConfig, schedule: Schedule) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(items, "verify", broken)
    report = verify_device(get_device("reference"))
    assert len(report.faults) == report.total
    assert {(f.status, f.detail) for f in report.faults} == {("runtime", "no such instruction")}


def test_worker_processes_find_the_same_as_this_one() -> None:
    shared, alone = (verify_device(Wrong(), jobs=jobs) for jobs in (2, 0))
    assert [(o.name, o.status) for o in shared.outcomes] == [
        (o.name, o.status) for o in alone.outcomes
    ]


def test_workers_are_as_many_as_there_are_processors_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for processors in (1, 2, 3, 4, 16, 64):
        monkeypatch.setattr("os.cpu_count", lambda count=processors: count)
        found.append(running.usual_workers(get_device("simulator")))
    assert found == [0, 0, 0, 2, 14, 16]
    assert running.usual_workers(get_device("reference")) == 0  # it compiles nothing


def test_a_kernel_that_ends_or_hangs_its_process_is_one_fault() -> None:
    todo = list(items.items(Fragile()))
    limited = side_by_side(Fragile(), todo, 2, time_limit=6.0)
    found = {todo[number].name: outcome for number, outcome in limited}
    assert len(found) == len(todo)
    for name, fields in FEATURES.items():
        (outcome,) = (o for n, o in found.items() if n.startswith(f"{name} (") and "forward" in n)
        if fields.get("sinks"):
            expected = ("runtime", "the process ended, with exit code 7")
        elif fields.get("bias") and "softcap" not in fields:
            expected = ("timeout", "it took more than 6 s")
        elif fields.get("alibi"):
            expected = ("runtime", "no such instruction")
        elif "window_left" in fields:
            expected = ("wrong", outcome.detail)
        else:
            expected = ("ok", "")
        assert (outcome.status, outcome.detail) == expected, name


def test_the_command_prints_a_verdict_and_keeps_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--device", "reference"]) == 0
    printed = capsys.readouterr().out
    assert "everything is right" in printed
    assert "plain MLX" in printed  # what computes calls there
    kept = json.loads(Path("metalgen-verify.json").read_text())
    assert kept["device"] == "reference"
    assert kept["faults"] == 0
    assert len(kept["outcomes"]) == kept["total"]
    assert kept["calls"]["softcap"]["backend"] == "plain"
    assert kept["installation"]["packages"]["mlx"] == mx.__version__


def test_faults_end_with_code_1_and_an_interruption_keeps_what_was_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("metalgen.devices.get_device", lambda name: Wrong())
    assert run(["verify", "--device", "reference"]) == 1
    assert "FAULTS FOUND" in capsys.readouterr().out
    outcome = running.outcome_of
    done: list[str] = []

    def interrupted(item: items.Item, device: Any) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(item.name)
        return outcome(item, device)

    monkeypatch.setattr(running, "outcome_of", interrupted)
    assert run(["verify", "--device", "reference", "--json"]) == 130
    kept = json.loads(Path("metalgen-verify.json").read_text())
    assert kept["interrupted"]
    assert [each["name"] for each in kept["outcomes"]] == done


def test_bad_input_is_refused_in_one_line_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("mine.json").write_text("{}")
    assert run(["verify", "-o", "mine.json"]) == 2
    assert "--output: expected a new file, or an earlier verification" in capsys.readouterr().err
    assert Path("mine.json").read_text() == "{}"
    with pytest.raises(DeviceError):
        get_device("metal")
    assert run(["verify", "--device", "metal"]) == 2
    assert "not available" in capsys.readouterr().err
    assert not Path("metalgen-verify.json").exists()
