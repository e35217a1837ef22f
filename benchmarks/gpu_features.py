"""What each feature costs on an NVIDIA GPU: ours with it beside ours without, in one run.

    python -m benchmarks.gpu_features [--only WORD]

In bfloat16, by the default schedule and by what is tuned on record: forward with 16 heads of 4096
queries and keys, width 128, causal; decode of 8 sequences of one query, 32 query and 8 KV heads,
32,768 keys. Each kernel is checked first. Times are medians, on inputs that together are larger
than the L2 cache; ratios are the plain kernel's time over the feature's, by the same kind of
schedule: above 1 it is faster.
"""

from __future__ import annotations

import argparse
import datetime
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from benchmarks.gpu_attention import seconds_of
from metalgen.calls.verify import verify
from metalgen.chips import detect
from metalgen.database.lookup import lookup
from metalgen.devices import get_device
from metalgen.dsl.trace import trace
from metalgen.families import Schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.problem.samples import sample_call
from metalgen.source.hashes import template_hashes

FORWARD = AttentionConfig(128, "bfloat16", causal=True)
DECODE = AttentionConfig(128, "bfloat16", heads_per_kv=4, causal=True)
SLOPES = mx.arange(64).astype(mx.float32) / 64


@dataclass(frozen=True)
class Row:
    """A kernel and its sizes; `base` names the row that it is compared with."""

    name: str
    base: str
    config: AttentionConfig
    family: str
    batch: int
    kv_heads: int
    q_len: int
    kv_len: int


def rows() -> Iterator[Row]:
    """The rows of the table, each after its base."""
    slopes = trace(lambda s, b, h, i, j: s - SLOPES[h] * (i - j), "score_mod")
    scores: dict[str, dict[str, Any]] = {
        "plain": {},
        "softcap 50": {"softcap": 50.0},
        "ALiBi": {"alibi": True},
        "ALiBi as a function": {"score_mod": slopes.graph.text},
        "bias": {"bias": True},
        "boolean mask": {"array_mask": True, "causal": False},
        "sinks": {"sinks": True},
        "dropout 0.1": {"dropout": 0.1},
        "rotary queries": {"rope": "half"},
        "lengths of keys": {"kv_lens": True},
        "pages of 64": {"page_size": 64},
        "packed": {"varlen": True},
        "log-sum-exp": {"return_lse": True},
    }
    for name, fields in scores.items():
        yield Row(name, "plain", replace(FORWARD, **fields), "forward", 1, 16, 4096, 4096)
    caches: dict[str, dict[str, Any]] = {
        "decode": {},
        "decode, lengths of keys": {"kv_lens": True},
        "decode, pages of 16": {"page_size": 16},
        "decode, pages of 64": {"page_size": 64},
        "decode, 8 bits": {"kv_bits": 8},
        "decode, 4 bits": {"kv_bits": 4},
        "decode, 4 bits, pages of 64": {"kv_bits": 4, "page_size": 64},
        "decode, deterministic": {"deterministic": True},
        "decode, rotary queries": {"rope": "half"},
    }
    for name, fields in caches.items():
        yield Row(name, "decode", replace(DECODE, **fields), "decode", 8, 8, 1, 32768)
    latent = AttentionConfig(576, "bfloat16", value_head_dim=512, heads_per_kv=16)
    yield Row("MLA decode 576/512", "", latent, "decode", 8, 1, 1, 32768)


def tuned(row: Row) -> Schedule | None:
    """The schedule on record for this GPU."""
    problem = Problem(
        row.config, row.batch * row.kv_heads * row.config.heads_per_kv, row.q_len, row.kv_len
    )
    hit = lookup(
        problem, detect(), template_hashes(row.family, "cuda"), limits=get_device("cuda").limits
    )
    return hit.schedule if hit and hit.exact else None


def measured(row: Row, schedule: Schedule) -> float:
    """Median seconds of a row's kernel, which was checked."""
    device = get_device("cuda")
    check = verify(device, row.config, schedule)
    if not check.ok:
        raise RuntimeError(f"WRONG: {check.detail}")
    run = device.build(row.config, schedule)
    calls = [
        sample_call(
            row.config,
            batch=row.batch,
            kv_heads=row.kv_heads,
            q_len=row.q_len,
            kv_len=row.kv_len,
            seed=seed,
            ragged=False,
        )
        for seed in (1, 2)
    ]
    for q, k, v, given in calls:
        mx.eval(q, k, v, *given.arrays)

    def call(q: mx.array, k: mx.array, v: mx.array, given: Inputs) -> mx.array:
        return run(q, k, v, 0.08, given)[0]

    return seconds_of(call, calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    info = mx.device_info(mx.Device(mx.gpu, 0))
    today = datetime.date.today().isoformat()
    versions = f"MLX {mx.__version__}, Python {platform.python_version()}"
    print(f"{today}, {info['device_name']}, {versions}, measured")
    device = get_device("cuda")
    found: dict[tuple[str, str], float] = {}
    for row in rows():
        if options.only not in row.name and row.name not in ("plain", "decode"):
            continue
        schedules = {"default": default_schedule(row.config, device.limits, row.family)}
        if (known := tuned(row)) is not None:
            schedules["tuned"] = known
        for kind, schedule in schedules.items():
            try:
                seconds = found[kind, row.name] = measured(row, schedule)
            except (RuntimeError, ValueError) as error:
                print(f"{row.name:28} {kind}: {type(error).__name__}: {str(error)[:200]}")
                continue
            base = found.get((kind, row.base), float("nan"))
            print(
                f"{row.name:28} {kind:8} {seconds * 1e3:8.3f} ms {base / seconds:6.2f}  {schedule}",
                flush=True,
            )
            mx.clear_cache()


if __name__ == "__main__":
    main()
