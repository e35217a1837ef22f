"""Every family and feature of the CUDA target once, small, for compute-sanitizer:

    MLX_USE_CUDA_GRAPHS=0 compute-sanitizer --tool memcheck --kernel-regex kns=metalgen \\
        python -m benchmarks.sanitize_cuda [--part N/M] [--match backward]

The tools racecheck and synccheck likewise. Each kernel is compared with the reference, too; the
exit code is 1 where one of them is wrong. With --part every M-th kernel is run, from the N-th on: a
checked process keeps one CPU core busy and hardly any GPU, so M of them take about an M-th of the
time. With --match those alone run in whose description the text stands.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

from metalgen.append.launch import kernel_rows, rows_fault
from metalgen.calls.verify import verify
from metalgen.calls.verify_gradients import verify_gradients
from metalgen.calls.verify_sums import sum_fault
from metalgen.devices import Device, get_device
from metalgen.dsl.trace import trace
from metalgen.errors import InvalidSchedule
from metalgen.families import default_schedule
from metalgen.families.append import append_schedule
from metalgen.families.backward import (
    BACKWARD_ALL,
    backward_config,
    backward_families,
    unsupported,
)
from metalgen.families.rules import device_kinds
from metalgen.features.base import Summed
from metalgen.problem.config import AttentionConfig
from metalgen.problem.samples import sample_call

SLOPES = mx.arange(8).astype(mx.float32)
SCORE = trace(
    lambda s, b, h, i, j: 30 * mx.tanh(s / 30) + SLOPES[h] * (j - i), "score_mod"
).graph.text
MASK = trace(lambda b, h, i, j: (j <= i) & (i - j < 40), "mask_mod").graph.text
CONFIGS = (
    AttentionConfig(64, "bfloat16", causal=True, return_lse=True),
    AttentionConfig(128, "float16", heads_per_kv=2),
    AttentionConfig(72, "float16", value_head_dim=20, causal=True),
    AttentionConfig(9, "bfloat16"),
    AttentionConfig(64, "float16", causal=True, window_left=20),
    AttentionConfig(64, "bfloat16", softcap=20.0),
    AttentionConfig(256, "float16"),
    AttentionConfig(64, "float32", causal=True),
    AttentionConfig(64, "bfloat16", alibi=True, sinks=True, heads_per_kv=2),
    AttentionConfig(64, "float16", bias=True, dropout=0.2),
    AttentionConfig(72, "float16", array_mask=True, causal=True),
    AttentionConfig(64, "bfloat16", varlen=True, causal=True, heads_per_kv=3),
    AttentionConfig(64, "bfloat16", kv_lens=True, rope="half"),
    AttentionConfig(64, "float16", page_size=16, varlen=True, rope="pairs", rope_dims=32),
    AttentionConfig(128, "bfloat16", page_size=24, kv_bits=4, kv_group=32),
    AttentionConfig(64, "float32", kv_bits=8, page_size=64, sinks=True),
    AttentionConfig(128, "float16", kv_bits=8, kv_group=64, value_bits=4, value_group=32),
    AttentionConfig(576, "bfloat16", value_head_dim=512, heads_per_kv=4),
    AttentionConfig(64, "bfloat16", max_work=1 << 16, causal=True),
    AttentionConfig(64, "bfloat16", deterministic=True),
    AttentionConfig(64, "bfloat16", window_left=9, window_right=5, return_lse=True),
    AttentionConfig(64, "float32", tf32=True),
    AttentionConfig(64, "bfloat16", score_mod=SCORE, mask_mod=MASK),
    AttentionConfig(64, "float16", mask_mod=MASK, block_mask=True),
    AttentionConfig(64, "bfloat16", kv_starts=True, kv_lens=True, causal=True),
    AttentionConfig(64, "float16", q_offset=True, alibi=True, alibi_by_sequence=True),
    AttentionConfig(64, "bfloat16", seqused_q=True, rope="half", rope_fixed=True),
    AttentionConfig(64, "float16", causal=True, rope="pairs", rope_tables=True),
)

BACKWARD = tuple(
    config for config in dict.fromkeys(map(backward_config, CONFIGS)) if not unsupported(config)
)
"""What the backward families compute the gradients of."""
APPENDS = (
    AttentionConfig(64, "bfloat16", rope="half"),
    AttentionConfig(72, "float16", value_head_dim=40, kv_lens=True, rope="pairs", rope_dims=32),
    AttentionConfig(64, "float32", kv_bits=8, rope="half"),
    AttentionConfig(128, "bfloat16", page_size=16, kv_bits=4, kv_group=32, rope="half"),
    AttentionConfig(64, "float16", page_size=8, varlen=True),
    AttentionConfig(64, "bfloat16", page_size=8, varlen=True, kv_bits=8, rope="pairs"),
    AttentionConfig(64, "float32", rope="half", rope_tables=True),
)
"""What the append family makes rows of."""


def together(device: Device, bare: AttentionConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    """The kernel that makes all gradients, where a device has it for a config."""
    if device_kinds(device.limits, BACKWARD_ALL.name):
        try:
            schedule = default_schedule(bare, device.limits, BACKWARD_ALL.name)
        except InvalidSchedule:
            return
        yield (
            f"{bare} {BACKWARD_ALL.name} {schedule}",
            lambda: verify_gradients(device, bare, schedule).detail,
        )


def sums(device: Device, bare: AttentionConfig) -> Iterator[tuple[str, Callable[[], str]]]:
    """The kernels that sum the gradients of other inputs."""
    inputs = sample_call(bare, q_len=33, kv_len=33)[3]
    found: dict[str, list[Summed]] = {}
    for feature in bare.features:
        for summed in feature.sums(bare, inputs):
            found.setdefault(summed.array, []).append(summed)
    families = [family.name for family in backward_families(bare)]
    for name, each in found.items():
        schedules = tuple(default_schedule(bare, device.limits, f) for f in families)
        yield (
            f"{bare} backward sums of {name}",
            lambda s=schedules, e=tuple(each): sum_fault(device, bare, s, e),
        )


def kernels(device: Device) -> Iterator[tuple[str, Callable[[], str]]]:
    """What each is, and what runs it and says what is wrong with it."""
    for config in CONFIGS:
        for family in ("forward",) if config.block_mask else ("forward", "decode"):
            default = default_schedule(config, device.limits, family)
            buffers = default.buffers
            if device.language == "cuda":
                buffers = 3 if config.head_dim <= 256 else 2
            values = {"bk": 16, "buffers": buffers}
            if hasattr(default, "key_simdgroups"):
                values |= {"bq": default.bq * default.key_simdgroups, "key_simdgroups": 1}
            other = dataclasses.replace(default, **values)
            for schedule in dict.fromkeys([default, other]):
                yield (
                    f"{config} {family} {schedule}",
                    lambda c=config, s=schedule, f=family: verify(device, c, s).detail,
                )
    for bare in BACKWARD:
        for family in (each.name for each in backward_families(bare)):
            try:
                default = default_schedule(bare, device.limits, family)
            except InvalidSchedule:  # quantized rows
                continue
            values = {"buffers": 1, **({"apart": 1} if "apart" in default.knobs else {})}
            for schedule in dict.fromkeys([default, dataclasses.replace(default, **values)]):
                yield (
                    f"{bare} {family} {schedule}",
                    lambda c=bare, s=schedule: verify_gradients(device, c, s).detail,
                )
        yield from together(device, bare)
        yield from sums(device, bare)
    for config in APPENDS:
        for append in (append_schedule(), append_schedule(32, 1)):
            yield (
                f"{config} append {append}",
                lambda c=config, a=append: rows_fault(c, kernel_rows(c, device, a)),
            )


def part_of(text: str) -> slice:
    """Every M-th from the N-th on, of ``N/M``."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"expected N/M with 1 <= N <= M, got {text!r}")
    return slice(int(first) - 1, None, int(count))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--match", default="", metavar="TEXT")
    parser.add_argument("--part", type=part_of, default=slice(None), metavar="N/M")
    options = parser.parse_args(arguments)
    ran = wrong = 0
    every = kernels(get_device(options.device))
    chosen = [pair for pair in every if options.match in pair[0]]
    for kernel, fault_of in chosen[options.part]:
        fault = fault_of()
        print(kernel, fault or "ok", flush=True)
        ran += 1
        wrong += bool(fault)
        mx.clear_cache()
    print(f"{ran} kernels, {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
