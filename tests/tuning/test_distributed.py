"""Workers that share a study: four processes on a recorded space, one of them killed."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import postgresql_server
import pytest
from optuna.trial import TrialState
from recorded_gpu import recorded

from metalgen.database import exchange
from metalgen.database.store import Store
from metalgen.schedule import Schedule
from metalgen.tuning.storage import close_storage, open_storage

TRIALS = 48
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
    from metalgen.tuning.distributed import Share
    from metalgen.tuning.runner import tune

    class Worker(Replayed):
        def build(self, config, schedule, family="forward"):
            if schedule not in self.built:
                time.sleep(0.03)  # so that all of them get something to do
            if stuck_after == len(self.built):
                print("stuck", schedule.key, flush=True)
                time.sleep(600)
            return super().build(config, schedule, family)

    url, database = sys.argv[2:4]
    stuck_after, trials = int(sys.argv[4]), int(sys.argv[5])
    share = Share(url, beat=0.3, grace=4.0, poll=0.1)
    gpu = Worker()
    with Store.open(Path(database)) as store:
        report = tune([SMALL], get_chip("H200"), store, device=gpu, trials=trials,
                      policy=gpu.policy, clock=gpu.clock, verify=FakeVerify(), share=share)
    (outcome,) = report.outcomes
    print("new", outcome.new, "tried", outcome.tried)
    print("winner", outcome.winner.schedule.key)
    """
)


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    """A running server's database."""
    pytest.importorskip("psycopg", reason="needs psycopg (metalgen[distributed])")
    try:
        with postgresql_server.server() as url:
            yield url
    except postgresql_server.NoServer as reason:
        pytest.skip(f"needs a PostgreSQL server: {reason}")


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
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(worker: Any) -> dict[str, str]:
    """What a worker that ended well printed, by the first word of each line."""
    out, err = worker.communicate(timeout=120)
    assert worker.returncode == 0, err
    return dict(line.split(" ", 1) for line in out.splitlines())


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
    victim = start(url, databases[0], stuck_after=5)
    others = [start(url, database) for database in databases[1:]]
    assert victim.stdout is not None
    stuck = victim.stdout.readline().split(" ", 1)
    assert stuck[0] == "stuck", victim.communicate()
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
    assert [t.user_attrs["item"] for t in lost] == [stuck[1].strip()]
    again = [t for t in search if t.user_attrs["item"] == stuck[1].strip() and t not in lost]
    measured = [t for t in again if "rows" in t.user_attrs]
    assert [t.user_attrs["worker"] == lost[0].user_attrs["worker"] for t in measured] == [False]
    states = {t.user_attrs["item"]: t.state for t in search if "rows" in t.user_attrs}
    for key, state in states.items():
        ran = recorded(Schedule.from_dict(json.loads(key))) < math.inf
        assert state == (TrialState.COMPLETE if ran else TrialState.FAIL)
    assert not any(t.state == TrialState.RUNNING for t in trials)
    # All took part, and what each says that it measured is what there is.
    shares = Counter(t.user_attrs["worker"] for t in search if "rows" in t.user_attrs)
    assert len(shares) == WORKERS
    dead = shares.pop(lost[0].user_attrs["worker"])
    assert sorted(shares.values()) == sorted(int(s["new"].split()[0]) for s in said)

    # Everyone has every row, those of the dead worker too.
    first, *rest = [rows_of(database) for database in databases[1:]]
    assert {key for phase, key in first if phase == "search"} == set(taken)
    assert all(found == first for found in rest)
    assert len(before) >= dead > 0 and before.keys() <= first.keys()
    # One winner: by the recording the best of those that were tried.
    best = min(map(recorded, (Schedule.from_dict(json.loads(key)) for key in taken)))
    winners = {s["winner"] for s in said}
    assert len(winners) == 1
    assert recorded(Schedule.from_dict(json.loads(winners.pop()))) == best
    assert sum(t.user_attrs["item"] == "finals" and "rows" in t.user_attrs for t in trials) == 1

    # The killed worker, started again by the same command, gets it all and measures nothing.
    again = ended(start(url, databases[0]))
    assert again["new"].startswith("0 ")
    assert again["winner"] == said[0]["winner"]
    assert rows_of(databases[0]) == first
    assert len(trials_of(url)) == len(trials)
