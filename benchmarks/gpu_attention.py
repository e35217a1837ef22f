"""Forward attention on an NVIDIA GPU: ours against MLX's own and PyTorch's, in one run.

    python benchmarks/gpu_attention.py [--schedule FIELD=VALUE,...] [--lengths 4096] [--dims 64,128]

Times are medians of repetitions that rotate among several inputs; a row prints every time as a rate
in TFLOP/s, of 4 L^2 D operations a head (half of that if causal), and as a ratio to ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence

import mlx.core as mx

from metalgen.config import AttentionConfig
from metalgen.devices import get_device
from metalgen.reference import attention_mlx
from metalgen.schedule import Schedule, default_schedule
from metalgen.verify import verify

BATCH, HEADS = 4, 16


def mlx_seconds(call: Callable[..., mx.array], inputs: Sequence[tuple[mx.array, ...]]) -> float:
    """Median seconds of a call, over groups of calls that hide the launches."""
    for arrays in inputs:
        mx.eval(call(*arrays))
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.3:
        mx.eval(call(*inputs[0]))
    times = []
    for _ in range(9):
        begin = time.perf_counter()
        mx.eval([call(*inputs[n % len(inputs)]) for n in range(8)])
        times.append((time.perf_counter() - begin) / 8)
    return statistics.median(times)


def torch_seconds(length: int, dim: int, causal: bool) -> dict[str, float]:
    """Median seconds of PyTorch's paths; empty where PyTorch is not installed."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:
        return {}
    arrays = [
        torch.randn(BATCH, HEADS, length, dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(3)
    ]
    found = {}
    for name, backend in (
        ("torch FA2", SDPBackend.FLASH_ATTENTION),
        ("torch cuDNN", SDPBackend.CUDNN_ATTENTION),
    ):
        with sdpa_kernel(backend):
            call = torch.nn.functional.scaled_dot_product_attention
            for _ in range(20):
                call(*arrays, is_causal=causal)
            times = []
            for _ in range(9):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(8):
                    call(*arrays, is_causal=causal)
                end.record()
                torch.cuda.synchronize()
                times.append(start.elapsed_time(end) / 8e3)
        found[name] = statistics.median(times)
    return found


def row(length: int, dim: int, causal: bool, schedules: Sequence[Schedule]) -> None:
    config = AttentionConfig(dim, "bfloat16", causal=causal)
    device = get_device("cuda")
    inputs = [
        tuple(
            mx.random.normal((BATCH, HEADS, length, dim), key=mx.random.key(3 * n + i)).astype(
                mx.bfloat16
            )
            for i in range(3)
        )
        for n in range(4)
    ]
    scale = dim**-0.5
    mask = "causal" if causal else None
    work = 4 * BATCH * HEADS * length * length * dim / (2 if causal else 1)
    print(f"D={dim} L={length} {'causal' if causal else 'dense'}")
    found: dict[str, float] = {}
    for schedule in schedules:
        try:
            check = verify(device, config, schedule)
            run = device.build(config, schedule)
            label = str(schedule) if check.ok else f"WRONG {check.detail} {schedule}"
            found[label] = mlx_seconds(lambda q, k, v, run=run: run(q, k, v, scale)[0], inputs)
        except Exception as error:
            print(f"    {schedule}: {type(error).__name__} {str(error)[:300]}")
    found["MLX fused"] = mlx_seconds(
        lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask),
        inputs,
    )
    if length <= 4096:
        unfused = lambda q, k, v: attention_mlx(q, k, v, scale=scale, causal=causal)[0]  # noqa: E731
        found["MLX plain"] = mlx_seconds(unfused, inputs)
    found |= torch_seconds(length, dim, causal)
    ours = min(seconds for name, seconds in found.items() if "sg" in name)
    for name, seconds in found.items():
        rate = work / seconds / 1e12
        print(f"    {name:60} {seconds * 1e3:8.3f} ms {rate:7.1f} TFLOP/s  {ours / seconds:5.2f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lengths", default="4096")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--schedule", action="append", default=[])
    options = parser.parse_args()
    for dim in map(int, options.dims.split(",")):
        for length in map(int, options.lengths.split(",")):
            for causal in (False, True):
                config = AttentionConfig(dim, "bfloat16", causal=causal)
                base = default_schedule(config, get_device("cuda").limits)
                schedules = [base]
                for change in options.schedule:
                    fields = dict(item.split("=") for item in change.split(","))
                    values = {k: int(v) if v.isdigit() else v for k, v in fields.items()}
                    changed = dataclasses.replace(base, **values)
                    rows = 16 * changed.row_blocks * changed.simdgroups
                    schedules.append(dataclasses.replace(changed, bq=rows))
                row(length, dim, causal, list(dict.fromkeys(schedules)))


if __name__ == "__main__":
    main()
