"""Tuning runs in which kernels, checks and problems fail: rows and notes, and the run goes on."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import CHIP, DEFAULT, POLICY, SMALL, on_gpu
from tuning_fakes import Clock, FakeGpu, FakeVerify, ProcessGpu

from metalgen.calls.check import CannotCheck
from metalgen.database.errors import DatabaseError
from metalgen.database.lookup import lookup
from metalgen.database.store import Store
from metalgen.families import Limits, Schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import template_hashes
from metalgen.tuning.runner import tune
from metalgen.tuning.sessions.measured import MeasuredSession
from metalgen.tuning.timing import racing
from metalgen.tuning.timing.measure import Bench
from metalgen.tuning.workers import executing


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "tuning.db") as opened:
        yield opened


def test_a_finalist_that_fails_in_the_race_is_a_row_and_the_others_race_without_it(
    store: Store,
) -> None:
    class Tiring(FakeGpu):
        """One of its kernels fails after some runs; it counts them."""

        def __init__(self, tires: Schedule | None = None, left: float = math.inf) -> None:
            super().__init__(Clock())
            self.tires, self.left = tires, left
            self.runs: Counter[Schedule] = Counter()

        def build(self, config: AttentionConfig, schedule: Schedule) -> Any:
            run = super().build(config, schedule)

            def tired(*call: Any) -> Any:
                self.runs[schedule] += 1
                if schedule == self.tires and self.runs[schedule] > self.left:
                    raise RuntimeError("the launch failed")
                return run(*call)

            return tired

    tireless = Tiring()
    plain = on_gpu(store, tireless, FakeVerify(), trials=15).outcomes[0].winner
    assert plain is not None
    tiring = Tiring(plain.schedule, tireless.runs[plain.schedule] - 2)
    with Store.open(store.path.with_name("other.db")) as other:
        report = on_gpu(other, tiring, FakeVerify(), trials=15)
        (outcome,) = report.outcomes
        finals = {m.schedule: m for m in other.measurements(SMALL, phase="final")}
        search = {m.schedule: m.status for m in other.measurements(SMALL, phase="search")}
        assert search[plain.schedule] == "ok"  # while it was measured alone
        assert finals[plain.schedule].status == "runtime"
        assert finals[plain.schedule].detail == "the launch failed"
        assert outcome.winner is not None and outcome.winner.schedule != plain.schedule
        assert len([m for m in finals.values() if m.status == "ok"]) == 4
        hit = lookup(SMALL, CHIP, template_hashes(SMALL.family, "metal"), database=other.path)
        assert hit is not None and hit.schedule == outcome.winner.schedule
        gpu = FakeGpu(Clock())
        (again,) = on_gpu(other, gpu, FakeVerify(), trials=15).outcomes
        assert again.winner == outcome.winner
        assert gpu.built == []


def test_where_mlxs_own_attention_has_no_room_the_others_race_without_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*call: object) -> Any:
        raise RuntimeError("[malloc] Unable to allocate 17179869184 bytes.")

    monkeypatch.setattr(racing, "mlx_baseline", lambda problem: no_room)
    (outcome,) = on_gpu(store, FakeGpu(Clock()), FakeVerify(), trials=5).outcomes
    assert outcome.winner is not None and outcome.winner.mlx_seconds is None
    finals = store.measurements(SMALL, phase="final")
    assert len(finals) == 5 and {m.status for m in finals} == {"ok"}


def test_a_default_that_computes_wrongly_is_nothing_to_compare_with(store: Store) -> None:
    report = on_gpu(store, FakeGpu(Clock()), FakeVerify(lambda s: s == DEFAULT), trials=15)
    (outcome,) = report.outcomes
    assert [(r.schedule, r.status) for r in outcome.rejected] == [(DEFAULT, "wrong")]
    finals = store.measurements(SMALL, phase="final")
    assert len(finals) == 5 and DEFAULT not in {m.schedule for m in finals}
    assert {m.default_seconds for m in finals} == {None}
    assert outcome.winner is not None and outcome.default_seconds is None


def test_a_problem_that_the_chip_has_no_room_for_does_not_keep_others_from_being_tuned(
    store: Store,
) -> None:
    large = Problem(AttentionConfig(head_dim=256), 2, 128, 128)

    class Tiny(FakeGpu):
        limits = Limits(512)

    gpu = Tiny(Clock())
    fields = {"device": gpu, "trials": 5, "policy": POLICY, "clock": gpu.clock}
    report = tune([large, SMALL], CHIP, store, verify=FakeVerify(), **fields)  # type: ignore[arg-type]
    assert [o.winner is not None for o in report.outcomes] == [False, True]
    assert report.outcomes[0].note.startswith("invalid schedule (default): no default schedule for")
    assert {m.problem for m in store.measurements()} == {SMALL}


@pytest.mark.parametrize("jobs", [0, 1])
def test_arrays_that_do_not_fit_the_device_leave_a_problem_out_and_others_go_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    large = Problem(AttentionConfig(head_dim=16), 2, 16, 16, family="forward")
    default = default_schedule(large.config)
    gpu = ProcessGpu(tmp_path / "log", {default.key: "full run"} if jobs else {})

    class Full(Bench):
        """There is no room for the arrays of one problem."""

        def __init__(self, problem: Problem, *others: Any) -> None:
            if problem == large:
                raise RuntimeError("[malloc] Unable to allocate 1 byte.")
            super().__init__(problem, *others)

    monkeypatch.setattr(executing, "Bench", Full)
    policy = dataclasses.replace(POLICY, warmup_seconds=0.0, most_repetitions=3, most_rounds=2)
    report = tune(
        *([large, SMALL], CHIP, store),
        device=gpu,
        trials=2,
        policy=policy,
        verify=FakeVerify(),
        jobs=jobs,
    )
    first, second = report.outcomes
    assert first.winner is None and second.winner is not None
    expected = f"cannot make the arrays of {large}: [malloc] Unable to allocate 1 byte."
    assert first.note == ("no room in a helper" if jobs else expected)
    assert {m.problem for m in store.measurements()} == {SMALL}


def test_a_check_that_finds_no_memory_leaves_no_verdict(store: Store) -> None:
    def full(*arguments: Any, **_: object) -> Any:
        raise RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory")

    with pytest.raises(CannotCheck, match="no memory to check a kernel: cudaMallocAsync"):
        on_gpu(store, FakeGpu(Clock()), full, trials=3)  # type: ignore[arg-type]
    assert store.health()["rows"]["checks"] == 0
    assert on_gpu(store, FakeGpu(Clock()), FakeVerify(), trials=3).outcomes[0].winner is not None


def test_whatever_ends_a_run_its_executor_and_its_session_are_closed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[str] = []

    def ends(self: object) -> None:
        closed.append(type(self).__name__)
        raise RuntimeError("a defect at the end")

    monkeypatch.setattr(executing.Here, "close", ends)
    monkeypatch.setattr(MeasuredSession, "close", ends)
    with pytest.raises(RuntimeError, match="a defect at the end"):
        on_gpu(store, FakeGpu(Clock()), FakeVerify(), trials=2)
    assert closed == ["MeasuredSession", "Here"]
    closed.clear()

    def refused(*arguments: object) -> None:
        raise DatabaseError("t.db", "the disk is full")

    monkeypatch.setattr(store, "begin_run", refused)
    with pytest.raises(RuntimeError, match="a defect at the end"):
        on_gpu(store, FakeGpu(Clock()), FakeVerify(), trials=2)
    assert closed == ["MeasuredSession", "Here"]
