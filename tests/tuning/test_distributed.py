"""Workers that share a study: four processes on a recorded space, one of them killed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import postgresql_server
import pytest
from optuna.trial import TrialState
from recorded_gpu import SECONDS, SMALL, Replayed, recorded
from tuning_fakes import FakeVerify

from metalgen.chips import get_chip
from metalgen.database import exchange
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.families import Schedule, decode_schedule, enumerate_valid
from metalgen.source.hashes import template_hash
from metalgen.tuning.progress import BudgetSpent, Progress
from metalgen.tuning.runner import tune
from metalgen.tuning.search.candidates import Candidates, candidates
from metalgen.tuning.search.finite import FiniteSpace
from metalgen.tuning.search.samplers import FiniteGPSampler
from metalgen.tuning.study import claims, trials
from metalgen.tuning.study.claims import LOSSES, Extent, TuningStudy
from metalgen.tuning.study.sampling import Sampling
from metalgen.tuning.study.storage import StorageError, close_storage, open_storage
from metalgen.tuning.study.trials import Share, Trials

TRIALS = 20
WORKERS = 4

WORKER = textwrap.dedent(
    """
    import sys, time
    sys.path.append(sys.argv[1])
    from pathlib import Path
    from recorded_gpu import SMALL, Replayed
    from tuning_fakes import FakeVerify
    from metalgen.chips import get_chip
    from metalgen.database.store import Store
    from metalgen.tuning.study.trials import Share
    from metalgen.tuning.runner import tune

    class Worker(Replayed):
        def build(self, config, schedule, family="forward"):
            if schedule not in self.built:
                print("building", flush=True)
                time.sleep(0.05)  # so that all of them get something to do
            if stuck_after == len(self.built):
                print("stuck", schedule.key, flush=True)
                time.sleep(600)
            return super().build(config, schedule)

    url, database = sys.argv[2:4]
    stuck_after, trials = int(sys.argv[4]), int(sys.argv[5])
    share = Share(url, beat=0.3, grace=6.0, poll=0.1)
    gpu = Worker()
    print("ready", flush=True)
    sys.stdin.readline()
    with Store.open(Path(database)) as store:
        report = tune([SMALL], get_chip("H200"), store, device=gpu, trials=trials,
                      policy=gpu.policy, clock=gpu.clock, verify=FakeVerify(), share=share)
    (outcome,) = report.outcomes
    print("new", outcome.new, "tried", outcome.tried)
    print("winner", outcome.winner.schedule.key)
    """
)


@pytest.fixture(params=["journal", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A storage of each kind, empty as far as the test's study is concerned."""
    if request.param == "journal":
        return f"journal:{tmp_path / 'study.journal'}"
    return str(request.getfixturevalue("postgresql"))


def start(url: str, database: Path, stuck_after: int = -1, trials: int = TRIALS) -> Any:
    """Start a worker with a database of its own."""
    here = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, here, url, str(database), str(stuck_after), str(trials)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(worker: Any, word: str) -> str:
    """The rest of a worker's first line that begins with a word."""
    for line in worker.stdout:
        first, _, rest = line.strip().partition(" ")
        if first == word:
            return str(rest)
    raise AssertionError(worker.communicate()[1])


def go(worker: Any) -> Any:
    """Let a worker begin, which has said that it is ready."""
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return worker


def ended(worker: Any) -> dict[str, str]:
    """What a worker that ended well printed, by the first word of each line."""
    out, err = worker.communicate(timeout=120)
    assert worker.returncode == 0, err
    lines = (line.partition(" ") for line in out.splitlines())
    return {first: rest for first, _, rest in lines}


def trials_of(url: str, study: str = "metalgen") -> list[optuna.trial.FrozenTrial]:
    """All trials of the one study whose name begins so."""
    storage = open_storage(url)
    found = [s for s in storage.get_all_studies() if s.study_name.startswith(f"{study}: ")]
    assert len(found) == 1
    trials = storage.get_all_trials(found[0]._study_id)
    close_storage(storage)
    return trials


def rows_of(database: Path) -> dict[tuple[str, str], str]:
    """The canonical line of every row by phase and schedule."""
    with Store.open(database) as store:
        assert store.health()["integrity"] == "ok"
        return {
            (m.phase, m.schedule.key): exchange.canonical(m).to_line() for m in store.measurements()
        }


