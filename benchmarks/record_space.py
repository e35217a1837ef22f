"""Measure schedules of the GPU table's problems on this machine, and keep the rows.

    python -m benchmarks.record_space DATABASE [--only NAME] [--sample N] [--processes 12]

Of "forward" and "decode" every valid schedule, of the others the default and a seeded sample of N.
Processes compile side by side and time one at a time, under a lock. A row is committed when it is
measured, so that a run can be cut short and go on. Then each problem is tuned from these rows: the
best are measured again, interleaved with the default and MLX's own attention, and checked against
float64.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing as mp
import random
import time
from pathlib import Path
from typing import Any

from metalgen.config import AttentionConfig
from metalgen.problem import Problem

PLAIN = AttentionConfig(128, "bfloat16", causal=True)
GROUPED = dataclasses.replace(PLAIN, heads_per_kv=4)
PROBLEMS = {
    "forward": Problem(PLAIN, 64, 4096, 4096),
    "decode": Problem(GROUPED, 32, 1, 32768),
    "decode-8": Problem(GROUPED, 256, 1, 32768),
    "window": Problem(dataclasses.replace(PLAIN, window_left=1023), 64, 16384, 16384),
    "long": Problem(PLAIN, 64, 16384, 16384),
} | {
    f"{dim}{'-causal' if causal else ''}{'-softcap' if cap else ''}": Problem(
        AttentionConfig(dim, "bfloat16", causal=causal, softcap=cap), 64, 4096, 4096
    )
    for dim in (64, 128)
    for causal in (False, True)
    for cap in (None, 50.0)
    if (dim, causal, cap) != (128, True, None)
}
WHOLE = ("forward", "decode")


def work(path: Path, name: str, tasks: Any, lock: Any, deadline: float) -> None:
    """Measure what the queue holds, until it is empty or the time is over."""
    import mlx.core as mx

    from metalgen.database.measurement import Measurement, host
    from metalgen.database.store import Store
    from metalgen.devices import get_device
    from metalgen.render import template_hash
    from metalgen.tuning.measure import Bench, Policy
    from metalgen.tuning.verifying import failure_status, first_line

    problem, device = PROBLEMS[name], get_device()
    policy = Policy()
    software = {"mlx": host()["mlx_version"], "os": host()["os"].partition(".")[0]}
    policy_key = json.dumps(
        json.loads(policy.key) | software, sort_keys=True, separators=(",", ":")
    )
    config = problem.config
    tiny = [
        mx.zeros((1, heads, 1, width), getattr(mx, config.dtype))
        for heads, width in (
            (config.heads_per_kv, config.head_dim),
            (1, config.head_dim),
            (1, config.v_dim),
        )
    ]
    with lock:
        bench = Bench(problem, policy)
    known: dict[str, Any] = {
        "problem": problem,
        "template_hash": template_hash(problem.family, device.target or ""),
        "device": device.name,
        "provenance": "measured",
        "policy": policy_key,
        **host(),
    }
    with Store.open(path, busy=60.0) as store:
        while time.time() < deadline and (task := tasks.get()) is not None:
            schedule, chip, cores, run = task
            row = known | {"schedule": schedule, "chip": chip, "cores": cores, "run": run}
            try:
                runner = device.build(config, schedule, problem.family)
                mx.eval(runner(tiny[0], tiny[1], tiny[2], 1.0)[0])  # compiles, off the clock
                with lock:
                    timing = bench.measure(runner)
            except (RuntimeError, ValueError) as error:
                status, detail = failure_status(error), first_line(error)
                store.add_measurement(Measurement(**row, status=status, detail=detail))
                continue
            found = {"seconds": timing.median, "spread": timing.spread, "samples": timing.samples}
            store.add_measurement(Measurement(**row, **found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("database", type=Path)
    parser.add_argument("--only", choices=PROBLEMS)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--budget", type=float, default=400.0)
    options = parser.parse_args()

    from metalgen.chips import detect
    from metalgen.database.store import Store
    from metalgen.devices import get_device
    from metalgen.tuning.runner import tune
    from metalgen.tuning.space import enumerate_valid

    chip, limits = detect(), get_device().limits
    assert chip is not None, "this machine's chip is not on record"
    deadline = time.time() + options.budget
    context = mp.get_context("spawn")
    lock = context.Lock()
    for name in [options.only] if options.only else list(PROBLEMS):
        problem = PROBLEMS[name]
        valid = enumerate_valid(problem.config, limits, problem.family)
        with Store.open(options.database) as store:
            done = {m.schedule for m in store.measurements(problem, provenance="measured")}
            run = store.begin_run(chip.name, 0, {"exhaustive": name})
        chosen = valid
        if name not in WHOLE:
            chosen = random.Random(0).sample(valid, min(options.sample, len(valid)))
        left = [schedule for schedule in chosen if schedule not in done]
        tasks = context.Queue()
        for schedule in left:
            tasks.put((schedule, chip.name, chip.cores, run))
        for _ in range(options.processes):
            tasks.put(None)
        begin = time.time()
        workers = [
            context.Process(target=work, args=(options.database, name, tasks, lock, deadline))
            for _ in range(options.processes)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        tasks.cancel_join_thread()
        with Store.open(options.database) as store:
            store.end_run(run, "finished")
            tried = {m.schedule for m in store.measurements(problem, provenance="measured")}
            tune([problem], chip, store, device=get_device(), trials=len(tried))
            rows = store.measurements(problem, provenance="measured")
        finals = [m for m in rows if m.phase == "final" and m.seconds]
        print(f"{name}: {len(valid)} valid, {len(rows)} rows, {time.time() - begin:.0f} s")
        for m in sorted(finals, key=lambda m: m.seconds or 0.0):
            print(f"    {(m.seconds or 0) * 1e3:.4f} ms {m.schedule} {'' if m.verified else '?'}")
        for m in finals[:1]:
            print(f"    default {m.default_seconds}, MLX {m.mlx_seconds}", flush=True)


if __name__ == "__main__":
    main()
