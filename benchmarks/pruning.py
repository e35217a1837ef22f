"""What pruning saves, and what it costs: ``python -m benchmarks.pruning FOLDER``.

Searches by our sampler on recorded spaces are replayed twice: every schedule measured whole, and
with the pruner of a measured search. Each sample is one that was recorded (Kernel Tuner's cache
files keep 32 of each point, which are drawn from), or is drawn around the recorded median by the
recorded interquartile range (our records). A measurement is as `metalgen.tuning.timing.measure` has
it: a first launch, one that warms, then 7 samples of 10 ms or of one launch, and two more at a time
until the median is certain to 1 % or there are 31.

Printed are, for each folder's spaces together, the seconds on the device's clock that pruning saved
(95 % interval of the mean over seeds), the fraction of the measurements that were pruned, the
fraction of the optimum that the best five reach either way (by their recorded medians, as a final
would), and in how many searches the winner is the same schedule, or is within 1 % of the other's.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna
from optuna.pruners import BasePruner, NopPruner, PercentilePruner, WilcoxonPruner
from optuna.trial import TrialState

from benchmarks.search import interval
from metalgen.tuning.search.named import DEFAULT_SAMPLER, make_sampler
from metalgen.tuning.search.replay import Entry, Recording, read_recordings
from metalgen.tuning.study.pruning import make_pruner
from metalgen.tuning.timing.measure import Policy, Timing

PRUNERS: dict[str, Callable[[], BasePruner]] = {
    "ours": make_pruner,
    "early": lambda: PercentilePruner(25.0, n_startup_trials=8, n_warmup_steps=1),
    "strict": lambda: PercentilePruner(10.0, n_startup_trials=8, n_warmup_steps=3),
    "median": lambda: PercentilePruner(50.0, n_startup_trials=8, n_warmup_steps=3),
    "wilcoxon": lambda: WilcoxonPruner(p_threshold=0.1, n_startup_steps=2),
}
FINALISTS = 5
SIGMA = 1.349
"""Interquartile range of a normal distribution, in its deviations."""


@dataclass(frozen=True)
class Search:
    """A replayed search: seconds measured, the winner, and fractions of the optimum and pruned."""

    seconds: float
    winner: Entry
    fraction: float
    pruned: float


def samples_of(path: Path) -> dict[Entry, Sequence[float]]:
    """The recorded samples of each entry of one of Kernel Tuner's files, in seconds."""
    document = json.loads(gzip.decompress(path.read_bytes()))
    names = document["tune_params_keys"]
    return {
        tuple(row[name] for name in names): [t / 1e3 for t in row.get("times", ())]
        for row in document["cache"].values()
    }


def spreads_of(path: Path) -> dict[str, float]:
    """Interquartile ranges over medians of our records, by schedule."""
    rows = map(json.loads, path.read_text().splitlines())
    return {
        json.dumps(r["schedule"], sort_keys=True): r["spread"] / r["seconds"]
        for r in rows
        if r.get("seconds")
    }


def search(
    space: Recording,
    noise: Callable[[Entry, random.Random], float],
    pruner: BasePruner,
    seed: int,
    count: int,
) -> Search:
    """A cold search of `count` measurements."""
    policy, clock, pruned = Policy(), 0.0, 0
    draw = random.Random(seed)
    sampler = make_sampler(DEFAULT_SAMPLER, space.finite, seed)
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.enqueue_trial(space.point(space.start))
    whole: dict[Entry, float] = {}
    for number in range(min(count, len(space.times))):
        trial = study.ask()
        entry = space.entries[space.finite.suggest(trial)]
        if space.times[entry] is None:
            study.tell(trial, state=TrialState.FAIL)
            continue
        samples: list[float] = []
        clock += 2 * noise(entry, draw)
        while True:
            samples.append(noise(entry, draw))
            clock += max(policy.sample_seconds, samples[-1])
            trial.report(samples[-1], len(samples) - 1)
            if number and trial.should_prune():
                study.tell(trial, state=TrialState.PRUNED)
                pruned += 1
                break
            enough = len(samples) >= policy.repetitions and len(samples) % 2
            if enough and (
                Timing(tuple(samples)).uncertainty <= policy.precision
                or len(samples) >= policy.most_repetitions
            ):
                whole[entry] = statistics.median(samples)
                study.tell(trial, whole[entry])
                break
    finalists = sorted(whole, key=whole.__getitem__)[:FINALISTS]
    winner = min(finalists, key=lambda e: space.times[e] or 0.0)
    return Search(clock, winner, space.best / (space.times[winner] or 1.0), pruned / count)