def test_four_workers_share_a_study_and_one_of_them_is_killed(url: str, tmp_path: Path) -> None:
    databases = [tmp_path / f"{n}.db" for n in range(WORKERS)]
    victim, *others = [
        start(url, database, stuck_after=-1 if n else 3) for n, database in enumerate(databases)
    ]
    for worker in (victim, *others):
        until(worker, "ready")
    until(go(victim), "building")
    for worker in others:
        go(worker)
    stuck = until(victim, "stuck")
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    before = rows_of(databases[0])
    said = [ended(worker) for worker in others]

    trials = trials_of(url)
    search = [t for t in trials if t.user_attrs["item"] != "finals"]
    taken = Counter(t.user_attrs["item"] for t in search if "rows" in t.user_attrs)
    assert len(taken) == TRIALS
    assert set(taken.values()) == {1}  # nothing was measured twice
    # What the dead worker was at was lost, and measured by another.
    lost = [t for t in search if "lost" in t.user_attrs]
    assert [t.user_attrs["item"] for t in lost] == [stuck]
    again = [t for t in search if t.user_attrs["item"] == stuck and t not in lost]
    measured = [t for t in again if "rows" in t.user_attrs]
    assert [t.user_attrs["worker"] == lost[0].user_attrs["worker"] for t in measured] == [False]
    states = {t.user_attrs["item"]: t.state for t in search if "rows" in t.user_attrs}
    for key, state in states.items():
        ran = recorded(decode_schedule(json.loads(key), "forward")) < math.inf
        assert state in ((TrialState.COMPLETE, TrialState.PRUNED) if ran else (TrialState.FAIL,))
    assert not any(t.state == TrialState.RUNNING for t in trials)
    # What each says that it measured is what there is.
    shares = Counter(t.user_attrs["worker"] for t in search if "rows" in t.user_attrs)
    assert len(shares) > 1
    dead = shares.pop(lost[0].user_attrs["worker"])
    counts = Counter(int(s["new"].split()[0]) for s in said)
    assert Counter(shares.values()) == counts - Counter({0: WORKERS})

    # Everyone has every row, those of the dead worker too.
    first, *rest = [rows_of(database) for database in databases[1:]]
    assert {key for phase, key in first if phase == "search"} == set(taken)
    assert all(found == first for found in rest)
    assert len(before) >= dead > 0 and before.keys() <= first.keys()
    # One winner: by the recording the best of those that were tried.
    best = min(map(recorded, (decode_schedule(json.loads(key), "forward") for key in taken)))
    winners = {s["winner"] for s in said}
    assert len(winners) == 1
    assert recorded(decode_schedule(json.loads(winners.pop()), "forward")) == best
    assert sum(t.user_attrs["item"] == "finals" and "rows" in t.user_attrs for t in trials) == 1

    # The killed worker, started again by the same command, gets it all and measures nothing.
    once_more = ended(go(start(url, databases[0])))
    assert once_more["new"].startswith("0 ")
    assert once_more["winner"] == said[0]["winner"]
    assert rows_of(databases[0]) == first
    assert len(trials_of(url)) == len(trials)


@pytest.mark.slow
def test_workers_that_are_killed_at_random_moments_cost_a_second_measurement_at_most(
    url: str, tmp_path: Path
) -> None:
    draw, kills, left = random.Random(5), 0, 12
    databases = [tmp_path / f"{n}.db" for n in range(3)]
    running = {database: go(start(url, database, trials=90)) for database in databases}
    said = {}
    while running:
        time.sleep(0.5 + 1.0 * draw.random())
        database = draw.choice(sorted(running))
        worker = running.pop(database)
        if left and worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
            worker.communicate()
            kills, left = kills + 1, left - 1
            running[database] = go(start(url, database, trials=90))
        else:
            said[database] = ended(worker)
    assert kills >= 3  # fewer on a faster machine, which is done before the twelfth
    trials = trials_of(url)
    search = [t for t in trials if t.user_attrs["item"] != "finals"]
    taken = Counter(t.user_attrs["item"] for t in search if "rows" in t.user_attrs)
    assert len(taken) == 90
    assert taken.total() - 90 <= kills
    assert not any(t.state == TrialState.RUNNING for t in trials)
    assert len({s["winner"] for s in said.values()}) == 1
    for database in databases:
        assert {key for phase, key in rows_of(database) if phase == "search"} == set(taken)


