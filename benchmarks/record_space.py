"""Measure schedules of the GPU table's problems on this machine, and keep the rows.

    python -m benchmarks.record_space DATABASE [--only NAME]... [--whole] [--budget SECONDS]

Of each problem as many schedules are measured as a search tries, or --trials; with --whole every
valid one, each to its end (nothing is pruned), in a random order: a space that searches can be
replayed on. `metalgen.tuning.runner.tune` does it, with helpers that compile ahead: rows are
committed when they are measured, and the same command goes on after a cut. The best are raced
against the default and MLX's own attention, and checked against float64.

A forward space has 574 or 576 schedules, a decode space some 3,136: on an H200 with 14 helpers a
forward space is meant to fit into 240 seconds, and a decode space into several runs of 240. To
record three spaces, one of them with a feature, and to write the files that
`benchmarks.search` and `benchmarks.pruning` read:

    for name in forward 64 128-causal-softcap; do
      python -m benchmarks.record_space spaces.db --whole --only $name --jobs 14 --budget 240
    done
    METALGEN_DB=spaces.db metalgen db export benchmarks/spaces/h200/DATE.jsonl --measured
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path

from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

PLAIN = AttentionConfig(128, "bfloat16", causal=True)
GROUPED = dataclasses.replace(PLAIN, heads_per_kv=4)
LATENT = AttentionConfig(576, "bfloat16", value_head_dim=512, heads_per_kv=16)
PROBLEMS = {
    "forward": Problem(PLAIN, 64, 4096, 4096),
    "decode": Problem(GROUPED, 32, 1, 32768),
    "decode-8": Problem(GROUPED, 256, 1, 32768),
    "window": Problem(dataclasses.replace(PLAIN, window_left=1023), 64, 16384, 16384),
    "long": Problem(PLAIN, 64, 16384, 16384),
    "pages": Problem(dataclasses.replace(GROUPED, page_size=64), 256, 1, 32768),
    "8-bit": Problem(dataclasses.replace(GROUPED, kv_bits=8), 256, 1, 32768),
    "4-bit": Problem(dataclasses.replace(GROUPED, kv_bits=4), 256, 1, 32768),
    "latent": Problem(LATENT, 128, 1, 32768),
} | {
    f"{dim}{'-causal' if causal else ''}{'-softcap' if cap else ''}": Problem(
        AttentionConfig(dim, "bfloat16", causal=causal, softcap=cap), 64, 4096, 4096
    )
    for dim in (64, 128)
    for causal in (False, True)
    for cap in (None, 50.0)
    if (dim, causal, cap) != (128, True, None)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", type=Path)
    parser.add_argument("--only", choices=PROBLEMS, action="append")
    parser.add_argument("--trials", type=int, help="schedules of each problem; default: 100")
    parser.add_argument("--whole", action="store_true", help="every valid schedule, to its end")
    parser.add_argument("--jobs", type=int, help="helper processes; default: as metalgen tune")
    parser.add_argument("--budget", type=float, default=400.0, help="seconds for all together")
    options = parser.parse_args()

    from metalgen.chips import detect
    from metalgen.database.store import Store
    from metalgen.database.winners import ordered
    from metalgen.devices import get_device
    from metalgen.families import enumerate_valid
    from metalgen.tuning.runner import tune
    from metalgen.tuning.workers.helpers import usual_jobs

    chip, device = detect(), get_device()
    if chip is None or not device.has_clock:
        raise SystemExit("this machine has no GPU of a known chip")
    jobs = usual_jobs(device) if options.jobs is None else options.jobs
    deadline = time.perf_counter() + options.budget
    for name in options.only or list(PROBLEMS):
        problem = PROBLEMS[name]
        valid = len(enumerate_valid(problem.config, device.limits, problem.family))
        trials = valid if options.whole else options.trials
        begin = time.perf_counter()
        if begin >= deadline:
            print(f"{name}: the time is over", flush=True)
            continue
        with Store.open(options.database) as store:
            report = tune(
                *([problem], chip, store),
                device=device,
                trials=trials,
                jobs=jobs,
                budget=deadline - begin,
                prune=not options.whole,
            )
            rows = store.measurements(problem, chip=chip.name, provenance="measured")
        failed = sum(m.status != "ok" for m in rows)
        seconds = time.perf_counter() - begin
        print(
            f"{name}: {valid} valid, {len(rows)} rows, {failed} failed, {seconds:.0f} s, "
            f"{report.stopped or 'finished'}"
        )
        for m in ordered(m for m in rows if m.phase == "final"):
            checked = "" if m.verified else " unchecked"
            print(f"    {(m.seconds or 0) * 1e3:.4f} ms {m.schedule}{checked} {m.detail}")
        for m in [m for m in rows if m.phase == "final"][:1]:
            print(f"    default {m.default_seconds}, MLX {m.mlx_seconds}", flush=True)
        if report.stopped == "interrupted":
            return


if __name__ == "__main__":
    main()
