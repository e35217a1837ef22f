"""`metalgen tune` where the chip is here: helpers, limits and cache by its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tuning_fakes import SimulatedGpu

from metalgen.chips import get_chip
from metalgen.cli import tune as cli
from metalgen.cli.app import metalgen
from metalgen.cli.measuring import Measuring
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.errors import ArgumentError
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning import presets

SMALL = Problem(AttentionConfig(head_dim=8), 2, 16, 16, family="forward")


def run(*words: str) -> int:
    """The exit code of a command."""
    try:
        metalgen.main(list(words), prog_name="metalgen", standalone_mode=False)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_by_the_command_measures_in_helpers_under_the_policy_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = presets.Preset("small", (SMALL,))
    monkeypatch.setattr(presets, "preset", lambda name: chosen)
    monkeypatch.setattr(cli, "local_gpu", lambda: (get_chip("M3Max"), SimulatedGpu()))
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))
    seen: list[dict[str, Any]] = []
    arguments = Measuring.arguments
    monkeypatch.setattr(
        Measuring, "arguments", lambda *given: seen.append(arguments(*given)) or seen[-1]
    )
    words = ("--trials", "1", "--jobs", "1", "--time-limit", "100", "--cache", "warm", "--json")
    assert run("tune", *words) == 0
    assert [(found["jobs"], found["time_limit"]) for found in seen] == [(1, 100.0)]
    document = json.loads(capsys.readouterr().out)
    assert document["provenance"] == "measured"
    assert document["problems"][0]["winner"]["error"] < 1e-3
    with Store.open(tmp_path / "tuning.db", read_only=True) as store:
        rows = store.measurements()
    assert {json.loads(m.policy)["cache"] for m in rows} == {"warm"}
    assert {m.phase for m in rows} == {"search", "final"}


def test_without_options_the_standard_policy_and_some_helpers_are_used() -> None:
    gpu = SimulatedGpu()
    given = Measuring(None, None, None).arguments(gpu)
    assert given["policy"].cache == "cold"
    assert 1 <= given["jobs"] <= 8
    assert given["time_limit"] == 60.0
    assert Measuring(0, None, None).arguments(gpu)["jobs"] == 0
    assert Measuring(None, None, None).arguments(None) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--jobs", "2"),
            "jobs: expected none when times are predicted instead of measured, but got 2",
        ),
        (
            ("--cache", "warm"),
            "cache: expected none when times are predicted instead of measured, ",
        ),
        (("--time-limit", "9"), "time_limit: expected none when times are predicted "),
    ],
)
def test_options_about_measuring_are_refused_where_nothing_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, str], message: str
) -> None:
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))
    with pytest.raises(ArgumentError) as caught:
        run("tune", "--chip", "M3Max", "--device", "simulator", *words)
    assert str(caught.value).startswith(message)
    assert not (tmp_path / "tuning.db").exists()


def test_limits_that_cannot_be_are_refused() -> None:
    gpu = get_device("reference")
    with pytest.raises(ArgumentError, match="jobs: expected a whole number from 0 to 64"):
        Measuring(65, None, None).check(gpu)
    with pytest.raises(ArgumentError, match="time_limit: expected seconds, 1 or more"):
        Measuring(None, 0.0, None).check(gpu)


def test_a_shape_of_ones_own_is_measured_with_all_that_its_calls_bring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "local_gpu", lambda: (get_chip("M3Max"), SimulatedGpu()))
    monkeypatch.setenv("METALGEN_DB", str(tmp_path / "tuning.db"))
    fields = ("--with", "varlen", "--with", "page_size=8", "--with", "sinks")
    sizes = ("--head-dim", "8", "--heads", "2", "--q-len", "16", "--kv-len", "16")
    assert run("tune", *sizes, *fields, "--trials", "1", "--jobs", "0", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["problems"]
    assert found["winner"]["provenance"] == "measured"
    assert found["winner"]["error"] < 1e-3
    with Store.open(tmp_path / "tuning.db", read_only=True) as store:
        problems = {m.problem for m in store.measurements()}
    config = AttentionConfig(8, varlen=True, page_size=8, sinks=True)
    assert problems == {Problem(config, 2, 16, 16)}
