"""What the chip model picks, and how quick it is: python benchmarks/chip_model.py

`metalgen chips validate` scores it against tables of measurements.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator

from metalgen.chips import get_chip
from metalgen.chips.model import predict
from metalgen.families import Schedule, default_schedule, is_valid
from metalgen.families.counts import forward_counts
from metalgen.families.sizes import Problem
from metalgen.kinds import SIMDGROUP
from metalgen.problem.config import AttentionConfig


def space(config: AttentionConfig) -> Iterator[Schedule]:
    """Every schedule of a plain grid that the config can run."""
    widest = SIMDGROUP.widest_row(config, 1)
    staging = ("threadgroup", "device")
    for blocks, simdgroups, bk, bd, q, k, v, buffers, width in itertools.product(
        (1, 2, 4),
        (1, 2, 4, 8, 16),
        (8, 16, 32, 64),
        sorted({widest, 128, 64, 32}),
        ("registers", "threadgroup"),
        staging,
        staging,
        (1, 2),
        (2, 4, 8),
    ):
        schedule = Schedule(
            8 * blocks * simdgroups, bk, bd, simdgroups, blocks, q, k, v, buffers, width
        )
        if is_valid(config, schedule):
            yield schedule


def picks() -> None:
    print("\nWhat the model picks, half precision, causal, 32 heads, 4096 queries and keys")
    rates = []
    for name, d in itertools.product(("M1Max", "M3Max", "M4Max", "M5"), (64, 128, 256)):
        chip, config = get_chip(name), AttentionConfig(d, causal=True)
        problem = Problem(config, 32, 4096, 4096)
        schedules = list(space(config))
        start = time.process_time()
        times = [predict(problem, s, chip).seconds for s in schedules]
        rates.append(len(schedules) / (time.process_time() - start))
        best = min(range(len(times)), key=times.__getitem__)
        counts = forward_counts(config, schedules[best], batch_heads=32, q_len=4096, kv_len=4096)
        default = predict(problem, default_schedule(config), chip).seconds
        products = counts.multiply_accumulates
        print(
            f"  {name:6} D={d:<4}{times[best] * 1e3:7.2f} ms (default {default * 1e3:6.2f})"
            f"  {schedules[best]}: threadgroup bytes a product, read"
            f" {counts.threadgroup_read / products:.0f}, written"
            f" {counts.threadgroup_written / products:.0f};"
            f" device bytes read {counts.device_read / products:.0f}"
        )
    print(f"\nSpeed: {min(rates):,.0f} to {max(rates):,.0f} candidates a second of one core's time")


if __name__ == "__main__":
    picks()
