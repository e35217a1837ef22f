"""How near searches come to the optimum: ``python -m benchmarks.search FOLDER``.

Each search replays every recorded space under FOLDER once a seed. Printed is the fraction of
the optimum (best time there is over best time found) after 15, 25, 50, 100 and 200 measurements,
as the mean over spaces and seeds with a 95 % interval of the mean over seeds (normal), and the
processor time of an ask. A point that failed when it was recorded costs a measurement; before the
first that ran the fraction is 0.

All begin with the same default: our default schedule, or the middle entry of a public recording.
"cold" is our sampler with nothing else. "warm" has up to 12 points more to start with, which were
best in the neighbouring recordings: those of the same kernel and problem on all other devices
(none of this one), or where there are none, those of our other problems of the same family on this
device. In "warm" the neighbours' whole recordings are known; in "tuned" only what a cold search of
100 measurements, with a seed of its own, found on each. Spaces without neighbours are left out of
both.

FOLDER holds our records (``.jsonl``: `metalgen db export` of a database that
`benchmarks.record_space` filled) and Kernel Tuner's cache files (``.json.gz``), one subfolder a
kernel.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping
from multiprocessing.pool import Pool
from pathlib import Path

import optuna

from metalgen.errors import ArgumentError
from metalgen.tuning.search.named import DEFAULT_SAMPLER, check_sampler, make_sampler
from metalgen.tuning.search.replay import Entry, Recording, read_recordings
from metalgen.tuning.search.starts import borrow

AT = (15, 25, 50, 100, 200)
SEARCHES = {
    "random": ("random", ""),
    "TPE": ("tpe", ""),
    "CMA-ES": ("cmaes", ""),
    "Optuna's GP": ("gp", ""),
    "cold": (DEFAULT_SAMPLER, ""),
    "tuned": (DEFAULT_SAMPLER, "tuned"),
    "warm": (DEFAULT_SAMPLER, "recorded"),
}
"""By the names of the table: a sampler, and what it starts from."""
TUNED = 100
"""Measurements of the cold searches that "tuned" starts from."""
OTHER_SEED = 1_000_000
"""Added to the seed of those."""

Table = Mapping[Entry, float]
Job = tuple[int, str, int, tuple[Entry, ...], int]


def measure(
    space: Recording, sampler: str, seed: int, count: int, first: tuple[Entry, ...] = ()
) -> dict[Entry, float | None]:
    """What a search of `count` measurements sees, in its order."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=make_sampler(sampler, space.finite, seed))
    for entry in dict.fromkeys((space.start, *first)):
        study.enqueue_trial(space.point(entry))
    found: dict[Entry, float | None] = {}
    while len(found) < min(count, len(space.times)):
        trial = study.ask()
        entry = space.entries[space.finite.suggest(trial)]
        seconds = found[entry] = space.times[entry]
        if seconds is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, seconds)
    return found


def replay(
    space: Recording, sampler: str, seed: int, first: tuple[Entry, ...] = (), count: int = AT[-1]
) -> list[float]:
    """The fraction of the optimum after each of `AT` measurements, up to `count`."""
    times = list(measure(space, sampler, seed, count, first).values())
    ran = [[t for t in times[:n] if t is not None] for n in AT if n <= count]
    return [space.best / min(some) if some else 0.0 for some in ran]


def neighbours(space: Recording, spaces: list[Recording]) -> list[int]:
    """The places of the recordings that a warm search starts from."""
    same = [n for n, s in enumerate(spaces) if s.group == space.group and s.device != space.device]
    return same or [
        n
        for n, s in enumerate(spaces)
        if space.family and s.family == space.family and s.device == space.device and s != space
    ]


def translated(entry: Entry, source: Recording, space: Recording) -> Entry:
    """An entry of a neighbour here: what has one value in either space takes that of this one."""
    pairs = zip(entry, source.parameters, space.parameters, strict=True)
    return tuple(
        here.choices[0] if len(there.choices) == len(here.choices) == 1 else value
        for value, there, here in pairs
    )


def starts(
    space: Recording, sources: list[tuple[Recording, Mapping[Entry, float | None]]]
) -> tuple[Entry, ...]:
    """Up to 12 points of this space that were best in what is known of the neighbours."""
    tables: list[dict[Entry, float]] = []
    for source, times in sources:
        here = ((translated(entry, source, space), t) for entry, t in times.items())
        tables.append({entry: t for entry, t in here if t is not None and entry in space.times})
    return tuple(borrow(tables))


