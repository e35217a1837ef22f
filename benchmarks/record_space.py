"""Measure every schedule of one problem on this machine's GPU, as a space to search again.

    python -m benchmarks.record_space --head-dim 128 --dtype bfloat16 --causal --heads-per-kv 4 \\
        --q-len 4096 --budget 500 --out FOLDER

Writes FOLDER/<chip>-<family>-D<head dim>-<queries>x<keys>.jsonl, which `benchmarks.search` reads,
and keeps FOLDER/tuning.db, from which the same command goes on after its budget (in seconds) is
spent. Exit code 3: not every schedule was measured yet.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from metalgen.cli.options import Sizes, config_options
from metalgen.cli.tune import local_gpu
from metalgen.config import AttentionConfig
from metalgen.database.records import write_records
from metalgen.database.store import Store
from metalgen.tuning.measure import Policy
from metalgen.tuning.progress import Progress
from metalgen.tuning.runner import tune

EVERYTHING = 1 << 30


@click.command(help=__doc__)
@config_options
@click.option("--budget", type=float, help="Seconds.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(config: AttentionConfig, sizes: Sizes, budget: float | None, out: Path) -> None:
    chip, device = local_gpu()
    if chip is None or device is None:
        raise click.UsageError("this machine has no known GPU")
    problem = sizes.problem(config)
    counts = {"valid": 0, "tried": 0}

    def observe(p: Progress) -> None:
        counts.update(valid=p.valid, tried=p.tried)
        if p.tried % 25 == 0 and p.phase == "measuring":
            click.echo(f"{p.tried} of {p.valid}, best {p.best_seconds}", err=True)

    out.mkdir(parents=True, exist_ok=True)
    with Store.open(out / "tuning.db") as store:
        tune(
            [problem], chip, store, device=device, trials=EVERYTHING, budget=budget,
            policy=Policy(sample_seconds=0.005, warmup_seconds=0.5), observe=observe,
        )  # fmt: skip
        rows = store.measurements(problem, chip=chip.name, provenance="measured")
    sizes_text = f"{problem.family}-D{config.head_dim}-{problem.q_len}x{problem.kv_len}"
    path = out / f"{chip.name}-{sizes_text}.jsonl"
    click.echo(f"{write_records(path, rows)} records in {path}; {counts}")
    sys.exit(0 if counts["tried"] == counts["valid"] else 3)


if __name__ == "__main__":
    main()
