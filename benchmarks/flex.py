"""How long it takes from a Python function to a kernel's text, and what block masks cost.

    python benchmarks/flex.py

Times are of this machine's CPU, the best of several rounds; what is traced and printed is the same
everywhere. Nothing here runs a kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from rich.console import Console
from rich.table import Table

from metalgen import AttentionConfig, create_block_mask, get_kernel
from metalgen.dsl.graph import parse
from metalgen.dsl.printer import print_graph
from metalgen.dsl.trace import trace
from metalgen.languages import LANGUAGES

_NAMES = {"score": "score", "b": "batch", "h": "head", "q": "q_idx", "kv": "kv_idx"}
TABLE = mx.random.normal((32, 4096))
IDS = mx.sort(mx.random.randint(0, 9, (4096,)))


def gemma(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return mx.where((j <= i) & (i - j < 1024), 50 * mx.tanh(s / 50), -mx.inf)


FUNCTIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "softcap": (lambda s, b, h, i, j: 50 * mx.tanh(s / 50), "score_mod"),
    "ALiBi": (lambda s, b, h, i, j: s + 2.0 ** (-8.0 * (h + 1) / 32) * (j - i), "score_mod"),
    "relative bias": (lambda s, b, h, i, j: s + TABLE[h, i - j], "score_mod"),
    "softcap in a window": (gemma, "score_mod"),
    "its gradient": (mx.grad(gemma), "score_mod"),
    "documents": (lambda b, h, i, j: (IDS[i] == IDS[j]) & (j <= i), "mask_mod"),
}


def best(function: Callable[[], object], rounds: int = 30) -> float:
    """Seconds of the fastest round."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def traced_and_printed(function: Callable[..., Any], argument: str) -> None:
    parse.cache_clear()
    graph = parse(trace(function, argument).graph.text)
    for language in LANGUAGES.values():
        print_graph(graph, language, "score", _NAMES)


def main() -> None:
    console = Console()
    table = Table(title="From a function to text for both targets, ms")
    for column in ("function", "operations", "first", "best"):
        table.add_column(column, justify="left" if column == "function" else "right")
    for name, (function, argument) in FUNCTIONS.items():
        first = best(lambda f=function, a=argument: traced_and_printed(f, a), 1)  # type: ignore[misc]
        again = best(lambda f=function, a=argument: traced_and_printed(f, a))  # type: ignore[misc]
        nodes = len(trace(function, argument).graph.nodes)
        table.add_row(name, str(nodes), f"{first * 1e3:.2f}", f"{again * 1e3:.2f}")
    console.print(table)

    plain = AttentionConfig(64, causal=True)
    get_kernel(plain)
    seconds = best(lambda: [get_kernel(plain) for _ in range(1000)]) / 1000
    console.print(f"get_kernel again, no function: {seconds * 1e6:.1f} us")
    text = trace(gemma).graph.text
    config = AttentionConfig(64, score_mod=text)
    get_kernel(config)
    seconds = best(lambda: [get_kernel(config) for _ in range(1000)]) / 1000
    console.print(f"get_kernel again, with a score function: {seconds * 1e6:.1f} us")

    for length in (2048, 8192):
        window = lambda b, h, i, j: (j <= i) & (i - j < 256)  # noqa: E731
        start = time.perf_counter()
        mask = create_block_mask(window, None, None, length, length)
        mx.eval(mask.some, mask.every)
        made = time.perf_counter() - start
        start = time.perf_counter()
        mx.eval(mask.lists(64, 32))
        listed = time.perf_counter() - start
        console.print(
            f"block mask of {length} x {length}: {made * 1e3:.0f} ms, its lists for a schedule "
            f"{listed * 1e3:.1f} ms, {mask.sparsity():.0f}% of the blocks skipped"
        )


if __name__ == "__main__":
    main()
