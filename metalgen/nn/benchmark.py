"""A benchmark of whole layers, by the name and the methods of the first scripts."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from metalgen.counters import stats
from metalgen.nn.flash import OptimizedMLXMultiHeadAttention

Key = tuple[int, int, int]


class FlashAttentionBenchmark:
    """Times a layer whose attention MLX's own function computes, and the same one by metalgen.

    Both have the same weights, compute the same and are warmed up; runs alternate, so that what
    else the machine does affects both. Times are of whole layers, with their projections.

    Attributes:
        results: by ``(batch, length, head dimension)``: `standard_time` and `flash_time` (medians
            in seconds), `standard_std`, `flash_std`, `speedup`, `efficiency` (share of the rate of
            a matrix product of 1,024 x 1,024, measured here), `standard_throughput` and
            `flash_throughput` (tokens a second), `max_difference` of the outputs, and
            `computed_by_metalgen`, whether a kernel of metalgen's ran at all.
        system_info: platform, processor, device, and MLX's version.
    """

    def __init__(self, *, device: str | None = None) -> None:
        self.device = device
        self.results: dict[Key, dict[str, Any]] = {}
        self.system_info = {
            "platform": platform.platform(),
            "processor": platform.processor() or platform.machine(),
            "mlx_device": str(mx.default_device()),
            "mlx": getattr(mx, "__version__", "unknown"),
        }
        self._rate: float | None = None

    def benchmark_attention_performance(
        self,
        batch_sizes: Sequence[int] = (1, 2, 4),
        seq_lengths: Sequence[int] = (64, 128, 256),
        head_dims: Sequence[int] = (32, 64, 128),
        num_heads: int = 8,
        num_runs: int = 5,
    ) -> dict[Key, dict[str, Any]]:
        """Time every combination, print a line of each, and return `results`."""
        if self._rate is None:
            self._rate = _matmul_rate()
        for batch in batch_sizes:
            for length in seq_lengths:
                for head_dim in head_dims:
                    found = self._timed(batch, length, head_dim, num_heads, num_runs)
                    self.results[batch, length, head_dim] = found
                    print(_line((batch, length, head_dim), found), flush=True)
        return self.results

    def _timed(
        self, batch: int, length: int, head_dim: int, num_heads: int, num_runs: int
    ) -> dict[str, Any]:
        dims = num_heads * head_dim
        standard = OptimizedMLXMultiHeadAttention(dims, num_heads, use_flash_attention=False)
        flash = OptimizedMLXMultiHeadAttention(dims, num_heads, device=self.device)
        flash.update(standard.parameters())
        x = mx.random.normal((batch, length, dims))
        mx.eval(x, standard.parameters())
        before = stats().metalgen
        outs = [layer(x) for layer in (standard, flash)]  # the first call compiles
        mx.eval(outs)
        ours = stats().metalgen > before
        times: list[list[float]] = [[], []]
        for run in range(max(1, num_runs)):
            order = (0, 1) if run % 2 else (1, 0)
            for n in order:
                begin = time.perf_counter()
                mx.eval((standard, flash)[n](x))
                times[n].append(time.perf_counter() - begin)
        plain, fast = (statistics.median(own) for own in times)
        tokens = batch * length
        flops = 8 * tokens * dims * dims + 4 * tokens * length * dims
        assert self._rate is not None
        return {
            "standard_time": plain,
            "standard_std": statistics.pstdev(times[0]),
            "flash_time": fast,
            "flash_std": statistics.pstdev(times[1]),
            "speedup": plain / fast,
            "efficiency": flops / fast / self._rate,
            "standard_throughput": tokens / plain,
            "flash_throughput": tokens / fast,
            "max_difference": mx.abs(outs[0] - outs[1]).max().item(),
            "computed_by_metalgen": ours,
        }

    def print_summary(self) -> None:
        """Print mean and greatest speedup, by length, and what computed the layers."""
        if not self.results:
            print("No results: call benchmark_attention_performance() first.")
            return
        rows = self.results.values()
        speedups = [row["speedup"] for row in rows]
        ours = sum(row["computed_by_metalgen"] for row in rows)
        print(f"{len(speedups)} layers; metalgen's kernels computed {ours} of them, MLX the rest.")
        mean = statistics.geometric_mean(speedups)
        print(f"speedup: {mean:.2f}x (geometric mean), at most {max(speedups):.2f}x")
        for length in sorted({key[1] for key in self.results}):
            own = [row["speedup"] for key, row in self.results.items() if key[1] == length]
            print(f"  length {length}: {statistics.geometric_mean(own):.2f}x")
        noise = max(row["flash_std"] / row["flash_time"] for row in rows)
        print(f"A layer's times spread by up to {noise:.0%}; smaller differences say nothing.")

    def save_results(self, filename: str | os.PathLike[str]) -> None:
        """Write a JSON file: system_info, benchmark_results by ``B_L_D``, timestamp."""
        text = json.dumps(
            {
                "system_info": self.system_info,
                "benchmark_results": {
                    "_".join(map(str, key)): row for key, row in self.results.items()
                },
                "timestamp": time.strftime("%Y-%m-%d %H:%M:%S"),
            },
            indent=2,
        )
        target = Path(filename)
        part = target.with_name(f"{target.name}.part")
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(target)


def _matmul_rate() -> float:
    """Operations a second of a float32 product of 1,024 x 1,024, the best of five."""
    x = mx.random.normal((1024, 1024))
    mx.eval(x @ x)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        mx.eval(x @ x)
        times.append(time.perf_counter() - begin)
    return 2 * 1024**3 / min(times)


def _line(key: Key, row: dict[str, Any]) -> str:
    batch, length, head_dim = key
    by = "metalgen" if row["computed_by_metalgen"] else "MLX"
    return (
        f"B {batch} L {length} D {head_dim}: MLX {row['standard_time'] * 1e3:.2f} ms, "
        f"{by} {row['flash_time'] * 1e3:.2f} ms, {row['speedup']:.2f}x"
    )
