"""Tuning on a made-up CUDA machine, in one process: every failure is a row, or one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cuda_machine import CudaMachine, use_cuda

from metalgen.calls.check import CannotCheck
from metalgen.chips import get_chip
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.errors import DeviceError
from metalgen.families import Schedule, default_schedule, enumerate_valid
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.render import render
from metalgen.tuning.progress import Report
from metalgen.tuning.runner import tune
from metalgen.tuning.timing.measure import Policy
from metalgen.tuning.workers import executing
from metalgen.tuning.workers.executing import Here

CONFIG = AttentionConfig(16)
PROBLEM = Problem(CONFIG, 2, 128, 128)
POLICY = Policy(
    *("wall", "cold", 1, 0),
    warmup_seconds=0.001,
    repetitions=3,
    most_repetitions=3,
    sample_seconds=1e-6,
    rounds=2,
    most_rounds=2,
)
TRIALS = 6


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "tuning.db") as opened:
        yield opened


def tune_on(monkeypatch: pytest.MonkeyPatch, store: Store, machine: CudaMachine) -> Report:
    use_cuda(monkeypatch, machine)
    device = get_device("cuda")
    return tune([PROBLEM], get_chip("H200"), store, device=device, trials=TRIALS, policy=POLICY)


@pytest.fixture
def asked(tmp_path: Path) -> list[Schedule]:
    """What a search of `TRIALS` asks for, in order, where all is well."""
    with pytest.MonkeyPatch.context() as patch, Store.open(tmp_path / "other.db") as other:
        report = tune_on(patch, other, CudaMachine(CONFIG))
        rows = other.measurements(PROBLEM, phase="search")
    assert report.outcomes[0].winner is not None
    assert [m.status for m in rows] == ["ok"] * TRIALS
    return [m.schedule for m in rows]


def name_of(schedule: Schedule) -> str:
    return render(CONFIG, schedule).name


def by_schedule(store: Store) -> dict[Schedule, Measurement]:
    return {m.schedule: m for m in store.measurements(PROBLEM, phase="search")}


def test_what_does_not_compile_or_launch_is_a_row_that_says_why_and_the_search_goes_on(
    monkeypatch: pytest.MonkeyPatch, store: Store, asked: list[Schedule]
) -> None:
    nvrtc = (
        "Failed to compile kernel: k.cu(3): warning: unused\n\nk.cu(9): error: expected a ';'\n."
    )
    launch = "cuGraphAddKernelNode(&node, graph_, NULL, 0, &params) failed: invalid argument"
    broken = {name_of(asked[1]): nvrtc, name_of(asked[2]): launch}
    report = tune_on(monkeypatch, store, CudaMachine(CONFIG, broken=broken))
    rows = by_schedule(store)
    assert list(rows) == asked
    assert [m.status for m in rows.values()] == ["ok", "compile", "runtime", "ok", "ok", "ok"]
    assert rows[asked[1]].detail == (
        "Failed to compile kernel: k.cu(3): warning: unused; k.cu(9): error: expected a ';'"
    )
    assert rows[asked[2]].detail == launch
    assert all(rows[s].seconds is None for s in asked[1:3])
    winner = report.outcomes[0].winner
    assert winner is not None and winner.schedule not in asked[1:3]


def test_what_is_never_launched_is_a_failed_row_and_not_the_quickest(
    monkeypatch: pytest.MonkeyPatch, store: Store, asked: list[Schedule]
) -> None:
    silent = asked[1:5]
    machine = CudaMachine(CONFIG, unlaunched=tuple(map(name_of, silent)))
    report = tune_on(monkeypatch, store, machine)
    rows = by_schedule(store)
    assert [rows[s].status for s in asked] == ["ok", *["runtime"] * 4, "ok"]
    for schedule in silent:
        assert rows[schedule].detail == (
            "its output of one query and one key: all of it is NaN, as where nothing is launched"
        )
    winner = report.outcomes[0].winner
    assert winner is not None and winner.schedule in (asked[0], asked[5])


def test_where_every_kernel_fails_the_run_ends_without_a_winner_and_says_so(
    monkeypatch: pytest.MonkeyPatch, store: Store
) -> None:
    broken = {"metalgen": "cudaGraphLaunch(graph_exec, stream_) failed: out of resources"}
    report = tune_on(monkeypatch, store, CudaMachine(CONFIG, broken=broken))
    (outcome,) = report.outcomes
    assert outcome.winner is None
    assert outcome.note == "no schedule ran and passed its check"
    rows = store.measurements(PROBLEM)
    assert [m.status for m in rows] == ["runtime"] * TRIALS


def test_a_kernel_that_breaks_the_device_ends_the_run_and_no_other_kernel_is_blamed(
    monkeypatch: pytest.MonkeyPatch, store: Store, asked: list[Schedule]
) -> None:
    fault = "cudaStreamSynchronize(stream_) failed: an illegal memory access was encountered"

    def broken(device: object, when: str = "") -> None:
        raise DeviceError(f"the device 'cuda' does not work{when}: {fault}")

    machine = CudaMachine(CONFIG, broken={name_of(asked[2]): fault})
    monkeypatch.setattr(executing, "require_working", broken)
    with pytest.raises(CannotCheck) as caught:
        tune_on(monkeypatch, store, machine)
    assert str(caught.value) == (
        f"the device 'cuda' does not work any more, after a kernel failed ({fault}): {fault}"
    )
    assert [m.status for m in by_schedule(store).values()] == ["ok", "ok", "runtime"]
    monkeypatch.undo()
    report = tune_on(monkeypatch, store, machine)  # another process goes on behind it
    assert list(by_schedule(store)) == asked
    assert report.outcomes[0].new == 3


def test_every_schedule_that_is_tried_fits_the_smallest_gpu_that_is_supported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_cuda(monkeypatch, CudaMachine(CONFIG), (8, 6))
    device = get_device("cuda")
    for head_dim in (64, 256):
        config = AttentionConfig(head_dim)
        for schedule in enumerate_valid(config, device.limits)[::7]:
            source = render(config, schedule)
            assert source.shared_memory <= 99 * 1024
            assert source.threads <= 256


def test_building_tries_a_kernel_once_however_often_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = CudaMachine(CONFIG)
    use_cuda(monkeypatch, machine)
    device = get_device("cuda")
    here = Here(device, POLICY)
    schedule = default_schedule(CONFIG, device.limits)
    here.compile(PROBLEM, schedule)
    here.compile(PROBLEM, schedule)
    assert len(machine.launched) == 1
