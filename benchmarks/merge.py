"""How long a merge of many databases takes: ``python -m benchmarks.merge``.

100 databases of 10,000 rows, of which half are in other databases too (with other samples), are
merged into a new one; with --orders 2 also in the reverse order, and the exports are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import os
import platform
import random
import resource
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from metalgen.database import exchange
from metalgen.database.measurement import Measurement, host
from metalgen.database.merging import merge_rows
from metalgen.database.rows import row_of_measurement
from metalgen.database.store import Store
from metalgen.families import enumerate_valid
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

CONFIGS = [
    AttentionConfig(64, dtype, heads_per_kv=heads, causal=causal)
    for dtype, heads, causal in itertools.product(("float16",), (1, 4), (False, True))
]


def rows(number: int, count: int) -> Iterator[Measurement]:
    """The rows of the `number`-th database."""
    for place in range(count):
        shared = place % 2 == 0
        draw = random.Random(f"{place}" if shared else f"{number} {place}")
        config = draw.choice(CONFIGS)
        size = 1 << draw.randrange(5, 15)
        own = random.Random(f"{number} {place} t")
        samples = tuple(own.random() for _ in range(7))
        yield Measurement(
            problem=Problem(config, 1 << draw.randrange(8), size, size, family="forward"),
            schedule=draw.choice(enumerate_valid(config)),
            template_hash="0123456789abcdef",
            chip=draw.choice(("M1Max", "M3Max", "M4Max")),
            cores=40,
            device="metal",
            provenance="measured",
            policy="benchmark",
            seconds=statistics.median(samples),
            samples=samples,
            verified=True,
            created="2026-11-21T08:00:00Z",
            **host(),
        )


def make(path: Path, number: int, count: int) -> None:
    """The `number`-th database, unless it is there."""
    if not path.exists():
        with Store.open(path) as store:
            merge_rows(store, map(row_of_measurement, rows(number, count)))


def merged(path: Path, sources: list[Path]) -> tuple[exchange.Summary, float, float]:
    """The summary of a merge into a new database, its seconds and those of the processor."""
    start, busy = time.perf_counter(), time.process_time()
    with Store.open(path) as store:
        summary = exchange.merge(store, sources)
    return summary, time.perf_counter() - start, time.process_time() - busy


def digest(path: Path) -> str:
    """SHA-256 of the export."""
    found = hashlib.sha256()
    with Store.open(path) as store:
        for line in exchange.export(store):
            found.update(line.encode() + b"\n")
    return found.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--databases", type=int, default=100)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--orders", type=int, default=1, choices=(1, 2))
    parser.add_argument("--folder", type=Path, help="where to keep the databases for another time")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"SQLite {sqlite3.sqlite_version}; load before it {os.getloadavg()[0]:.1f}"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        sources = [folder / f"{number}.db" for number in range(options.databases)]
        for number, path in enumerate(sources):
            make(path, number, options.rows)
        size = sum(path.stat().st_size for path in sources) / 2**20
        print(f"{len(sources)} databases of {options.rows} rows, {size:.0f} MiB", flush=True)
        results = [Path(scratch) / f"merged-{n}.db" for n in range(options.orders)]
        for path, order in zip(results, (sources, sources[::-1]), strict=False):
            summary, seconds, busy = merged(path, order)
            count = len(sources) * options.rows
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"merged in {seconds:.1f} s ({busy:.1f} s of processor time, "
                f"{1e6 * busy / count:.0f} us a row, load {os.getloadavg()[0]:.1f}), "
                f"at most {memory:.2f} GiB: {summary}",
                flush=True,
            )
        if options.orders == 2:
            same = len({digest(path) for path in results}) == 1
            print(f"in reverse the export is the same bytes: {same}")


if __name__ == "__main__":
    main()
