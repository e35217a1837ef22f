"""Helper processes: they compile side by side, time one at a time, may crash, and never stay."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tuning_fakes import FakeVerify, ProcessGpu, events

from metalgen.chips import get_chip
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.errors import ArgumentError, DeviceError
from metalgen.families import Schedule, default_schedule, enumerate_valid
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.progress import BudgetSpent
from metalgen.tuning.runner import tune
from metalgen.tuning.timing.measure import Policy
from metalgen.tuning.workers.executing import KernelFailure, one_at_a_time
from metalgen.tuning.workers.helpers import Helpers, usual_jobs

SMALL = Problem(AttentionConfig(head_dim=8), 2, 16, 16, family="forward")
VALID = enumerate_valid(SMALL.config)
POLICY = Policy(
    *("wall", "cold", 1, 0),
    warmup_seconds=0.001,
    repetitions=3,
    most_repetitions=3,
    sample_seconds=1e-6,
    rounds=2,
    most_rounds=2,
)
A, B, C, D, E, F = VALID[:6]

Make = Callable[..., Helpers]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes helpers on a `ProcessGpu`, and ends them."""
    made: list[Helpers] = []

    def start(
        trouble: dict[Schedule, str] | None = None, count: int = 2, **given: float
    ) -> Helpers:
        own = {name: given.pop(name) for name in ("time_limit", "deadline") if name in given}
        kinds = {schedule.key: kind for schedule, kind in (trouble or {}).items()}
        gpu = ProcessGpu(tmp_path / "log", kinds, **given)  # type: ignore[arg-type]
        made.append(Helpers(gpu, POLICY, count, lock=tmp_path / "lock", **own))
        return made[-1]

    yield start
    for helpers in made:
        helpers.close()


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    if not Path("/proc/self/stat").exists():  # macOS
        command = ["ps", "-o", "stat=", "-p", str(pid)]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return bool(found.strip()) and not found.startswith("Z")
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def failure(helpers: Helpers, schedule: Schedule) -> tuple[str, str]:
    """How measuring fails."""
    with pytest.raises(KernelFailure) as caught:
        helpers.measure(SMALL, schedule)
    return caught.value.status, str(caught.value)


def test_kernels_are_built_side_by_side_and_timed_one_at_a_time(make: Make, tmp_path: Path) -> None:
    helpers = make({A: "meet build", B: "meet build"})  # would wait for ever, one after another
    order = [A, B, C, D]
    for n, schedule in enumerate(order):
        helpers.prepare(SMALL, order[n:])
        assert len(helpers.measure(SMALL, schedule).samples) == 3
    done = events(tmp_path / "log")
    builds = [event for event in done if event[1] == "build"]
    assert sorted(event[4] for event in builds) == sorted(s.key for s in order)  # once each
    assert len({event[0] for event in builds}) == 2
    runs = [event for event in done if event[1] == "run"]
    assert [key for key, _ in itertools.groupby(runs, lambda event: event[4])] == [
        s.key for s in order
    ]
    for before, after in itertools.pairwise(runs):
        assert before[3] <= after[2]
    measured = {(event[0], event[4]) for event in runs}
    assert measured == {(event[0], event[4]) for event in builds}  # where it was built


def test_what_was_not_prepared_can_be_measured_too_and_again(make: Make, tmp_path: Path) -> None:
    helpers = make()
    helpers.prepare(SMALL, [A, B])
    helpers.warm_up(SMALL, C)
    helpers.measure(SMALL, C)
    helpers.measure(SMALL, A)
    helpers.measure(SMALL, B)
    helpers.measure(SMALL, A)
    builds = [event[4] for event in events(tmp_path / "log") if event[1] == "build"]
    assert sorted(builds) == sorted(s.key for s in (A, B, C))


