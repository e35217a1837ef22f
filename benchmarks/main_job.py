"""The figures of the main job, each beside its aim: ``python -m benchmarks.main_job`` (2 minutes).

Times are of this machine; counts are the simulator's; tuning times of a chip that is not here are
modelled. MLX's own attention kernel runs in the simulator too, from the headers in the mlx wheel.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

import metalgen
from metalgen import AttentionConfig, simulator
from metalgen.calls.verify import TOLERANCE, relative_error
from metalgen.database.lookup import lookup
from metalgen.devices import get_device
from metalgen.families.sizes import Problem
from metalgen.reference import attention_float64
from metalgen.source.hashes import template_hashes
from metalgen.testing.mlx_kernels import run_attention

HEADS, LENGTH = 2, 512


def report(what: str, value: str, aim: str, reached: bool) -> None:
    print(f"  {what:62} {value:>22}   aim {aim:16} {'' if reached else 'NOT REACHED'}", flush=True)


def seconds_of(code: str) -> float:
    """Median wall time of a statement in fresh interpreters, over one that imports MLX alone."""

    def once(statement: str) -> float:
        timed = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
        run = subprocess.run([sys.executable, "-c", timed], capture_output=True, text=True)
        return float(run.stdout)

    return statistics.median(once(code) for _ in range(9))


def tuning(folder: Path) -> None:
    print("metalgen tune --chip M3Max, default preset (modelled), a new database, a warm cache:")
    environment = os.environ | {"METALGEN_DB": str(folder / "tuning.db")}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "metalgen", "tune", "--chip", "M3Max", "--json"]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    seconds = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    report("wall time", f"{seconds:.1f} s", "under 120 s", seconds < 120)
    report("memory of its largest process", f"{memory:.2f} GiB", "1 GiB", memory < 1)


def starting() -> None:
    print("Starting:")
    bare = seconds_of("import mlx.core")
    ours = seconds_of("import mlx.core, metalgen; metalgen.get_kernel")
    extra = (ours - bare) * 1e3
    report("import metalgen over import mlx.core", f"{extra:.1f} ms", "60 ms", extra < 60)
    config = AttentionConfig(64, causal=True)
    metalgen.get_kernel(config)
    begin = time.perf_counter()
    for _ in range(100_000):
        metalgen.get_kernel(config, q_len=1024)
    each = (time.perf_counter() - begin) * 10
    report("get_kernel of a known config", f"{each:.2f} us", "5 us", each < 5)
    q, k, v = (mx.zeros((1, 4, 1, 64), mx.float16) for _ in range(3))
    plain = get_device("reference").build(config)

    def built(call: Callable[[], object]) -> float:
        """Least microseconds of a call that is not evaluated."""
        call()
        return min(timeit.repeat(call, number=1000, repeat=7)) * 1e3

    own = built(lambda: metalgen.attention(q, k, v, causal=True, device="reference"))
    extra = own - built(lambda: plain(q, k, v, 0.125))
    report("what metalgen.attention adds to a call", f"{extra:.1f} us", "15 us", extra < 15)


def traffic(folder: Path) -> None:
    print(f"Simulated counts of the schedules that tune picks, half, {HEADS} heads, L={LENGTH}:")
    os.environ["METALGEN_DB"] = str(folder / "tuning.db")
    from metalgen.chips import get_chip

    for name in ("M1Max", "M3Max"):
        command = [sys.executable, "-m", "metalgen", "tune", "--chip", name, "--json"]
        subprocess.run(command, check=True, capture_output=True)
        for dim, share in ((64, 0.5), (128, 0.85)):
            config = AttentionConfig(dim, causal=True, heads_per_kv=4)
            arrays = [mx.ones((1, HEADS, LENGTH, dim), mx.float16) for _ in range(3)]
            with simulator.record(checked=True) as runs:
                run_attention(*arrays, causal=True)
            theirs = per_product(runs[0])
            for length in (1024, 4096):
                problem = Problem(config, 32, length, length)
                hit = lookup(problem, get_chip(name), template_hashes(problem.family, "metal"))
                assert hit is not None and hit.exact, "tune left no row"
                plain = AttentionConfig(dim, causal=True)
                with simulator.record(checked=True) as runs:
                    out, _ = get_device("simulator").build(plain, hit.schedule)(*arrays, 0.1)
                    mx.eval(out)
                ours = per_product(runs[0])
                label = f"{name} D={dim} L={length} {hit.schedule}"
                for what, mine, other, limit in (
                    ("threadgroup bytes read a product", ours[0], theirs[0], share),
                    ("device bytes", ours[1], theirs[1], 1.0),
                ):
                    ratio = mine / other
                    value = f"{mine:.0f} / {other:.0f} = {ratio:.2f}x"
                    report(f"{label}: {what}", value, f"{limit:.2f}x MLX's", ratio <= limit)


def per_product(run: simulator.Run) -> tuple[float, int]:
    """Threadgroup bytes read a multiply-accumulate, and bytes read and written in device memory."""
    seen = run.counters
    device = sum(
        buffer.bytes_read + buffer.bytes_written
        for buffer in seen.buffers
        if "_" not in buffer.name
    )
    return seen.threadgroup_read / seen.multiply_accumulates, device


def accuracy() -> None:
    print("Simulated accuracy against float64, unit-variance inputs, 256 queries:")
    for dtype, tolerance in TOLERANCE.items():
        for dim in (64, 128, 256):
            for length in (512, 4096):
                config = AttentionConfig(dim, dtype)
                q, k, v = (
                    mx.random.normal((1, 1, rows, dim), key=mx.random.key(n)).astype(
                        getattr(mx, dtype)
                    )
                    for n, rows in enumerate((256, length, length))
                )
                kernel = metalgen.get_kernel(config, device="simulator")
                out = kernel(q, k, v)
                assert isinstance(out, mx.array)
                exact = [np.array(x.astype(mx.float32)) for x in (q, k, v)]
                expected, _ = attention_float64(*exact, scale=dim**-0.5)
                error = relative_error(out, expected)
                name = f"{dtype} D={dim} L={length}"
                report(name, f"{error:.2e}", f"{tolerance:.0e}", error <= tolerance)


def main() -> None:
    version = f"Python {platform.python_version()}, MLX {mx.__version__}"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {version}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tuning(folder)
        starting()
        traffic(folder)
        accuracy()


if __name__ == "__main__":
    main()
