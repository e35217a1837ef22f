"""Tuning runs: what is stored when, what wins, what a stopped run keeps, and how it goes on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_runs import CHIP, DEFAULT, POLICY, SMALL, on_gpu
from tuning_fakes import Clock, FakeGpu, FakeVerify, cost

from metalgen.calls.check import CannotCheck, failure_status
from metalgen.chips import get_chip
from metalgen.chips.model import predict
from metalgen.database.lookup import lookup
from metalgen.database.measurement import Measurement, host
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.errors import ArgumentError, DeviceError, InvalidSchedule
from metalgen.families import Schedule, default_schedule, enumerate_valid
from metalgen.families.counts import forward_counts
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.simulator import errors as simulator
from metalgen.source.hashes import template_hashes
from metalgen.tuning.progress import Progress, Report
from metalgen.tuning.runner import tune

PROBLEMS = [SMALL, Problem(AttentionConfig(head_dim=8), 2, 32, 32, family="forward")]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "tuning.db") as opened:
        yield opened


def model(store: Store, verify: FakeVerify, problems: list[Problem], **arguments: Any) -> Report:
    """A run by the chip model, with checks on a device that is never asked for anything else."""
    return tune(problems, CHIP, store, checker=get_device("reference"), verify=verify, **arguments)


def by_prediction(problem: Problem) -> list[Schedule]:
    """All valid schedules by predicted time; within 1 % of the best by the bytes they read.

    But none that is slower than the default.
    """
    valid = enumerate_valid(problem.config, CHIP.limits)
    times = {s: predict(problem, s, CHIP).seconds for s in valid}
    best = min(times.values())
    default = times[default_schedule(problem.config)]
    stored = set(sorted(valid, key=lambda s: (times[s], s.key))[:64])

    def order(s: Schedule) -> tuple[bool, float, float, str]:
        counts = forward_counts(
            problem.config,
            s,
            batch_heads=problem.batch_heads,
            q_len=problem.q_len,
            kv_len=problem.kv_len,
        )
        near = s in stored and times[s] <= min(1.01 * best, default)
        return (
            not near,
            counts.q_read + counts.k_read + counts.v_read if near else 0,
            times[s],
            s.key,
        )

    return sorted(valid, key=order)


def read(m: Measurement) -> int:
    """Bytes that a schedule reads from the device."""
    p = m.problem
    sizes = {"batch_heads": p.batch_heads, "q_len": p.q_len, "kv_len": p.kv_len}
    return forward_counts(p.config, m.schedule, **sizes).device_read


# By the chip model


def test_the_model_ranks_everything_and_the_best_that_passes_its_check_wins(store: Store) -> None:
    verify = FakeVerify()
    report = model(store, verify, PROBLEMS)
    for problem, outcome in zip(PROBLEMS, report.outcomes, strict=True):
        ranked = by_prediction(problem)
        default = predict(problem, default_schedule(problem.config), CHIP).seconds
        assert outcome.winner is not None
        assert outcome.winner.schedule == ranked[0]
        assert outcome.winner.verified and outcome.winner.error == 2e-4
        assert outcome.default_seconds == default
        assert (outcome.valid, outcome.tried, outcome.new) == ((len(ranked),) * 3)
        rows = store.measurements(problem)
        stored = sorted(ranked[:64], key=lambda s: (predict(problem, s, CHIP).seconds, s.key))
        kept = dict.fromkeys([*stored, default_schedule(problem.config)])
        assert [m.schedule for m in rows] == list(kept)
        assert {m.provenance for m in rows} == {"modelled"}
        assert {m.device for m in rows} == {"model"}
        assert {m.default_seconds for m in rows} == {default}
        assert [m.seconds for m in rows] == [predict(problem, s, CHIP).seconds for s in kept]
        checked = {s for _, s in verify.asked}  # a check counts for all problems of a config
        assert {m.schedule for m in rows if m.verified} == checked & set(kept)
    assert (report.provenance, report.stopped, report.checks) == ("modelled", None, 2)


def test_no_winner_is_modelled_slower_than_the_default(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metalgen.database.winners.GRAIN", 1e6)  # so that bytes alone would decide
    problem = Problem(AttentionConfig(head_dim=128), 32, 128, 128, family="forward")
    verify = FakeVerify()
    report = tune([problem], get_chip("M1"), store, checker=get_device("reference"), verify=verify)
    winner, default = report.outcomes[0].winner, report.outcomes[0].default_seconds
    assert winner is not None and winner.seconds is not None and default is not None
    assert winner.seconds <= default
    rows = store.measurements(problem)
    bytes_read = {(m.seconds or 0.0) <= default: read(m) for m in sorted(rows, key=read)[::-1]}
    assert read(winner) == bytes_read[True] > bytes_read[False]  # least of either side


def test_a_modelled_winner_says_what_of_its_config_is_not_priced(store: Store) -> None:
    slopes = Problem(AttentionConfig(head_dim=8, alibi=True), 2, 16, 16)
    plain, other = model(store, FakeVerify(), [SMALL, slopes], trials=20).outcomes
    assert plain.winner and other.winner
    assert (plain.note, other.note) == ("", "the model ignores alibi=True")


def test_a_winner_can_be_looked_up_and_says_that_it_is_modelled(store: Store) -> None:
    report = model(store, FakeVerify(), [SMALL])
    hit = lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=store.path)
    assert hit is not None and report.outcomes[0].winner is not None
    assert hit.schedule == report.outcomes[0].winner.schedule
    assert (hit.place, hit.provenance) == ("user database, this chip", "modelled")


def test_a_wrong_candidate_is_recorded_as_wrong_and_the_next_best_takes_its_place(
    store: Store,
) -> None:
    ranked = by_prediction(SMALL)
    bad = set(ranked[:2])
    report = model(store, FakeVerify(lambda s: s in bad), [SMALL])
    (outcome,) = report.outcomes
    assert outcome.winner is not None and outcome.winner.schedule == ranked[2]
    assert [(r.schedule, r.status) for r in outcome.rejected] == [
        (ranked[0], "wrong"),
        (ranked[1], "wrong"),
    ]
    rows = {m.schedule: m for m in store.measurements(SMALL)}
    assert [rows[s].status for s in ranked[:4]] == ["wrong", "wrong", "ok", "ok"]
    assert [rows[s].verified for s in ranked[:4]] == [False, False, True, False]
    hit = lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=store.path)
    assert hit is not None and hit.schedule == ranked[2]


def test_a_run_that_is_repeated_ranks_and_checks_nothing_again(store: Store) -> None:
    first = model(store, FakeVerify(), PROBLEMS)
    before = store.measurements()
    again = FakeVerify()
    second = model(store, again, PROBLEMS)
    assert again.asked == []
    assert store.measurements() == before
    assert [o.winner for o in second.outcomes] == [o.winner for o in first.outcomes]
    assert [o.new for o in second.outcomes] == [0, 0]
    assert second.checks == 0


def test_one_check_serves_all_problems_of_a_config_and_schedule(store: Store) -> None:
    verify = FakeVerify()
    problems = [
        Problem(SMALL.config, 2, n, n, family="forward") for n in (16, 32, 64, 128, 2048, 4096)
    ]
    report = model(store, verify, problems)
    winners = {o.winner.schedule for o in report.outcomes if o.winner}
    assert sorted(s.key for _, s in verify.asked) == sorted(s.key for s in winners)
    assert report.checks == len(winners) < len(problems)


def test_another_version_of_the_model_replaces_its_predictions(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model(store, FakeVerify(), [SMALL])
    monkeypatch.setattr("metalgen.tuning.sessions.modelled.model_version", lambda: "another")
    report = model(store, FakeVerify(), [SMALL])
    rows = store.measurements(SMALL)
    assert {json.loads(m.policy)["model"] for m in rows} == {"another"}
    assert report.outcomes[0].new == len(enumerate_valid(SMALL.config))


def test_a_run_of_fewer_trials_takes_nothing_away(store: Store) -> None:
    best = model(store, FakeVerify(), [SMALL]).outcomes[0].winner
    assert best is not None
    few = model(store, FakeVerify(), [SMALL], trials=1).outcomes[0]
    assert few.tried == 1 and few.winner == best and best.schedule != DEFAULT
    hit = lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=store.path)
    assert hit is not None and hit.schedule == best.schedule


def test_after_eight_failures_a_problem_has_no_winner(store: Store) -> None:
    verify = FakeVerify(lambda s: True)
    report = model(store, verify, [SMALL])
    (outcome,) = report.outcomes
    assert outcome.winner is None
    assert outcome.note == "the best 8 failed their checks"
    assert len(verify.asked) == 8
    assert lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=store.path) is None


def test_without_anything_that_executes_there_is_no_winner_but_the_rows_are_kept(
    store: Store,
) -> None:
    report = tune([SMALL], CHIP, store)
    (outcome,) = report.outcomes
    assert outcome.winner is None
    assert outcome.note == "not checked: no device here executes kernels"
    assert len(store.measurements(SMALL)) in (64, 65)
    assert model(store, FakeVerify(), [SMALL]).outcomes[0].winner is not None


def test_a_device_that_cannot_check_leaves_no_verdict(store: Store) -> None:
    def broken(*arguments: Any, **_: object) -> Any:
        raise simulator.MissingToolchain("ziglang is not installed")

    report = model(store, broken, [SMALL])  # type: ignore[arg-type]
    assert report.outcomes[0].note == "not checked: ziglang is not installed"
    assert store.health()["rows"]["checks"] == 0


def test_trials_rank_the_default_and_a_seeded_choice(store: Store) -> None:
    report = model(store, FakeVerify(), [SMALL], trials=10, seed=3)
    rows = store.measurements(SMALL)
    assert (report.outcomes[0].tried, len(rows)) == (10, 10)
    assert default_schedule(SMALL.config) in {m.schedule for m in rows}
    assert {json.loads(m.policy)["seed"] for m in rows} == {3}


def test_progress_tells_valid_tried_best_default_and_time_left(store: Store) -> None:
    seen: list[tuple[Any, ...]] = []

    def observe(p: Progress) -> None:
        seen.append((p.number, p.phase, p.valid, p.tried, p.best is None, p.left is None))

    model(store, FakeVerify(), PROBLEMS, observe=observe)
    n = len(enumerate_valid(SMALL.config))
    assert seen[0] == (1, "ranking", n, 0, True, True)
    assert (1, "checking", n, n, False, True) in seen
    assert (1, "done", n, n, False, False) in seen
    assert seen[-1] == (2, "done", n, n, False, False)


def test_an_interrupted_run_keeps_its_problems_and_the_same_run_goes_on(store: Store) -> None:
    def interrupt(p: Progress) -> None:
        if p.number == 2:
            raise KeyboardInterrupt

    report = model(store, FakeVerify(), PROBLEMS, observe=interrupt)
    assert report.stopped == "interrupted"
    assert [o.problem for o in report.outcomes] == [SMALL]
    kept = store.measurements()
    assert {m.problem for m in kept} == {SMALL}
    resumed = model(store, FakeVerify(), PROBLEMS)
    assert resumed.stopped is None
    assert [o.new for o in resumed.outcomes] == [0, len(enumerate_valid(SMALL.config))]
    later = store.measurements()[: len(kept)]
    assert [(m.schedule, m.run, m.created) for m in later] == [
        (m.schedule, m.run, m.created) for m in kept
    ]
    outcomes = [row["outcome"] for row in store.db.query("SELECT outcome FROM runs ORDER BY rowid")]
    assert outcomes == ["interrupted", "finished"]


def test_a_spent_budget_stops_the_run_and_keeps_what_was_done(store: Store) -> None:
    clock = Clock()

    def observe(p: Progress) -> None:
        clock.now += 10.0 if p.phase == "done" else 0.0

    report = model(store, FakeVerify(), PROBLEMS, observe=observe, clock=clock, budget=5.0)
    assert report.stopped == "budget"
    assert [o.problem for o in report.outcomes] == [SMALL]


def test_a_run_that_breaks_is_recorded_as_failed(store: Store) -> None:
    def broken(p: Progress, **_: object) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        model(store, FakeVerify(), PROBLEMS, observe=broken)
    (run,) = store.db.query("SELECT outcome FROM runs")
    assert run == {"outcome": "failed"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trials": 0}, "trials: expected a positive whole number, but got 0"),
        ({"budget": -1.0}, "budget: expected seconds above 0, but got -1.0"),
        ({"budget": True}, "budget: expected seconds above 0, but got True"),
        ({"budget": float("nan")}, "budget: expected seconds above 0, but got nan"),
        ({"seed": -1}, "seed: expected a whole number from 0 to 2147483647, but got -1"),
        ({"seed": True}, "seed: expected a whole number from 0 to 2147483647, but got True"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(
    store: Store, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError) as caught:
        model(store, FakeVerify(), [SMALL], **arguments)
    assert str(caught.value) == message
    assert store.health()["rows"]["runs"] == 0


def test_a_run_takes_numbers_of_numpy_and_records_them_as_pythons(store: Store) -> None:
    numbers: dict[str, Any] = {
        "trials": np.int64(7),
        "seed": np.uint32(3),
        "budget": np.float32(600),
        "jobs": np.int8(0),
        "time_limit": np.int16(5),
    }
    model(store, FakeVerify(), [SMALL], **numbers)
    (run,) = store.runs()
    assert run.seed == 3
    assert json.loads(run.notes) | {"problems": []} == {
        "trials": 7,
        "budget": 600.0,
        "problems": [],
    }
    assert len(store.measurements()) == 7


# By a device's clock


def test_a_measured_search_races_the_best_against_the_default_and_mlx(store: Store) -> None:
    gpu = FakeGpu(Clock())
    report = on_gpu(store, gpu, FakeVerify(), trials=20)
    (outcome,) = report.outcomes
    search = store.measurements(SMALL, phase="search")
    assert len(search) == 20
    assert search[0].schedule == default_schedule(SMALL.config)
    for m in search:
        assert m.seconds == pytest.approx(cost(m.schedule), rel=0.01)
        assert m.default_seconds == pytest.approx(cost(search[0].schedule), rel=0.01)
        assert len(m.samples) == 3
        assert (m.provenance, m.device) == ("measured", "metal")
        assert json.loads(m.policy) == json.loads(POLICY.key) | {
            "mlx": host()["mlx_version"],
            "os": host()["os"].partition(".")[0],
        }
    best = sorted((m.schedule for m in search), key=cost)[:5]
    finals = store.measurements(SMALL, phase="final")
    assert {m.schedule for m in finals} == {*best, default_schedule(SMALL.config)}
    assert all(m.verified and m.mlx_seconds is not None for m in finals)
    assert outcome.winner is not None
    assert outcome.winner.schedule == best[0]
    assert outcome.default_seconds == pytest.approx(cost(search[0].schedule), rel=0.01)
    assert (report.provenance, outcome.tried, outcome.new) == ("measured", 20, 20)
    hit = lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=store.path)
    assert hit is not None
    assert (hit.schedule, hit.provenance, hit.exact) == (best[0], "measured", True)


def test_a_schedule_that_fails_is_kept_with_its_status_and_never_wins(store: Store) -> None:
    def fails(schedule: Schedule) -> Exception | None:
        if schedule.simdgroups == 8:
            return simulator.CompileError("error: no such thing\nmore", line=3)
        return RuntimeError("the launch failed") if schedule.simdgroups == 16 else None

    report = on_gpu(store, FakeGpu(Clock(), fails), FakeVerify(), trials=60)
    statuses = {
        (m.schedule.simdgroups, m.status, m.detail, m.seconds is None)
        for m in store.measurements(SMALL, phase="search")
        if m.schedule.simdgroups >= 8
    }
    assert statuses == {
        (8, "compile", "error: no such thing", True),
        (16, "runtime", "the launch failed", True),
    }
    winner = report.outcomes[0].winner
    assert winner is not None and winner.schedule.simdgroups < 8


def test_a_measured_winner_that_computes_wrongly_loses_to_the_next(store: Store) -> None:
    plain = on_gpu(store, FakeGpu(Clock()), FakeVerify(), trials=15).outcomes[0].winner
    assert plain is not None
    with Store.open(store.path.with_name("other.db")) as other:
        verify = FakeVerify(lambda s: s == plain.schedule)
        (outcome,) = on_gpu(other, FakeGpu(Clock()), verify, trials=15).outcomes
        assert outcome.winner is not None and outcome.winner.schedule != plain.schedule
        assert [r.schedule for r in outcome.rejected] == [plain.schedule]
        rows = {m.schedule: m.status for m in other.measurements(SMALL, phase="search")}
        assert rows[plain.schedule] == "wrong"


def test_a_measured_run_goes_on_where_it_was_interrupted_as_if_it_never_was(store: Store) -> None:
    with Store.open(store.path.with_name("undisturbed.db")) as other:
        on_gpu(other, FakeGpu(Clock()), FakeVerify(), trials=30)
        undisturbed = [m.schedule for m in other.measurements(SMALL, phase="search")]

    def interrupt(p: Progress) -> None:
        if p.tried == 22:
            raise KeyboardInterrupt

    report = on_gpu(store, FakeGpu(Clock()), FakeVerify(), trials=30, observe=interrupt)
    assert report.stopped == "interrupted"
    assert len(store.measurements(SMALL)) == 22
    gpu = FakeGpu(Clock())
    report = on_gpu(store, gpu, FakeVerify(), trials=30)
    assert report.outcomes[0].new == 8
    assert [m.schedule for m in store.measurements(SMALL, phase="search")] == undisturbed
    rest = undisturbed[22:]  # the best so far is built again, to watch for drift
    assert list(dict.fromkeys(s for s in gpu.built if s in rest)) == rest


def test_a_finished_measured_run_measures_nothing_again(store: Store) -> None:
    on_gpu(store, FakeGpu(Clock()), FakeVerify())
    before = store.measurements()
    gpu, verify = FakeGpu(Clock()), FakeVerify()
    report = on_gpu(store, gpu, verify)
    assert (gpu.built, verify.asked) == ([], [])
    assert store.measurements() == before
    assert report.outcomes[0].winner is not None


def test_another_mlx_measures_anew_and_starts_from_what_won_under_the_earlier_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = on_gpu(store, FakeGpu(Clock()), FakeVerify()).outcomes[0].winner
    later = host() | {"mlx_version": "99.0"}
    for module in ("session", "measured"):
        monkeypatch.setattr(f"metalgen.tuning.sessions.{module}.host", lambda: later)
    monkeypatch.setattr("metalgen.database.winners.host", lambda: later)
    stale = lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=store.path)
    assert stale is not None and stale.stale
    gpu = FakeGpu(Clock())
    report = on_gpu(store, gpu, FakeVerify(), trials=12)
    assert report.outcomes[0].new == 12
    assert before is not None
    assert gpu.built[:2] == [default_schedule(SMALL.config), before.schedule]
    fresh = lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=store.path)
    assert fresh is not None and fresh.exact and not fresh.stale


def test_what_won_by_other_templates_is_tried_first_also_from_shipped_records(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    default, *others = sorted(enumerate_valid(SMALL.config), key=lambda s: (s != DEFAULT, s.key))
    slow, quick, shipped = others[100:700:200]
    row = Measurement(
        *(SMALL, slow, "0" * 16, CHIP.name, CHIP.cores, "metal", "measured", "{}"),
        seconds=2e-3,
    )
    with_run = dataclasses.replace(row, run=store.begin_run(CHIP.name, 0))
    store.add_measurements(
        [
            with_run,
            dataclasses.replace(with_run, schedule=quick, seconds=1e-3),
            dataclasses.replace(with_run, schedule=others[5], seconds=None, status="runtime"),
        ]
    )
    final = dataclasses.replace(row, schedule=shipped, seconds=5e-3, phase="final")
    monkeypatch.setattr("metalgen.database.records.recorded", lambda problem, chips: [final])
    monkeypatch.setattr("metalgen.tuning.sessions.measured.borrowed_schedules", lambda *given: [])
    gpu = FakeGpu(Clock())
    on_gpu(store, gpu, FakeVerify(), trials=5)
    assert gpu.built[:4] == [default, shipped, quick, slow]  # a final outranks the rest


def test_measured_rows_outrank_modelled_ones_of_the_same_chip(store: Store) -> None:
    model(store, FakeVerify(), [SMALL])
    measured = on_gpu(store, FakeGpu(Clock()), FakeVerify()).outcomes[0].winner
    hit = lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=store.path)
    assert hit is not None and measured is not None
    assert (hit.schedule, hit.provenance) == (measured.schedule, "measured")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InvalidSchedule("bq", "no"), "invalid"),
        (simulator.CompileError("no"), "compile"),
        (simulator.KernelTimeout("no"), "timeout"),
        (simulator.KernelCrash("no"), "runtime"),
        (simulator.Deadlock("no"), "runtime"),
        (RuntimeError("[metal::Device] Unable to build metal library from source"), "compile"),
        (ValueError("no"), "runtime"),
    ],
)
def test_a_failure_gets_the_status_of_its_cause(error: Exception, status: str) -> None:
    assert failure_status(error) == status


@pytest.mark.parametrize(
    "error",
    [
        DeviceError("gone"),
        simulator.MissingToolchain("gone"),
        simulator.MemoryLimit("gone"),
        simulator.WorkerLost("gone"),
    ],
)
def test_a_failure_of_the_machine_is_no_verdict_about_a_kernel(error: Exception) -> None:
    with pytest.raises(CannotCheck, match="gone"):
        failure_status(error)


def test_the_runs_record_has_the_noise_floor_and_the_drift_of_the_best(store: Store) -> None:
    gpu = FakeGpu(Clock())
    report = on_gpu(store, gpu, FakeVerify(), trials=50)
    (row,) = store.db.query("SELECT notes FROM runs WHERE id = ?", [report.run])
    notes = json.loads(row["notes"])[SMALL.key]
    assert notes["noise_floor"] == 0.0
    assert len(notes["drift"]) == 2
    assert all(abs(change) < 1e-3 for change in notes["drift"])
    assert json.loads(row["notes"])["trials"] == 50


def test_the_default_races_even_where_earlier_rows_are_as_many_as_wanted(store: Store) -> None:
    default = default_schedule(SMALL.config)
    on_gpu(store, FakeGpu(Clock()), FakeVerify())
    store.db.execute(
        "DELETE FROM measurements WHERE schedule = (SELECT id FROM schedules WHERE key = ?)",
        [default.key],
    )
    gpu = FakeGpu(Clock())
    (outcome,) = on_gpu(store, gpu, FakeVerify(), trials=5).outcomes
    assert outcome.new == 1
    assert gpu.built[0] == default
    assert default in {m.schedule for m in store.measurements(SMALL, phase="final")}
    assert outcome.default_seconds is not None