SPACES: list[Recording] = []
"""What the worker processes search; they read it anew."""


def _job(job: Job) -> tuple[list[float], float]:
    begin = time.process_time()
    reached = replay(SPACES[job[0]], *job[1:])
    return reached, (time.process_time() - begin) / min(job[4], len(SPACES[job[0]].times))


def _tuned(job: tuple[int, int]) -> dict[Entry, float | None]:
    return measure(SPACES[job[0]], DEFAULT_SAMPLER, OTHER_SEED + job[1], TUNED)


def interval(by_seed: list[float]) -> str:
    """Mean and the half-width of its 95 % interval."""
    half = 1.96 * statistics.stdev(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 else 0.0
    return f"{statistics.fmean(by_seed):.3f} ±{half:.3f}"


def row(label: str, results: list[list[list[float]]], seconds: float) -> str:
    """A line of the table, of results by space, seed and place in `AT`."""
    cells = []
    for place in range(len(results[0][0])):
        by_seed = zip(*[[reached[place] for reached in seeds] for seeds in results], strict=True)
        cells.append(interval([statistics.fmean(means) for means in by_seed]))
    cells += [""] * (len(AT) - len(cells))
    return f"{label:<22}" + "".join(f"{cell:>15}" for cell in cells) + f"{seconds * 1e3:>9.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="searches, separated by commas")
    parser.add_argument("--spaces", action="store_true", help="a line for each space too")
    parser.add_argument("--every", type=int, default=1, help="search every Nth space only")
    parser.add_argument("--count", type=int, default=AT[-1], choices=AT, help="measurements")
    arguments = parser.parse_args()
    SPACES.extend(read_recordings(arguments.folder))
    searched = range(0, len(SPACES), arguments.every)
    near = {n: neighbours(SPACES[n], SPACES) for n in searched}
    for n in searched:
        s = SPACES[n]
        ran = sum(t is not None for t in s.times.values())
        print(f"{s.group} on {s.device}: {len(s.times)} points, {ran} ran, {len(near[n])} near")
    print(f"fraction of the optimum, {len(searched)} spaces, {arguments.seeds} seeds")
    print(f"{'search':<22}" + "".join(f"{n:>15}" for n in AT) + f"{'ms/ask':>9}")
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # Workers start anew, so that these variables count; what they search is read again.
    names = arguments.only.split(",") if arguments.only else list(SEARCHES)
    with multiprocessing.get_context("spawn").Pool(
        arguments.jobs, initializer=_read, initargs=(arguments.folder,)
    ) as pool:
        for name in names:
            _search(name, pool, near, arguments)


def _search(
    name: str, pool: Pool, near: Mapping[int, list[int]], arguments: argparse.Namespace
) -> None:
    """Replay one search on every space and seed, and print its line."""
    sampler, start = SEARCHES[name]
    try:
        check_sampler(sampler)
    except ArgumentError as error:
        print(f"{name:<22} left out: {error}", flush=True)
        return
    seeds = range(arguments.seeds)
    mine = [n for n in near if near[n] or not start]
    if not mine:
        return
    known: dict[tuple[int, int], Mapping[Entry, float | None]] = {}
    if start == "tuned":
        needed = [(n, seed) for n in sorted({m for n in mine for m in near[n]}) for seed in seeds]
        known.update(zip(needed, pool.map(_tuned, needed, chunksize=1), strict=True))
    jobs: list[Job] = []
    for n in mine:
        for seed in seeds:
            sources = [(SPACES[m], known.get((m, seed), SPACES[m].times)) for m in near[n]]
            first = starts(SPACES[n], sources) if start else ()
            jobs.append((n, sampler, seed, first, arguments.count))
    found = pool.map(_job, jobs, chunksize=1)
    by_space = [found[place : place + len(seeds)] for place in range(0, len(found), len(seeds))]
    results = [[reached for reached, _ in own] for own in by_space]
    print(row(name, results, statistics.fmean(s for _, s in found)), flush=True)
    if arguments.spaces:
        for n, own in zip(mine, by_space, strict=True):
            label = f"  {SPACES[n].group[:12]} {SPACES[n].device}"[:22]
            print(
                row(label, [[r for r, _ in own]], statistics.fmean(s for _, s in own)), flush=True
            )


def _read(folder: Path) -> None:
    SPACES.extend(read_recordings(folder))


if __name__ == "__main__":
    main()