@pytest.mark.parametrize("ahead", [True, False])
def test_a_helper_that_fails_is_a_typed_failure_and_the_others_go_on(
    make: Make, tmp_path: Path, ahead: bool
) -> None:
    trouble = {A: "crash build", B: "exit run", C: "raise run", D: "refuse build"}
    helpers = make(trouble)
    if ahead:
        helpers.prepare(SMALL, [A, B, C, D, E])
    assert failure(helpers, A) == ("runtime", "its process ended by SIGSEGV: the driver gave up")
    assert failure(helpers, B) == ("runtime", "its process ended with exit code 3")
    assert failure(helpers, C) == ("runtime", "the launch failed")
    assert failure(helpers, D) == ("compile", "cannot compile this")
    assert helpers.measure(SMALL, E).median > 0
    deadline = time.monotonic() + 30.0
    while time.monotonic() < deadline:
        started = [event[0] for event in events(tmp_path / "log") if event[1] == "start"]
        if len(started) == 5:  # a compile error costs no process
            break
        time.sleep(0.02)
    assert len(started) == 5
    assert [alive(pid) for pid in started].count(True) == 2


def test_what_hangs_is_ended_at_the_time_limit(make: Make, tmp_path: Path) -> None:
    helpers = make({A: "hang build", B: "hang run"}, time_limit=2.0)
    helpers.prepare(SMALL, [A, B, C])
    assert failure(helpers, A) == (
        "timeout",
        "compiling it took more than 2 s; its process was ended",
    )
    assert failure(helpers, B) == (
        "timeout",
        "a sample of it took more than 2 s; its process was ended",
    )
    assert helpers.measure(SMALL, C).median > 0


def test_many_samples_may_take_longer_than_the_limit_of_one(make: Make) -> None:
    helpers = make(time_limit=2.0, run_seconds=0.5, count=1)
    assert len(helpers.measure(SMALL, A).samples) == 3  # five launches of 0.5 s


