"""``metalgen db study``: what Optuna finds in the file."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from report_samples import (
    CONFIG,
    DEFAULT,
    HOSTILE,
    OTHER,
    PROBLEM,
    THIRD,
    database,
    final,
    modelled,
    records,
    row,
)

from metalgen.cli import main
from metalgen.errors import ArgumentError
from metalgen.families import Schedule, enumerate_valid, space
from metalgen.report.sources import read_sources
from metalgen.report.study import write_studies

NAME = f"M3Max measured {CONFIG} BH=32 1024x1024"


def studies(path: Path) -> dict[str, optuna.Study]:
    """The studies of a file, by name, as Optuna loads them."""
    if path.suffix == ".db":
        storage: object = RDBStorage(f"sqlite:///{path}")
    else:
        storage = JournalStorage(JournalFileBackend(str(path)))
    names = optuna.get_all_study_names(storage)  # type: ignore[arg-type]
    return {name: optuna.load_study(study_name=name, storage=storage) for name in names}  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["study.db", "study.log"])
def test_optuna_loads_every_row_as_a_trial_with_its_time_state_and_origin(
    tmp_path: Path, name: str
):
    race = {"default_seconds": 1.8e-3, "mlx_seconds": 1.5e-3}
    rows = [
        row(DEFAULT, 2e-3),
        row(THIRD, None, status="runtime", detail=HOSTILE),
        final(OTHER, 1.2e-3, error=1e-4, **race),
    ]
    notes = {PROBLEM.key: {"noise_floor": 0.0042}}
    source = database(tmp_path / "source.db", rows, notes)
    write_studies(tmp_path / name, read_sources([source]))
    found = studies(tmp_path / name)
    assert list(found) == [NAME]
    study = found[NAME]
    assert study.direction == optuna.study.StudyDirection.MINIMIZE
    assert study.metric_names == ["milliseconds"]
    first, second, third = study.trials
    assert [t.state for t in study.trials] == [
        TrialState.COMPLETE,
        TrialState.FAIL,
        TrialState.COMPLETE,
    ]
    assert (first.value, second.value, third.value) == (
        pytest.approx(2.0),
        None,
        pytest.approx(1.2),
    )
    assert second.user_attrs["detail"] == HOSTILE and second.user_attrs["status"] == "runtime"
    assert third.user_attrs == {
        "schedule": str(OTHER),
        "provenance": "measured",
        "phase": "final",
        "status": "ok",
        "verified": True,
        "spread_milliseconds": pytest.approx(0.018),
        "samples": 3,
        "error": 1e-4,
        "software": "metalgen 0.1.0, MLX 0.32.4, macOS 26.1",
    }
    assert third.datetime_start == datetime(2026, 11, 21, 8)
    attributes = study.user_attrs
    assert attributes["problem"] == PROBLEM.key and attributes["chip"] == "M3Max"
    assert attributes["winner"] == str(OTHER) and attributes["winner_verified"] is True
    assert attributes["default_milliseconds"] == pytest.approx(1.8)
    assert attributes["mlx_milliseconds"] == pytest.approx(1.5)
    assert attributes["noise_floor"] == 0.0042


def test_the_parameters_are_those_of_the_declared_space(tmp_path: Path):
    valid = enumerate_valid(CONFIG)[::40]
    rows = [row(s, 1e-3 + 1e-6 * n) for n, s in enumerate(valid)]
    write_studies(tmp_path / "s.log", read_sources([records(tmp_path / "r.jsonl", rows)]))
    study = studies(tmp_path / "s.log")[NAME]
    declared = space(CONFIG, math_modes=("safe", "fast"))
    choices = {p.name: p.choices for p in declared.parameters}
    by_name = {str(s): s for s in valid}
    assert len(study.trials) == len(valid) > 90
    for trial in study.trials:
        schedule = by_name[trial.user_attrs["schedule"]]
        assert "outside_space" not in trial.user_attrs
        for name, distribution in trial.distributions.items():
            if isinstance(distribution, CategoricalDistribution):
                assert distribution.choices == choices[name]
            else:
                assert isinstance(distribution, IntDistribution)
                ends = choices[name][0], choices[name][-1]
                assert (distribution.low, distribution.high) == ends
            assert trial.params[name] == getattr(schedule, name)
        # Conditional: where nothing is staged there is nothing to choose of slices and buffers.
        staged = "threadgroup" in (schedule.k_source, schedule.v_source)
        assert ("buffers" in trial.params) == staged
        assert {"row_blocks", "simdgroups", "bk", "q_source", "load_width"} <= trial.params.keys()
    assert study.best_trial.user_attrs["schedule"] == str(valid[0])
    evaluator = optuna.importance.PedAnovaImportanceEvaluator()
    assert optuna.importance.get_param_importances(study, evaluator=evaluator)


def test_a_pruned_row_is_a_pruned_trial_with_what_was_seen(tmp_path: Path):
    first, second = enumerate_valid(CONFIG)[:2]
    rows = [row(first, 1e-3), row(second, 2e-3, status="pruned", samples=(1.9e-3, 2e-3, 2.1e-3))]
    write_studies(tmp_path / "s.log", read_sources([records(tmp_path / "r.jsonl", rows)]))
    states = {t.user_attrs["schedule"]: t for t in studies(tmp_path / "s.log")[NAME].trials}
    assert states[str(first)].state == optuna.trial.TrialState.COMPLETE
    assert states[str(second)].state == optuna.trial.TrialState.PRUNED
    assert states[str(second)].intermediate_values == pytest.approx({0: 1.9, 1: 2.0, 2: 2.1})


def test_a_schedule_outside_the_declared_space_keeps_its_time(tmp_path: Path):
    odd = Schedule(bq=24, bk=16, bd=64, simdgroups=3)
    write_studies(
        tmp_path / "s.log", read_sources([records(tmp_path / "r.jsonl", [row(odd, 2e-3)])])
    )
    [trial] = studies(tmp_path / "s.log")[NAME].trials
    assert trial.params == {} and trial.user_attrs["outside_space"] is True
    assert trial.value == pytest.approx(2.0)


def test_measured_and_modelled_rows_and_other_policies_are_studies_of_their_own(tmp_path: Path):
    rows = [
        row(OTHER, 1e-3),
        row(OTHER, 2e-3, policy='{"mlx":"0.33"}'),
        modelled(OTHER, 3e-3),
        row(OTHER, 4e-3, template_hash="0123456789abcdef"),
        row(OTHER, 5e-3, chip="M1", cores=8),
    ]
    write_studies(tmp_path / "s.log", read_sources([records(tmp_path / "r.jsonl", rows)]))
    found = {name: study.trials[0].value for name, study in studies(tmp_path / "s.log").items()}
    assert sorted(found) == sorted(
        [
            NAME,
            NAME + " #2",
            NAME.replace("measured", "modelled"),
            NAME + " templates 0123456789abcdef",
            NAME.replace("M3Max", "M1"),
        ]
    )
    assert sorted(found.values()) == pytest.approx([1, 2, 3, 4, 5])
    assert found[NAME.replace("measured", "modelled")] == pytest.approx(3)


def test_the_command_says_how_to_open_what_it_wrote(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = records(tmp_path / "r.jsonl", [row(OTHER, 1e-3), row(THIRD, None, status="compile")])
    for name, url in (("a b.db", "'sqlite:///{}'"), ("s.log", "{}")):
        path = tmp_path / name
        with pytest.raises(SystemExit) as stop:
            main(["db", "study", str(source), "-o", str(path)])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert out == f"{path}: 1 study of 2 trials\n  optuna-dashboard {url.format(path)}\n"
    with pytest.raises(SystemExit):
        main(["db", "study", str(source), "-o", str(tmp_path / "j.log"), "--json"])
    document = json.loads(capsys.readouterr().out)
    assert document == {"file": str(tmp_path / "j.log"), "studies": {NAME: 2}, "left_out": 0}


def test_no_file_is_ever_overwritten_and_bad_input_leaves_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = database(tmp_path / "source.db", [row(dataclasses.replace(OTHER), 1e-3)])
    before, data = sorted(tmp_path.iterdir()), source.read_bytes()
    for arguments, expected in (
        ((source, "-o", source), "--output: expected a new file"),
        ((source, "-o", tmp_path), "--output: expected a file in a folder that exists"),
        ((source, "-o", tmp_path / "no" / "s.db"), "a file in a folder that exists"),
        ((tmp_path / "none", "-o", tmp_path / "s.db"), "does not exist"),
        ((source, "-o", tmp_path / "s.db", "--chip", "M1"), "--chip: expected a chip with rows"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["db", "study", *map(str, arguments)])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert expected in err and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before and source.read_bytes() == data
    with pytest.raises(ArgumentError, match="a new file"):
        write_studies(source, read_sources([source]))
