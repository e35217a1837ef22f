"""How fast the simulator is on this CPU: ``python benchmarks/simulator.py [--json]``.

MLX's own attention kernel, half precision, 2 heads, L=512, D=64, on one core: aims are 150 ms plain
and 400 ms checked. Compiling a kernel: 0.5 s cold (the headers are compiled once a machine, and
reported apart) and 5 ms from the cache. Two cores: 1.6x on 16 or more threadgroups. Times are
medians of wall-clock times of this machine, Python's share included; they say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import mlx.core as mx

from metalgen import simulator
from metalgen.simulator.api import mlx_include_dir
from metalgen.simulator.harness import Constant, Output, run_metal
from metalgen.simulator.launch_limits import usable_cores

HEADS, LENGTH, DIM = 2, 512, 64
BQ, BK = 32, 32
SOURCE = (
    '#include "mlx/backend/metal/kernels/utils.h"\n'
    '#include "mlx/backend/metal/kernels/steel/attn/kernels/steel_attention.h"\n'
    f'instantiate_kernel("attention_benchmark", attention, half, {BQ}, {BK}, {DIM}, {DIM}, 4, 1)\n'
)
CONSTANTS: dict[int | str, Any] = {
    **dict.fromkeys((200, 201), True),
    **dict.fromkeys((300, 301, 302, 303), False),
}


def attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Launch MLX's attention kernel as MLX does for aligned lengths."""
    blocks = LENGTH // BQ
    strides = (HEADS * LENGTH * DIM, LENGTH * DIM, DIM)
    params = Constant(
        "6i f 7i 0q 12q",
        *(1, HEADS, DIM, LENGTH, LENGTH, 1, DIM**-0.5, blocks, LENGTH // BK, blocks),
        *(LENGTH // BK, 0, 0, 0, *strides * 4),
    )
    return run_metal(
        SOURCE,
        "attention_benchmark",
        {0: q, 1: k, 2: v, 3: Output(q.shape, q.dtype), 4: params},
        grid=(32 * blocks, 4 * HEADS, 1),
        threadgroup=(32, 4, 1),
        constants=CONSTANTS,
    )[3]


def median_ms(function: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time of `function` in milliseconds, after one call that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def compile_times(repeats: int) -> dict[str, float]:
    """Times to compile in an empty cache: the headers once, a kernel cold, a kernel again."""
    from metalgen.simulator.compiler import compile_metal

    def build(number: int) -> None:
        text = SOURCE + f"// kernel {number}\n"
        compile_metal(
            text, "attention_benchmark", constants=CONSTANTS, include_dirs=(mlx_include_dir(),)
        )

    saved = os.environ.get("METALGEN_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["METALGEN_CACHE"] = folder
        try:
            start = time.perf_counter()
            build(0)
            first = 1e3 * (time.perf_counter() - start)
            numbers = iter(range(1, repeats + 2))
            cold = median_ms(lambda: build(next(numbers)), repeats)
            warm = median_ms(lambda: build(1), 5 * repeats)
        finally:
            if saved is None:
                del os.environ["METALGEN_CACHE"]
            else:
                os.environ["METALGEN_CACHE"] = saved
    return {"first kernel of a machine": first, "compile, cold": cold, "compile, cached": warm}


def measure(repeats: int) -> dict[str, float]:
    """All figures; times in milliseconds."""
    keys = mx.random.split(mx.random.key(0), 3)
    shape = (1, HEADS, LENGTH, DIM)
    q, k, v = (mx.random.normal(shape, key=key).astype(mx.float16) for key in keys)
    figures = {}
    for title, processes, checked in (
        ("attention, plain, 1 core", 1, False),
        ("attention, checked, 1 core", 1, True),
        ("attention, plain, 2 cores", 2, False),
    ):
        with (
            simulator.limits(processes=processes),
            simulator.record(checked=True) if checked else nullcontext(),
        ):
            figures[title] = median_ms(lambda: attention(q, k, v), repeats)
    if usable_cores() >= 2:
        one, two = figures["attention, plain, 1 core"], figures["attention, plain, 2 cores"]
        figures["speed-up on 2 cores"] = one / two
    return figures | compile_times(max(3, repeats // 3))


AIMS = {
    "attention, plain, 1 core": (150.0, "ms, at most"),
    "attention, checked, 1 core": (400.0, "ms, at most"),
    "speed-up on 2 cores": (1.6, "x, at least"),
    "compile, cold": (500.0, "ms, at most"),
    "compile, cached": (5.0, "ms, at most"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    figures = measure(arguments.repeats)
    if arguments.json:
        print(json.dumps(figures, indent=2))
        return
    for title, value in figures.items():
        aim, unit = AIMS.get(title, (None, ""))
        unit_of = "x" if title.startswith("speed") else "ms"
        wanted = f"   (aim: {aim:g} {unit})" if aim is not None else ""
        print(f"{title:28} {value:10.2f} {unit_of}{wanted}")


if __name__ == "__main__":
    main()
