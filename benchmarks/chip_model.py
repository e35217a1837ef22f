"""The chip model beside published measurements, what it picks, and how quick it is.

    python benchmarks/chip_model.py [--published FILE.csv] [--tiles FILE.csv]

Without tables it prints the picks and the speed only. The tables are other people's measurements
and are no part of the project: `--published` takes rows of MLX's attention kernel (columns as in
docs/chip-model.md), `--tiles` metal-flash-attention's tiles by head dimension. Nothing is fitted.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from metalgen.chips import Chip, UnknownChip, get_chip
from metalgen.chips.counts import forward_counts, pass_sums
from metalgen.chips.model import estimate, predict
from metalgen.chips.work import Work
from metalgen.config import AttentionConfig
from metalgen.problem import Problem
from metalgen.schedule import Schedule, default_schedule, is_valid, padded

# A pass of MLX's kernel, a simdgroup: (keys, half-registers, threadgroup loads, other loads and
# stores, arithmetic), counted in code of Mesa's compiler for M1 and M2 (the last two at D=128 by
# what remains of 751 instructions).
MLX_PASS = {64: (32, 156, 144, 34, 393), 128: (16, 180, 160, 34, 430)}


def mlx_work(head_dim: int, causal: bool, batch_heads: int, q_len: int, kv_len: int) -> Work:
    """The work of MLX's own attention kernel (32 rows, 4 simdgroups), half precision."""
    bk, registers, loads, others, arithmetic = MLX_PASS[head_dim]
    passes = batch_heads * pass_sums(q_len, kv_len, 32, bk, None, 0 if causal else None)[0]
    groups = batch_heads * -(-q_len // 32)
    live = 4 * passes  # it skips whole groups only
    row = 2 * head_dim
    tile = passes * bk * row * 2
    q_bytes = batch_heads * q_len * row
    return Work(
        groups=groups,
        simdgroups=4,
        registers=registers,
        threadgroup_memory=32 * (row + 16) + max((bk + 8) * row, bk * (row + 16)),
        products=live * 2 * bk // 8 * head_dim // 8,
        exponentials=live * (2 * bk // 8 + 1),
        shuffles=live * 16,
        moves=live * (loads + others),
        arithmetic=live * arithmetic,
        wide=False,
        spill_uses=live * bk // 8,
        loop=720,
        on_core_bytes=live * loads * 64 + tile,
        direct_bytes=0,
        other_bytes=tile + 2 * q_bytes,
        distinct_bytes=batch_heads * kv_len * row * 2 + 2 * q_bytes,
        reused_bytes=kv_len * row * 2,
        heads=batch_heads,
        slices=2 * passes,
        reads=0,
        masked=0.0,
        two_buffers=False,
        longest=-(-kv_len // bk) * groups / passes,
    )


def published(path: Path) -> None:
    print("MLX's kernel, modelled against published times (milliseconds)")
    errors = defaultdict(list)
    reasons: dict[str, int] = defaultdict(int)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            chip = _chip(row)
            if "MLX SDPA steel" not in row["kernel"]:
                reasons["another kernel"] += 1
            elif row["direction"] != "fwd" or row["metric"] != "time":
                reasons["not the time of a forward pass"] += 1
            elif chip is None or row["dtype"] != "float16":
                reasons["chip or type not covered"] += 1
            elif "mask" in row["kernel"]:
                reasons["an array mask, which reads memory of its own"] += 1
            elif int(row["D"]) not in MLX_PASS:
                reasons["head dimension not covered"] += 1
            else:
                heads = int(row["B"]) * int(row["H"])
                q_len, kv_len = int(row["Lq"]), int(row["Lk"])
                causal = row["causal"] == "1"
                work = mlx_work(int(row["D"]), causal, heads, q_len, kv_len)
                got = estimate(work, chip).seconds * 1e3
                want = float(row["value"])
                errors[chip.name].append(abs(got / want - 1))
                print(
                    f"  {chip.name:6} D={row['D']:>3} H={heads} L={q_len:<5}"
                    f" measured {want:8.3f}  modelled {got:8.3f}  {got / want - 1:+.0%}"
                )
    for name, values in errors.items():
        print(f"  {name}: {len(values)} rows, median error {statistics.median(values):.1%}")
    for reason, count in reasons.items():
        print(f"  not covered: {count} rows ({reason})")


def _chip(row: dict[str, str]) -> Chip | None:
    name = row["chip"] + (f"-{row['gpu_cores']}" if row["gpu_cores"] else "")
    try:
        return get_chip(name)
    except UnknownChip:
        return None


def tiles(path: Path) -> None:
    """What another project's kernels reach, beside what our model says of our default schedule."""
    print("\nForward, cycles of a scheduler for each 8x8x8 product (16 is the peak)")
    best: dict[tuple[str, str, int], float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            chip = _chip(row)
            if row["kernel"] != "fwd" or chip is None or chip.clock_ghz is None:
                continue
            d, n = int(row["D"]), int(row["N"])
            products = 2 * n * n * d / 512
            cycles = float(row["ms"]) / 1e3 * chip.clock_ghz * 1e9 * chip.cores * 4 / products
            key = (chip.name, row["dtype"], d)
            best[key] = min(best.get(key, 1e9), cycles)
    for (name, dtype, d), measured in sorted(best.items()):
        if d not in (64, 128, 256):
            continue
        config = AttentionConfig(d, "float32" if dtype == "FP32" else "float16")
        chip = get_chip(name)
        problem = Problem(config, 1, 8192, 8192)
        schedule = default_schedule(config)
        seconds = predict(problem, schedule, chip).seconds
        assert chip.clock_ghz is not None
        modelled = seconds * chip.clock_ghz * 1e9 * chip.cores * 4 / (2 * 8192 * 8192 * d / 512)
        print(
            f"  {name:6} {dtype:9} D={d:<4} metal-flash-attention, measured: {measured:5.1f}"
            f"   our default schedule, modelled: {modelled:5.1f}"
        )


def space(config: AttentionConfig) -> Iterator[Schedule]:
    """Every schedule of a plain grid that the config can run."""
    widest = max(padded(config.head_dim), padded(config.v_dim))
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--published", type=Path, help="table of published attention times")
    parser.add_argument("--tiles", type=Path, help="table of metal-flash-attention's tiles")
    arguments = parser.parse_args()
    if arguments.published:
        published(arguments.published)
    if arguments.tiles:
        tiles(arguments.tiles)
    picks()


if __name__ == "__main__":
    main()
