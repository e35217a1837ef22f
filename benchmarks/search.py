"""How near searches come to the optimum: ``python -m benchmarks.search FOLDER``.

Each strategy searches every recorded space under FOLDER once a seed. Printed is the fraction of
the optimum (best time there is over best time found) after 15, 25, 50, 100 and 200 measurements,
as the mean over spaces and seeds with a 95 % interval of the mean over seeds (normal). A point
that failed when it was recorded costs a measurement. "cold" and "warm" are ours; warm starts from
12 points that were best on the other devices of the same group, as a tuning run does from the
database. FOLDER holds our records (``.jsonl``: `metalgen db export`
of a database that `benchmarks.record_space` filled) and Kernel Tuner's cache
files (``.json.gz``), one subfolder a kernel.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
from pathlib import Path

from metalgen.tuning.replay import Entry, Recording, read_recordings
from metalgen.tuning.search import Search
from metalgen.tuning.starts import borrow

AT = (15, 25, 50, 100, 200)
STRATEGIES = {
    "random": ("random", False),
    "TPE": ("tpe", False),
    "hill climbing": ("climb", False),
    "cold": ("guided", False),
    "warm": ("guided", True),
}


def replay(
    space: Recording, strategy: str, seed: int, first: tuple[Entry, ...] = ()
) -> list[float]:
    """The fraction of the optimum after each of `AT` measurements."""
    search = Search(space, list(space.times), seed, first=first, strategy=strategy)
    best, reached = float("inf"), []
    for _ in range(max(AT)):
        entry = search.ask()
        if entry is not None:
            seconds = space.times[entry]
            search.tell(entry, seconds)
            best = min(best, seconds or best)
        reached.append(space.best / best)
    return [reached[n - 1] for n in AT]


def borrowed(space: Recording, spaces: list[Recording]) -> tuple[Entry, ...]:
    """What won with the same kernel on other devices, where this space has those points."""
    tables = [
        {entry: t for entry, t in other.times.items() if t is not None and entry in space.times}
        for other in spaces
        if other.group == space.group and other.device != space.device
    ]
    return tuple(borrow(tables))


SPACES: list[Recording] = []
"""What the worker processes search; they inherit it."""


def _job(job: tuple[int, str, int, tuple[Entry, ...]]) -> list[float]:
    return replay(SPACES[job[0]], *job[1:])


def interval(by_seed: list[float]) -> str:
    """Mean and the half-width of its 95 % interval."""
    half = 1.96 * statistics.stdev(by_seed) / len(by_seed) ** 0.5 if len(by_seed) > 1 else 0.0
    return f"{statistics.fmean(by_seed):.3f} ±{half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", help="strategies, separated by commas")
    parser.add_argument("--spaces", action="store_true", help="a table for each space too")
    parser.add_argument("--every", type=int, default=1, help="search every Nth space only")
    arguments = parser.parse_args()
    spaces = read_recordings(arguments.folder)
    searched = spaces[:: arguments.every]
    SPACES.extend(searched)
    for s in searched:
        ran = sum(t is not None for t in s.times.values())
        print(f"{s.group} on {s.device}: {len(s.times)} points, {ran} ran")
    print(f"fraction of the optimum, {len(searched)} spaces, {arguments.seeds} seeds")
    print(f"{'strategy':<16}" + "".join(f"{n:>15}" for n in AT))
    names = arguments.only.split(",") if arguments.only else list(STRATEGIES)
    with multiprocessing.get_context("fork").Pool(arguments.jobs) as pool:
        for name in names:
            strategy, warm = STRATEGIES[name]
            jobs = [
                (number, strategy, seed, borrowed(space, spaces) if warm else ())
                for number, space in enumerate(searched)
                for seed in range(arguments.seeds)
            ]
            results = pool.map(_job, jobs, chunksize=1)
            per_space = [
                results[n : n + arguments.seeds] for n in range(0, len(results), arguments.seeds)
            ]
            cells = []
            for place in range(len(AT)):
                means = [
                    statistics.fmean(rows[seed][place] for rows in per_space)
                    for seed in range(arguments.seeds)
                ]
                cells.append(interval(means))
            print(f"{name:<16}" + "".join(f"{cell:>15}" for cell in cells), flush=True)
            if arguments.spaces:
                for space, rows in zip(searched, per_space, strict=True):
                    means = [statistics.fmean(row[p] for row in rows) for p in range(len(AT))]
                    line = "".join(f"{mean:>15.3f}" for mean in means)
                    print(f"  {space.group[:8]} {space.device:<6}{line}", flush=True)


if __name__ == "__main__":
    main()
