"""What a repeated `metalgen.scaled_dot_product_attention` costs in Python over MLX's own function.

    python -m benchmarks.drop_in

Nothing is evaluated. MLX is lazy, so this is what a call costs before any GPU starts. Three ways of
a call are timed in turn: MLX's function; ours where it hands the call to MLX; and ours where a
kernel of metalgen's computes it. No kernel can be launched without a GPU, so a call of MLX's
function stands in for each launch, and its time is subtracted; the code around it is what runs on a
GPU. (Kernels that split the keys launch twice.) The counters are timed by themselves.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx

import metalgen
from metalgen.calls import resolve
from metalgen.counters import tally
from metalgen.devices.kernel import KernelDevice
from metalgen.devices.marking import Launcher
from metalgen.devices.mlx_attention import mlx_sdpa
from metalgen.ops import sdpa
from metalgen.source.render import KernelSource

AIM = 12.0
ROUNDS, CALLS = 31, 300


class StandIn(KernelDevice):
    """A GPU whose launches are calls of MLX's function."""

    name = "metal"
    language = "metal"
    is_gpu = True

    def unavailable(self) -> None:
        return None

    def __init__(self, *arrays: mx.array) -> None:
        self.arrays = arrays

    def launch(self, inputs: list[mx.array], **arguments: Any) -> list[mx.array]:
        out = mlx_sdpa(*self.arrays, scale=0.125)
        return [out, out]

    def compile(self, source: KernelSource) -> Launcher:
        return self.launch


def microseconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least over rounds in which each of the calls is timed."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            found[name].append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    return {name: min(times) for name, times in found.items()}


def kernel_route(stand_in: StandIn, q: mx.array, k: mx.array, v: mx.array, mask: str | None) -> int:
    """Make calls like this one take a kernel of metalgen's; says how often it launches."""
    sdpa.attend(q, k, v, 0.125, mask)
    (key,) = sdpa._routes
    config = metalgen.AttentionConfig(
        q.shape[3],
        str(q.dtype),
        heads_per_kv=q.shape[1] // k.shape[1],
        causal=mask == "causal",
    )
    plain = metalgen.get_kernel(config, q_len=q.shape[2], kv_len=k.shape[2])
    run = stand_in.build(config, plain.schedule)
    kernel = replace(plain, backend="metalgen", device="metal", _run=run)
    sdpa._routes[key] = sdpa.Route(kernel, "", False, kernel._tally)
    return 2 if kernel.schedule.partials > 1 else 1


def main() -> None:
    print(f"Microseconds of Python a call, least of {ROUNDS} rounds of {CALLS} calls, in turn:")
    print(f"{'call':34}{'mx.fast':>9}{'ours, by MLX':>14}{'over':>7}{'our kernel':>12}{'over':>7}")
    for words, q_len, kv_len, mask in (
        ("prefill of 128, no mask", 128, 128, None),
        ("prefill of 128, causal", 128, 128, "causal"),
        ("one token after 1,024, no mask", 1, 1024, None),
    ):
        q = mx.zeros((1, 32, q_len, 64), mx.float16)
        k = v = mx.zeros((1, 8, kv_len, 64), mx.float16)
        calls: dict[str, Callable[[], object]] = {
            "mlx": lambda q=q, k=k, v=v, mask=mask: mlx_sdpa(q, k, v, scale=0.125, mask=mask),
            "ours": lambda q=q, k=k, v=v, mask=mask: metalgen.scaled_dot_product_attention(
                q, k, v, scale=0.125, mask=mask
            ),
        }
        resolve.forget_kernels()
        handed = microseconds(calls)
        resolve.forget_kernels()
        stand_in = StandIn(q, k, v)
        launches = kernel_route(stand_in, q, k, v, mask)
        calls["launch"] = partial(stand_in.launch, inputs=[], grid=(1, 1, 1), threadgroup=(1, 1, 1))
        computed = microseconds(calls)
        over = handed["ours"] - handed["mlx"], computed["ours"] - launches * computed["launch"]
        reached = "" if max(over) <= AIM else f"   NOT within {AIM:g}"
        print(
            f"{words:34}{handed['mlx']:9.1f}{handed['ours']:14.1f}{over[0]:7.1f}"
            f"{computed['ours']:12.1f}{over[1]:7.1f}{reached}"
        )
    counted = tally("metalgen")

    def count() -> None:
        counted.calls += 1

    def nothing() -> None:
        pass

    times = microseconds({"count": count, "nothing": nothing})
    print(f"Counting a call: {times['count'] - times['nothing']:.3f}")
    metalgen.reset_stats()


if __name__ == "__main__":
    main()