def test_a_server_that_goes_away_ends_a_worker_with_one_line_and_its_rows_stay(
    tmp_path: Path,
) -> None:
    pytest.importorskip("psycopg", reason="needs psycopg (metalgen[distributed])")
    gpu = Replayed()
    try:
        running = contextlib.ExitStack()
        share = Share(running.enter_context(postgresql_server.server()), beat=0.2, poll=0.01)
    except postgresql_server.NoServer as reason:
        pytest.skip(f"needs a PostgreSQL server: {reason}")
    with running, Store.open(tmp_path / "t.db") as store:

        def gone(progress: Progress) -> None:
            if progress.tried == 3:
                running.close()

        with pytest.raises(StorageError, match=r"^storage postgresql://tuner:\*\*\*@.*refused"):
            tune(
                [SMALL],
                get_chip("H200"),
                store,
                device=gpu,
                trials=8,
                policy=gpu.policy,
                clock=gpu.clock,
                verify=FakeVerify(),
                observe=gone,
                share=share,
            )
        assert len(store.measurements()) == 3
        outcomes = [row["outcome"] for row in store.db.query("SELECT outcome FROM runs")]
        assert outcomes == ["failed"]


# One process, several workers


class Team:
    """Workers of one journal in this process, whose clock the test sets."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch, goal: int = 12) -> None:
        self.share = Share(f"journal:{path}", beat=1000.0, grace=2000.0)
        self.goal = goal
        self.gpu = Replayed()
        modes = ("safe",)
        self.candidates = candidates(SMALL.config, self.gpu.limits, "forward", modes)
        self.now = 0.0
        self.received: dict[str, list[Measurement]] = {}
        self._open: list[TuningStudy] = []
        monkeypatch.setattr(trials.time, "monotonic", lambda: self.now)

    def join(self, ahead: int = 1, **facts: Any) -> TuningStudy:
        """A new worker."""
        finite = self.candidates.finite
        rows: list[Measurement] = []
        storage = open_storage(self.share.url)
        worker = TuningStudy(
            Trials(storage, SMALL, FACTS | facts, self.candidates, self.share),
            Sampling(finite, FiniteGPSampler(finite, seed=0), {0}, late=None),
            Extent(self.goal, ahead),
            rows.extend,
        )
        worker.enqueue([self.candidates.default])
        self.received[worker.trials.worker] = rows
        self._open.append(worker)
        return worker

    def outcomes(self) -> list[str]:
        """The schedules of all trials that have a row."""
        trials = trials_of(self.share.url)
        return [t.user_attrs["item"] for t in trials if "rows" in t.user_attrs]

    def leave(self) -> None:
        """Everyone goes home."""
        for worker in self._open:
            worker.close()


def stop(worker: TuningStudy) -> None:
    """Let a worker show no sign of life any more."""
    assert worker._heart is not None
    worker._heart.stop()


FACTS = {"chip": "H200", "cores": 132, "device": "cuda", "policy": "p"}


def measured(schedule: Schedule, seconds: float | None = 1e-3, **changes: Any) -> Measurement:
    """The row that a worker of `FACTS` makes of a schedule."""
    fields: dict[str, Any] = {"problem": SMALL, "provenance": "measured", **FACTS}
    fields |= {"template_hash": template_hash(schedule), **changes}
    return Measurement(schedule=schedule, seconds=seconds, **fields)


@pytest.fixture
def team(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Team]:
    found = Team(tmp_path / "team.journal", monkeypatch)
    yield found
    found.leave()


@pytest.mark.parametrize("seed", range(4))
def test_whatever_the_order_of_events_each_schedule_is_measured_once(team: Team, seed: int) -> None:
    """Workers ask, publish, die and come anew in a random order; the dead never come back."""
    draw = random.Random(seed)
    workers = [team.join(ahead=draw.choice((1, 3))) for _ in range(3)]
    deaths = 0
    for _ in range(400):
        worker = draw.choice(workers)
        event = draw.random()
        if event < 0.5:
            worker.ask()
        elif event < 0.9 and worker.pending:
            schedule = worker.pending[0]
            ran = draw.random() < 0.8
            worker.publish(measured(schedule, 1e-3 if ran else None, status=("runtime", "ok")[ran]))
        elif event > 0.97 and deaths < LOSSES - 1:
            deaths += 1
            stop(worker)  # it is not heard of again
            workers.remove(worker)
            workers.append(team.join())
        elif event > 0.95:
            team.now += 3000.0  # more than the grace: but the living count on
            for living in workers:
                for trial in living._own.values():
                    living.trials.storage.set_trial_user_attr(trial, "beat", team.now)
        counts = Counter(team.outcomes())
        assert len(counts) == counts.total() <= team.goal
        if len(counts) == team.goal:
            break
    assert len(counts) == team.goal
    for worker in workers:
        worker.refresh()
        assert not worker.unfinished and worker.ask() is None
        assert len(worker.rows) == team.goal
        # Everyone heard of what the others measured, once.
        heard = [m.schedule for m in team.received[worker.trials.worker]]
        assert len(heard) == len(set(heard)) == team.goal - worker.published


def test_of_two_claims_at_the_same_moment_the_first_holds(team: Team) -> None:
    first, second = team.join(), team.join()
    schedule = first.ask()
    assert schedule is not None
    assert not second._claim(schedule.key, schedule)  # as if it had asked before it knew
    states = [(t.state, sorted(t.user_attrs)) for t in trials_of(team.share.url)]
    assert [state for state, _ in states] == [TrialState.RUNNING, TrialState.FAIL]
    assert "withdrawn" in states[1][1] and "lost" not in states[1][1]
    first.publish(measured(schedule))
    assert not second._claim(schedule.key, schedule)
    assert second.asked == [schedule]


def test_the_last_places_are_not_given_twice(team: Team) -> None:
    team.goal = 2
    first, second = team.join(), team.join()
    taken = [first.ask(), second.ask()]
    assert first.ask() is None
    other = next(s for s in enumerate_valid(SMALL.config, team.gpu.limits) if s not in taken)
    assert not second._claim(other.key, other)


def test_a_worker_that_was_taken_for_dead_and_wakes_up_loses_nothing(team: Team) -> None:
    sleeper, other = team.join(), team.join()
    schedule = sleeper.ask()
    assert schedule is not None
    other.refresh()
    team.now += 2001.0
    assert other.ask() == schedule  # lost, and the next to be tried
    sleeper.publish(measured(schedule, 1e-3))
    assert not sleeper.pending
    other.publish(measured(schedule, 2e-3))
    sleeper.refresh()
    assert sorted(m.seconds or 0 for m in team.received[other.trials.worker]) == [1e-3]
    assert sorted(m.seconds or 0 for m in team.received[sleeper.trials.worker]) == [2e-3]


def test_a_schedule_of_which_workers_die_is_given_up(team: Team) -> None:
    team.goal = 3
    deadly = team.candidates.default
    for _ in range(LOSSES):
        worker = team.join()
        assert worker.ask() == deadly
        stop(worker)
        team.join().refresh()
        watcher = team.join()
        watcher.refresh()
        team.now += 2001.0
        watcher.refresh()
    survivor = team.join()
    taken = [survivor.ask()]
    assert taken[0] not in (None, deadly)
    assert taken[0] is not None
    survivor.publish(measured(taken[0]))
    taken.append(survivor.ask())
    assert taken[1] not in (None, deadly)
    assert deadly in survivor.asked and deadly not in survivor.rows


def test_a_worker_that_leaves_gives_back_what_it_took(team: Team) -> None:
    leaving, staying = team.join(ahead=2), team.join()
    taken = [leaving.ask(), leaving.ask()]
    leaving.close()
    for schedule in taken:
        assert staying.ask() == schedule
        assert schedule is not None
        staying.publish(measured(schedule))
    reasons = [t.user_attrs.get("lost") for t in trials_of(team.share.url)]
    assert Counter(reasons) == {claims.RELEASED: 2, None: 2}


def test_rows_of_an_earlier_run_are_brought_along_and_not_measured_again(team: Team) -> None:
    worker = team.join()
    valid = enumerate_valid(SMALL.config, team.gpu.limits, "forward", ("safe",))
    worker.contribute([measured(s, 1e-3 * n) for n, s in enumerate(valid[:4], 1)])
    other = team.join()
    assert {m.schedule for m in team.received[other.trials.worker]} == set(valid[:4])
    other.contribute([measured(valid[0], 5.0)])
    assert len(team.outcomes()) == 4
    asked = [other.ask()]
    assert asked[0] is not None and asked[0] not in valid[:4]


def test_the_best_are_raced_once_and_again_after_more_was_measured(team: Team) -> None:
    team.goal = 2
    first, second = team.join(), team.join()
    for worker in (first, second):
        schedule = worker.ask()
        assert schedule is not None
        worker.publish(measured(schedule))
    assert first.claim_finals() and not second.claim_finals()
    assert not second.raced()
    first.publish_finals([measured(s, phase="final", verified=True) for s in first.asked])
    assert not second.claim_finals() and second.raced()
    assert {m.phase for m in team.received[second.trials.worker]} == {"search", "final"}
    second.extent = Extent(3)
    schedule = second.ask()
    assert schedule is not None
    second.publish(measured(schedule))
    assert not second.raced() and second.claim_finals()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("chip", "H100"),
        ("cores", 60),
        ("device", "metal"),
        ("policy", "another"),
    ],
)
def test_a_worker_unlike_the_others_is_refused_by_name(
    team: Team, name: str, value: object
) -> None:
    team.join()
    with pytest.raises(StorageError, match=f"of workers with {name} {FACTS[name]}, and .* {value}"):
        team.join(**{name: value})


def test_a_worker_with_other_templates_is_refused(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    team.join()
    monkeypatch.setattr("metalgen.tuning.study.trials.template_hash", lambda made: "1" * 16)
    with pytest.raises(StorageError, match="of workers with template_hashes .*, and .* .'1111"):
        team.join()


def test_a_worker_of_a_metalgen_with_other_schedules_is_refused(
    team: Team, monkeypatch: pytest.MonkeyPatch
) -> None:
    team.join()
    finite = team.candidates.finite
    choices = finite.choices | {"bk": (8, *finite.choices["bk"])}
    other = Candidates(team.candidates.schedules, FiniteSpace(choices, finite.points))
    monkeypatch.setattr(team, "candidates", other)
    with pytest.raises(StorageError, match="of workers with space [0-9a-f]{12}, and this one has"):
        team.join()


def test_trials_that_no_worker_made_are_refused(team: Team) -> None:
    worker = team.join()
    schedule = worker.ask()
    assert schedule is not None
    for bad in (
        measured(schedule, problem=dataclasses.replace(SMALL, kv_len=32)),
        measured(schedule, template_hash="1" * 16),
        measured(next(s for s in SECONDS if s != schedule)),
        measured(dataclasses.replace(schedule, bk=24)),
    ):
        worker.trials.storage.set_trial_user_attr(
            worker._own[schedule.key], "rows", [bad.to_line()]
        )
        with pytest.raises(StorageError, match="holds what is not a worker's"):
            team.join()
    worker.trials.storage.set_trial_user_attr(worker._own[schedule.key], "rows", "{}")
    with pytest.raises(StorageError, match="a trial without its row"):
        team.join()


@pytest.mark.parametrize("text", ["[]", "{", '{"chip": NaN}', "3"])
def test_a_study_that_no_worker_made_is_refused_and_nothing_is_left_running(
    team: Team, text: str
) -> None:
    worker = team.join()
    worker.trials.storage.set_study_user_attr(worker.trials.study, "metalgen", text)
    threads = threading.active_count()
    with pytest.raises(StorageError, match="study 'metalgen' holds what is not a worker's"):
        team.join()
    worker.trials.storage.set_study_user_attr(
        worker.trials.study, "metalgen", json.dumps({"chip": "M1"})
    )
    with pytest.raises(StorageError, match="is of workers with problem None, and this one has"):
        team.join()
    assert threading.active_count() == threads


def test_a_spent_budget_ends_a_worker_and_frees_its_schedules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = Share(f"journal:{tmp_path / 'study'}", poll=0.01)
    gpu = Replayed()

    def spent(progress: Progress) -> None:
        if progress.tried == 3:
            raise BudgetSpent

    for observe, stopped in ((spent, "budget"), (None, None)):
        with Store.open(tmp_path / f"{stopped}.db") as store:
            report = tune(
                [SMALL],
                get_chip("H200"),
                store,
                device=gpu,
                trials=6,
                policy=gpu.policy,
                clock=gpu.clock,
                verify=FakeVerify(),
                observe=observe,
                share=share,
            )
            assert report.stopped == stopped
            assert len(store.measurements(phase="search")) == (3 if stopped else 6)
    assert report.outcomes[0].new == 3
    states = Counter(t.state for t in trials_of(share.url))
    assert states[TrialState.RUNNING] == 0
