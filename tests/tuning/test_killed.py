"""A search on a recorded space that is killed at random moments, and many processes on one file."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from metalgen.database.store import Store

KILLS = 4
"""Kills that every run of the tests tries; all two hundred are behind the marker slow."""
TRIALS = 40

# A device whose times are a table, so that a search on it can be replayed in any process.
WORKER = textwrap.dedent(
    """
    import sys, time
    sys.path.append(sys.argv[1])
    from pathlib import Path
    from tuning_fakes import Clock, FakeGpu, FakeVerify
    from metalgen.chips import get_chip
    from metalgen.problem.config import AttentionConfig
    from metalgen.database.store import Store
    from metalgen.families.sizes import Problem
    from metalgen.tuning.timing.measure import Policy
    from metalgen.tuning.runner import tune

    pause, trials, width = float(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    problem = Problem(AttentionConfig(head_dim=width), 2, 16, 16, family="forward")
    policy = Policy(
        warmup_seconds=0.01, repetitions=3, sample_seconds=1e-3, sets=1, cold_bytes=0, rounds=2
    )
    gpu = FakeGpu(Clock())

    def observe(progress):
        time.sleep(pause)
        print(progress.tried, flush=True)

    with Store.open(Path(sys.argv[2])) as store:
        report = tune([problem], get_chip("M3Max"), store, device=gpu, trials=trials, policy=policy,
                      clock=gpu.clock, verify=FakeVerify(), observe=observe)
    print("winner", report.outcomes[0].winner.schedule.key)
    """
)

# Look-ups in a loop until a file appears; prints how many, and the processor time of each.
READER = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from metalgen.chips import get_chip
    from metalgen.problem.config import AttentionConfig
    from metalgen.database.lookup import lookup
    from metalgen.families.sizes import Problem
    from metalgen.source.hashes import template_hashes

    problem = Problem(AttentionConfig(head_dim=8), 2, 16, 16, family="forward")
    chip, count, path = get_chip("M3Max"), 0, Path(sys.argv[1])
    templates = template_hashes(problem.family, "metal")
    start = time.process_time()
    while not Path(sys.argv[2]).exists():
        trace = []
        lookup(problem, chip, templates, database=path, trace=trace)
        bad = [line for line in trace if "not used" in line]
        if bad:
            print("BAD", bad)
        count += 1
        time.sleep(0.005)
    print("done", count, (time.process_time() - start) / count)
    """
)


def start(database: Path, pause: float = 0.0, width: int = 8) -> subprocess.Popen[str]:
    """Start a tuning process."""
    here = str(Path(__file__).parent)
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, here, str(database), str(pause), str(TRIALS), str(width)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def winner(process: subprocess.Popen[str]) -> str:
    """What a process that ended well says that it found."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.splitlines()[-1].removeprefix("winner ")


def schedules(database: Path) -> list[str]:
    """The rows of the search, in the order they were committed; the file must be whole."""
    with Store.open(database) as store:
        assert store.health()["integrity"] == "ok"
        return [m.schedule.key for m in store.measurements(phase="search")]


def kill_often(folder: Path, kills: int) -> None:
    """Kill searches at random moments until there were so many kills; each ends as undisturbed."""
    undisturbed = folder / "undisturbed.db"
    best = winner(start(undisturbed))
    order = schedules(undisturbed)
    assert len(order) == TRIALS
    draw, done, round_ = random.Random(0), 0, 0
    while done < kills:
        database = folder / f"{round_}.db"
        round_ += 1
        for _ in range(4):  # kills of one search
            process = start(database, pause=0.01)
            assert process.stdout is not None
            said = 0
            for line in process.stdout:
                if line.startswith("winner"):
                    break
                said = int(line)
                if draw.random() < 0.05:
                    time.sleep(draw.random() * 0.02)
                    process.send_signal(signal.SIGKILL)
                    break
            process.communicate(timeout=60)
            done += process.returncode == -signal.SIGKILL
            kept = schedules(database)
            assert kept == order[: len(kept)]
            assert len(kept) >= said  # what was shown as tried was committed
        assert winner(start(database)) == best
        assert schedules(database) == order


def test_a_search_that_is_killed_ends_with_the_winner_of_an_undisturbed_one(
    tmp_path: Path,
) -> None:
    kill_often(tmp_path, KILLS)


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing_that_was_committed(tmp_path: Path) -> None:
    kill_often(tmp_path, 200)


@pytest.mark.slow
def test_eight_processes_tune_into_one_file_while_eight_look_up(tmp_path: Path) -> None:
    database, stop = tmp_path / "tuning.db", tmp_path / "stop"
    readers = [
        subprocess.Popen(
            [sys.executable, "-c", READER, str(database), str(stop)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=dict(os.environ),
        )
        for _ in range(8)
    ]
    widths = [8, 16, 24, 32, 40, 48, 56, 64]
    tuners = [start(database, width=width) for width in widths]
    for tuner in tuners:
        winner(tuner)
    stop.touch()
    for reader in readers:
        out, err = reader.communicate(timeout=60)
        assert reader.returncode == 0, err
        assert out.startswith("done"), out
        print(out)  # the processor time of a look-up
    with Store.open(database) as store:
        rows = store.measurements(phase="search")
        assert store.health()["integrity"] == "ok"
    counts = dict.fromkeys(widths, 0)
    for m in rows:
        counts[m.problem.config.head_dim] += 1
    assert counts == dict.fromkeys(widths, TRIALS)