def test_waiting_for_another_process_that_measures_is_no_time_of_the_kernel(
    make: Make, tmp_path: Path
) -> None:
    helpers = make(time_limit=2.0, count=1)
    helpers.measure(SMALL, A)
    holder = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from metalgen.tuning.workers.executing import one_at_a_time
        with one_at_a_time(Path(sys.argv[1])):
            print("locked", flush=True)
            time.sleep(3.0)
        """
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        helpers.measure(SMALL, A)
        assert process.wait(timeout=30) == 0


def test_a_race_runs_in_one_helper_and_counts_the_default_twice(make: Make, tmp_path: Path) -> None:
    helpers = make()
    helpers.prepare(SMALL, [A, B])
    helpers.measure(SMALL, A)
    helpers.measure(SMALL, B)
    race = helpers.race(SMALL, [A, B, C], A)
    assert set(race.timings) == {A.key, B.key, C.key, "mlx"}
    assert len(race.timings[A.key].samples) == 2 * len(race.timings[B.key].samples) == 8
    runs = [event for event in events(tmp_path / "log") if event[1] == "run"]
    assert len({event[0] for event in runs[-12:]}) == 1


def test_finalists_are_compiled_in_one_helper_while_others_are_still_measured(
    make: Make, tmp_path: Path
) -> None:
    helpers = make()
    helpers.prepare(SMALL, [A, B])
    helpers.measure(SMALL, A)
    helpers.measure(SMALL, B)
    helpers.prepare_race(SMALL, [A, B, C])
    helpers.measure(SMALL, A)
    race = helpers.race(SMALL, [A, B, C, D], C)
    assert {A.key, B.key, C.key, D.key} < set(race.timings)
    done = events(tmp_path / "log")
    track = [event[0] for event in done if event[1] == "run"][-1]
    built = {event[4] for event in done if event[0] == track and event[1] == "build"}
    assert built == {A.key, B.key, C.key, D.key}
    assert len([event for event in done if event[1] == "build"]) <= 6  # A and B twice, no more


def test_a_finalist_that_ends_the_helper_of_the_race_is_the_races_failure(make: Make) -> None:
    helpers = make({B: "crash build"})
    helpers.measure(SMALL, A)
    with pytest.raises(KernelFailure, match="its process ended by SIGSEGV: the driver gave up"):
        helpers.race(SMALL, [A, B], A)
    race = helpers.race(SMALL, [A, C], A)
    assert set(race.timings) == {A.key, C.key, "mlx"}


def test_what_was_given_up_does_not_keep_a_helper_from_other_work(make: Make) -> None:
    helpers = make()
    helpers.prepare(SMALL, [A, B])  # compiled, and never asked for again
    helpers.measure(SMALL, C)
    helpers.prepare(SMALL, [D, E, F])
    for schedule in (D, E, F):
        helpers.measure(SMALL, schedule)
    helpers.prepare(SMALL, [A, B])
    assert len(helpers.race(SMALL, [D, E], D).timings) == 3


def test_what_is_to_be_measured_first_of_all_gets_a_helper_though_all_hold_others(
    make: Make, tmp_path: Path
) -> None:
    helpers = make()
    helpers.prepare(SMALL, [A, B])
    helpers.measure(SMALL, A)
    helpers.prepare(SMALL, [A, B])
    helpers.measure(SMALL, C)  # by now both hold one
    for first in (D, E):
        helpers.prepare(SMALL, [A, B, first])
        assert len(helpers.measure(SMALL, first).samples) == 3
    helpers.measure(SMALL, A)
    helpers.measure(SMALL, B)


def test_a_spent_budget_ends_the_wait_for_a_helper(make: Make) -> None:
    helpers = make({A: "hang build"}, deadline=time.perf_counter() + 0.1)
    with pytest.raises(BudgetSpent):
        helpers.measure(SMALL, A)


def test_a_device_that_helpers_cannot_use_is_no_verdict_about_a_kernel(
    make: Make, tmp_path: Path
) -> None:
    gpu = ProcessGpu(tmp_path / "log", missing="it fell off the bus")
    helpers = Helpers(gpu, POLICY, 2)
    try:
        with pytest.raises(DeviceError, match="it fell off the bus"):
            helpers.measure(SMALL, A)
    finally:
        helpers.close()
    with pytest.raises(DeviceError, match="TypeError: a defect"):
        make({B: "defect build"}).measure(SMALL, B)


def test_where_no_helper_can_take_the_place_of_one_that_ended_the_error_says_so(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    helpers = make({B: "crash run"}, count=1)
    helpers.measure(SMALL, A)

    def none() -> None:
        raise DeviceError("cannot start a helper process: no memory")

    monkeypatch.setattr(helpers, "_start", none)
    with pytest.raises(DeviceError, match="cannot start a helper process: no memory"):
        helpers.measure(SMALL, B)
    helpers.close()  # as a run does in any case; what was ended is not ended again
    helpers.close()


def test_a_device_that_cannot_be_sent_to_a_helper_is_an_error(tmp_path: Path) -> None:
    class Unpicklable(ProcessGpu):
        """Cannot be sent to another process."""

    helpers = Helpers(Unpicklable(tmp_path / "log"), POLICY, 1)
    try:
        with pytest.raises(DeviceError, match="cannot start a helper process"):
            helpers.measure(SMALL, A)
    finally:
        helpers.close()


def test_closing_ends_helpers_whatever_they_are_doing(make: Make, tmp_path: Path) -> None:
    helpers = make({B: "hang build"})
    helpers.prepare(SMALL, [A, B])
    helpers.measure(SMALL, A)
    helpers.close()
    started = [event[0] for event in events(tmp_path / "log") if event[1] == "start"]
    assert started
    assert not any(alive(pid) for pid in started)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jobs": -1}, "jobs: expected a whole number from 0 to 64, but got -1"),
        ({"jobs": 1.0}, "jobs: expected a whole number from 0 to 64, but got 1.0"),
        ({"time_limit": 0.5}, "time_limit: expected seconds, 1 or more, but got 0.5"),
        ({"time_limit": float("inf")}, "time_limit: expected seconds, 1 or more, but got inf"),
    ],
)
def test_bad_limits_are_refused_before_anything_is_written(
    tmp_path: Path, arguments: dict[str, int], message: str
) -> None:
    with Store.open(tmp_path / "tuning.db") as store:
        with pytest.raises(ArgumentError) as caught:
            tune([SMALL], get_chip("M3Max"), store, **arguments)  # type: ignore[arg-type]
        assert str(caught.value) == message
        assert store.health()["rows"]["runs"] == 0


def test_the_usual_number_of_helpers_leaves_processors_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = []
    for processors in (1, 2, 4, 64):
        monkeypatch.setattr(os, "cpu_count", lambda n=processors: n)
        found.append((usual_jobs(get_device("reference")), usual_jobs(ProcessGpu(Path()))))
    assert found == [(1, 1), (1, 1), (2, 2), (4, 4)]


def test_the_lock_lets_one_process_at_a_time_in_and_dies_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    script = (
        "import sys, time; from pathlib import Path\n"
        "from metalgen.tuning.workers.executing import one_at_a_time\n"
        "with one_at_a_time(Path(sys.argv[1])): print('in', flush=True); time.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        waited: list[int | None] = []

        def waiting() -> None:
            waited.append(process.poll())
            process.kill()

        with one_at_a_time(path, waiting):
            assert waited == [None]
        assert process.wait(timeout=30) == -signal.SIGKILL


# Whole runs


def test_a_tuning_run_with_helpers_keeps_every_failure_as_a_row_and_finds_a_winner(
    tmp_path: Path,
) -> None:
    default = default_schedule(SMALL.config)
    others = [s for s in VALID if s != default]
    trouble = {s.key: "crash build" for s in others if s.bk == 64}
    trouble |= {s.key: "raise run" for s in others if s.bk == 16}
    log = tmp_path / "log"
    with Store.open(tmp_path / "tuning.db") as store:
        report = tune(
            *([SMALL], get_chip("M3Max"), store),
            device=ProcessGpu(log, trouble),
            trials=16,
            policy=POLICY,
            jobs=2,
            verify=FakeVerify(),
        )
        (outcome,) = report.outcomes
        rows = store.measurements(SMALL, phase="search")
    assert len(rows) == 16
    for row in rows:
        kind = trouble.get(row.schedule.key)
        assert row.status in (("runtime",) if kind else ("ok", "pruned"))
        if kind == "crash build":
            assert row.detail == "its process ended by SIGSEGV: the driver gave up"
    assert {row.status for row in rows} == {"ok", "runtime"}
    assert outcome.winner is not None
    assert not any(alive(event[0]) for event in events(log) if event[1] == "start")


def test_the_simulator_can_be_timed_and_checked_in_helpers(tmp_path: Path) -> None:
    simulator = get_device("simulator")
    with Store.open(tmp_path / "tuning.db") as store:
        report = tune(
            *([SMALL], get_chip("M3Max"), store),
            device=simulator,
            trials=2,
            policy=POLICY,
            jobs=1,
        )
        finals = store.measurements(SMALL, phase="final")
    assert report.checks == 2
    assert len(finals) == 2 and all(m.verified for m in finals)
    assert all(m.error is not None and m.error < 1e-3 for m in finals)
    assert report.outcomes[0].winner is not None


RUN = textwrap.dedent(
    """
    import sys
    sys.path.append(sys.argv[1])
    from pathlib import Path
    from test_helpers import POLICY, SMALL, VALID
    from tuning_fakes import FakeVerify, ProcessGpu
    from metalgen.chips import get_chip
    from metalgen.database.store import Store
    from metalgen.tuning.runner import tune

    folder = Path(sys.argv[2])
    if __name__ == "__main__":
        with Store.open(folder / "tuning.db") as store:
            report = tune([SMALL], get_chip("M3Max"), store, trials=200, policy=POLICY, jobs=2,
                          device=ProcessGpu(folder / "log", build_seconds=0.02),
                          verify=FakeVerify(), observe=lambda p: print(p.tried, flush=True))
        print(report.stopped)
    """
)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_no_helper_outlives_its_run_and_no_row_that_was_shown_is_lost(
    tmp_path: Path, end: signal.Signals
) -> None:
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, here, str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    shown = 0
    for line in process.stdout:
        shown = int(line)
        if shown == 5:
            break
    if end == signal.SIGINT:
        os.killpg(process.pid, end)  # as a terminal does: helpers get it too
    else:
        process.send_signal(end)
    out, err = process.communicate(timeout=60)
    if end == signal.SIGINT:
        assert process.returncode == 0, err
        assert out.splitlines()[-1] == "interrupted"
        assert err == ""
    else:
        assert process.returncode == -signal.SIGKILL
    started = [event[0] for event in events(tmp_path / "log") if event[1] == "start"]
    assert len(started) == 2
    deadline = time.monotonic() + 30.0
    while any(alive(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in started)
    with Store.open(tmp_path / "tuning.db") as store:
        rows = store.measurements(SMALL)
        assert store.health()["integrity"] == "ok"
    assert len(rows) >= shown
    assert {row.status for row in rows} == {"ok"}
