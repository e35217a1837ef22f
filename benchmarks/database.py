"""How long a look-up takes in a database of 100,000 rows: ``python benchmarks/database.py``.

The rows are spread over as many problems, chips and schedules as a well-used shared database
might hold. Opening is reported by itself; the aim is at most 2 ms beyond it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from metalgen.chips import get_chip
from metalgen.database.connect import open_for_reading
from metalgen.database.lookup import lookup
from metalgen.database.measurement import Measurement, host
from metalgen.database.store import Store
from metalgen.families import Schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

HASH = "0123456789abcdef"
CHIPS = ("M1Max", "M3Max", "M3Max-30", "M4Max")


def measurements(count: int, run: str) -> Iterator[Measurement]:
    """`count` modelled rows: 4 chips, 32 configs, lengths and batches, 40 schedules each."""
    configs = [
        AttentionConfig(head_dim=d, dtype=dtype, heads_per_kv=heads, causal=causal)
        for d, dtype, heads, causal in itertools.product(
            (64, 128), ("float16", "bfloat16"), (1, 2, 4, 8), (False, True)
        )
    ]
    lengths = (256, 512, 1024, 2048, 4096, 8192, 16384)
    schedules = [
        Schedule(bq=8 * s, bk=bk, bd=64, simdgroups=s, buffers=b, load_width=w)
        for s, bk, b, w in itertools.product((2, 4), (8, 16, 32), (1, 2), (2, 4, 8))
    ]
    points = list(itertools.product(configs, lengths, (8, 16, 32, 64), CHIPS, schedules))
    random.Random(0).shuffle(points)
    for config, n, heads, chip, schedule in points[:count]:
        yield Measurement(
            problem=Problem(config, heads, n, n),
            schedule=schedule,
            template_hash=HASH,
            chip=chip,
            cores=get_chip(chip).cores,
            device="model",
            provenance="modelled",
            policy="benchmark",
            seconds=1e-3 + (hash((schedule, n)) % 1000) * 1e-6,
            verified=True,
            run=run,
            **host(),
        )


def milliseconds(samples: list[float]) -> str:
    """First, median and worst of some times."""
    first, middle, worst = samples[0], statistics.median(samples), max(samples)
    return f"first {first * 1e3:.3f}, median {middle * 1e3:.3f}, worst {worst * 1e3:.3f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    chip = get_chip("M3Max")
    config = AttentionConfig(head_dim=128, dtype="bfloat16", heads_per_kv=4, causal=True)
    cases = {
        "a row of this chip": (chip, Problem(config, 32, 4096, 4096)),
        "the same chip's other core count": (get_chip("M4Max-32"), Problem(config, 32, 4096, 4096)),
        "a neighbouring bucket": (chip, Problem(config, 512, 1, 131072)),
        "a miss, config known elsewhere": (get_chip("M2"), Problem(config, 512, 1, 131072)),
        "a miss, config unknown": (
            chip,
            Problem(dataclasses.replace(config, head_dim=72), 1, 1, 1),
        ),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuning.db"
        start = time.perf_counter()
        with Store.open(path) as store:
            run = store.begin_run("M3Max", 0)
            kept = store.add_measurements(measurements(rows, run))
        seconds = time.perf_counter() - start
        size = path.stat().st_size / 2**20
        print(f"{kept} rows written in {seconds:.1f} s ({kept / seconds:.0f}/s), {size:.1f} MiB")
        opening = []
        for _ in range(50):
            start = time.perf_counter()
            open_for_reading(path).close()
            opening.append(time.perf_counter() - start)
        print(f"opening: {milliseconds(opening)}")
        for name, (on, problem) in cases.items():
            samples = []
            for _ in range(50):
                start = time.perf_counter()
                hit = lookup(problem, on, HASH, database=path)
                samples.append(time.perf_counter() - start)
            place = hit.place if hit else "no hit"
            print(f"look-up, {name}, opening included: {milliseconds(samples)} ({place})")


if __name__ == "__main__":
    main()