SPACES: list[tuple[Recording, Callable[[Entry, random.Random], float]]] = []


def _read(folder: Path) -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    for space in read_recordings(folder):
        path = next(folder.rglob(f"{space.group}/{space.device}.json.gz"), None)
        if path is not None:
            SPACES.append((space, _recorded(space, samples_of(path))))
        else:
            SPACES.append((space, _drawn(space, folder)))


def _recorded(
    space: Recording, samples: dict[Entry, Sequence[float]]
) -> Callable[[Entry, random.Random], float]:
    return lambda entry, draw: draw.choice(samples[entry] or [space.times[entry] or 0.0])


def _drawn(space: Recording, folder: Path) -> Callable[[Entry, random.Random], float]:
    spreads: list[float] = []
    for path in folder.rglob("*.jsonl"):
        spreads += spreads_of(path).values()
    # Of each entry its own would be better, but a recording keeps medians only.
    deviations = [spread / SIGMA for spread in spreads]

    def noise(entry: Entry, draw: random.Random) -> float:
        own = random.Random(str(entry)).choice(deviations)
        return (space.times[entry] or 0.0) * max(0.5, draw.gauss(1.0, own))

    return noise


def _job(job: tuple[int, str, int, int]) -> Search:
    number, name, seed, count = job
    pruner = NopPruner() if name == "none" else PRUNERS[name]()
    return search(*SPACES[number], pruner, seed, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="ours", help="pruners, separated by commas")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    _read(arguments.folder)
    seeds = range(arguments.seeds)
    print(f"{len(SPACES)} spaces, {arguments.seeds} seeds, {arguments.count} measurements")
    print(f"{'pruner':<15}{'time saved':>15}{'pruned':>9}{'best, whole':>15}{'best, pruned':>15}")
    with multiprocessing.get_context("spawn").Pool(
        arguments.jobs, initializer=_read, initargs=(arguments.folder,)
    ) as pool:

        def run(name: str) -> list[list[Search]]:
            jobs = [(n, name, seed, arguments.count) for n in range(len(SPACES)) for seed in seeds]
            found = pool.map(_job, jobs, chunksize=1)
            return [found[k : k + len(seeds)] for k in range(0, len(found), len(seeds))]

        whole = run("none")
        for name in arguments.only.split(","):
            ended = run(name)
            pairs = [
                (w, e)
                for ws, es in zip(whole, ended, strict=True)
                for w, e in zip(ws, es, strict=True)
            ]
            saved = [
                statistics.fmean(
                    1 - e[s].seconds / w[s].seconds for w, e in zip(whole, ended, strict=True)
                )
                for s in seeds
            ]
            same = statistics.fmean(w.winner == e.winner for w, e in pairs)
            near = statistics.fmean(abs(w.fraction / e.fraction - 1) <= 0.01 for w, e in pairs)
            cells = [
                interval([statistics.fmean(space[s].fraction for space in kind) for s in seeds])
                for kind in (whole, ended)
            ]
            pruned = statistics.fmean(e.pruned for _, e in pairs)
            print(
                f"{name:<15}{interval(saved):>15}{pruned:>9.2f}{cells[0]:>15}{cells[1]:>15}"
                f"   same winner {same:.0%}, within 1 % {near:.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
