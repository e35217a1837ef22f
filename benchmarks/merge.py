"""How long a merge of many databases takes: ``python -m benchmarks.merge``.

100 databases of 10,000 rows, of which half are in other databases too (with other samples), are
merged into a new one; with --orders 2 also in the reverse order, and the exports are compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from metalgen.config import AttentionConfig
from metalgen.database import exchange
from metalgen.database.measurement import Measurement, host
from metalgen.database.store import Store
from metalgen.problem import Problem
from metalgen.tuning.space import enumerate_valid

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


def merged(path: Path, sources: list[Path]) -> tuple[exchange.Summary, float]:
    """The summary of a merge into a new database, and its seconds."""
    start = time.perf_counter()
    with Store.open(path) as store:
        summary = exchange.merge(store, sources)
    return summary, time.perf_counter() - start


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
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for number in range(options.databases):
            path = Path(folder) / f"{number}.db"
            with Store.open(path) as store:
                run = store.begin_run("M3Max", 0)
                store.add_measurements(
                    dataclasses.replace(m, run=run) for m in rows(number, options.rows)
                )
            sources.append(path)
        print(f"{len(sources)} databases of {options.rows} rows are there", flush=True)
        summary, seconds = merged(Path(folder) / "merged.db", sources)
        print(f"merged in {seconds:.1f} s: {summary}", flush=True)
        if options.orders == 2:
            _, seconds = merged(Path(folder) / "again.db", sources[::-1])
            same = digest(Path(folder) / "merged.db") == digest(Path(folder) / "again.db")
            print(f"in reverse in {seconds:.1f} s; the exports are the same bytes: {same}")


if __name__ == "__main__":
    main()
