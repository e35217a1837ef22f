"""Gradients of attention on an NVIDIA GPU: ours, MLX's own and PyTorch's, side by side in one run.

    python -m benchmarks.gpu_backward [--rows dense,softcap,alibi,window,layer] [--sweep] [--quick]

Rows, in bfloat16, 16 heads: backward alone at 4,096 (batch 4) and 16,384 (batch 1) queries and
keys, head dimensions 64 and 128, dense and causal; the same at 4,096 with softcap 50 and with
ALiBi; a window of 1,024 in 16,384; and one layer of attention, 32 query and 8 KV heads of 128,
8,192 tokens, softcap 50, forward and backward, with its peak memory. --sweep times 8 schedules of
rows of queries and 16 of rows of keys on their own, and takes the best of both; else the default
schedules run. --quick leaves the dense rows of 16,384 out.

Every kernel that is timed is checked first. Times are medians of repetitions; calls wait for each
other. Rates count 2.5 times the operations of the forward pass, 4 D a score that the mask keeps.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

import metalgen
from metalgen.calls.verify_gradients import verify_gradients
from metalgen.devices import get_device
from metalgen.families import Schedule, default_schedule, is_valid
from metalgen.families.backward import backward_config, made_by
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs

REPEATS = 7
FAMILIES = ("backward_rows", "backward_keys")
TOGETHER = "backward_all"


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of work: a config and its sizes."""

    config: AttentionConfig
    batch: int
    heads: int
    length: int

    @property
    def operations(self) -> float:
        """Of the backward pass: 2.5 times the multiply-adds, times two, of the forward pass."""
        c, n = self.config, self.length
        kept = n * n
        if c.causal:
            seen = n if c.window_left is None else min(n, c.window_left + 1)
            kept = n * seen - seen * (seen - 1) // 2
        return 2.5 * 2.0 * (c.head_dim + c.v_dim) * kept * self.batch * self.heads

    def arrays(self) -> tuple[tuple[mx.array, ...], Inputs]:
        """q, k, v and the cotangent, and what else a call brings."""
        c = self.config
        widths = (c.head_dim, c.head_dim, c.v_dim, c.v_dim)
        kv_heads = self.heads // c.heads_per_kv
        heads = (self.heads, kv_heads, kv_heads, self.heads)
        found = tuple(
            mx.random.normal((self.batch, h, self.length, w), key=mx.random.key(n)).astype(
                mx.bfloat16
            )
            for n, (h, w) in enumerate(zip(heads, widths, strict=True))
        )
        inputs = Inputs(alibi_slopes=metalgen.alibi_slopes(self.heads)) if c.alibi else NOTHING
        mx.eval(found, *inputs.arrays)
        return found, inputs


def rows(names: Sequence[str], quick: bool) -> Iterator[Row]:
    """The rows of the table, but for the layer."""
    for dim, causal in itertools.product((64, 128), (False, True)):
        plain = AttentionConfig(dim, "bfloat16", causal=causal)
        if "dense" in names:
            yield Row(plain, 4, 16, 4096)
            if not quick:
                yield Row(plain, 1, 16, 16384)
        if "softcap" in names:
            yield Row(dataclasses.replace(plain, softcap=50.0), 4, 16, 4096)
        if "alibi" in names:
            yield Row(dataclasses.replace(plain, alibi=True), 4, 16, 4096)
    if "window" in names:
        causal_128 = AttentionConfig(128, "bfloat16", causal=True)
        for config in (causal_128, dataclasses.replace(causal_128, window_left=1023)):
            yield Row(config, 1, 16, 16384)


def seconds_of(call: Callable[[], Any]) -> float:
    """Median seconds of a call, which is evaluated before the next one begins."""
    mx.eval(call())
    begin = time.perf_counter()
    mx.eval(call())
    each = time.perf_counter() - begin
    many = max(1, min(20, int(0.05 / each)))
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        for _ in range(many):
            mx.eval(call())
        times.append((time.perf_counter() - begin) / many)
    return statistics.median(times)


def candidates(config: AttentionConfig, family: str, sweep: bool) -> list[Schedule]:
    """The default schedule of a family, and in a sweep others around it."""
    limits = get_device("cuda").limits
    base = default_schedule(config, limits, family)
    if not sweep:
        return [base]
    found = [base]
    for row_blocks, simdgroups, bk, apart in itertools.product(
        (1, 2), (4, 8), (16, 32, 64), (0, 1)
    ):
        if row_blocks * bk > 64 or row_blocks * simdgroups > 8:  # registers, rows
            continue
        values = {"row_blocks": row_blocks, "simdgroups": simdgroups, "bk": bk, "buffers": 2}
        if "apart" in base.knobs:
            values["apart"] = apart
        elif apart:
            continue
        made = dataclasses.replace(base, **values, bq=16 * row_blocks * simdgroups)
        if is_valid(config, made, limits) and made not in found:
            found.append(made)
    return found


def timed_families(row: Row, sweep: bool) -> dict[str, tuple[float, Schedule]]:
    """The fastest checked schedule of each family, and its seconds."""
    device, config = get_device("cuda"), backward_config(row.config)
    (q, k, v, dout), inputs = row.arrays()
    kernel = metalgen.get_kernel(
        dataclasses.replace(row.config, return_lse=True),
        batch=row.batch,
        heads=row.heads,
        q_len=row.length,
        device="cuda",
    )
    results = kernel(q, k, v, inputs=inputs)
    mx.eval(results)
    found: dict[str, tuple[float, Schedule]] = {}
    for family in (*FAMILIES, TOGETHER):
        times = []
        for schedule in candidates(config, family, sweep):
            try:
                check = verify_gradients(device, config, schedule)
                if not check.ok:
                    raise RuntimeError(f"WRONG: {check.detail}")
                run = device.build_gradients(config, (schedule,))
                seconds = seconds_of(
                    lambda run=run: run(
                        *(q, k, v, results, (dout, None)), row.config.head_dim**-0.5, inputs
                    )
                )
                times.append((seconds, schedule))
            except (RuntimeError, ValueError) as error:
                print(f"    {schedule}: {type(error).__name__} {str(error)[:120]}")
        times.sort(key=lambda pair: pair[0])
        for seconds, schedule in times[: 5 if sweep else 1]:
            print(f"    {family} {made_by(schedule)} {seconds * 1e3:8.3f} ms  {schedule}")
        if times:
            found[family] = times[0]
    return found


def ours(row: Row, sweep: bool) -> dict[str, float]:
    """Both families together, and one kernel for all, by their fastest schedules."""
    best = timed_families(row, sweep)
    if not best.keys() >= set(FAMILIES):
        return {}
    schedules = tuple(best[family][1] for family in FAMILIES)
    (q, k, v, dout), inputs = row.arrays()
    config = dataclasses.replace(row.config, return_lse=True)
    sizes = {"batch": row.batch, "heads": row.heads, "q_len": row.length}
    results = metalgen.get_kernel(config, **sizes, device="cuda")(q, k, v, inputs=inputs)
    mx.eval(results)
    scale, found = row.config.head_dim**-0.5, {}
    ways = {"ours": schedules}
    if TOGETHER in best:
        ways["ours, one kernel with atomics"] = (best[TOGETHER][1],)
    for name, chosen in ways.items():
        run = get_device("cuda").build_gradients(row.config, chosen)
        call = (q, k, v, results, (dout, None), scale, inputs)
        found[name] = seconds_of(lambda run=run, call=call: run(*call))
    return found


def mlx_own(row: Row) -> dict[str, float]:
    """MLX's gradient where it computes the same: forward and backward, less forward."""
    c = row.config
    if c.softcap is not None or c.window_left is not None or c.alibi:
        return {}
    (q, k, v, dout), _ = row.arrays()

    def function(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        mask = "causal" if c.causal else None
        scale = c.head_dim**-0.5
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)

    forward = seconds_of(lambda: function(q, k, v))
    both = seconds_of(lambda: mx.vjp(function, [q, k, v], [dout]))
    return {"MLX (vjp, less forward)": both - forward}


def torch_own(row: Row) -> dict[str, float]:
    """PyTorch's backward passes; empty where it is not installed."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return {}
    c = row.config
    shape = (row.batch, row.heads, row.length, c.head_dim)
    make: Any = lambda: torch.randn(shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    q, k, v = (make().requires_grad_() for _ in range(3))
    dout = make()

    def timed(out: Any) -> float:
        times = []
        for _ in range(2 + REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for _ in range(4):
                torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 4e3)
        return statistics.median(times[2:])

    found = {}
    plain = c.softcap is None and c.window_left is None and not c.alibi
    if plain:
        fused = torch.nn.functional.scaled_dot_product_attention
        for name, backend, deterministic in (
            ("PyTorch FlashAttention-2", SDPBackend.FLASH_ATTENTION, False),
            ("PyTorch FlashAttention-2, deterministic", SDPBackend.FLASH_ATTENTION, True),
            ("PyTorch cuDNN", SDPBackend.CUDNN_ATTENTION, False),
        ):
            torch.use_deterministic_algorithms(deterministic)
            try:
                with sdpa_kernel(backend):
                    found[name] = timed(fused(q, k, v, is_causal=c.causal))
            except RuntimeError as error:
                print(f"    {name}: {str(error)[:100]}")
            torch.use_deterministic_algorithms(False)
        return found
    torch._dynamo.reset()
    slopes = torch.tensor([2.0 ** (-8 * (h + 1) / row.heads) for h in range(row.heads)]).cuda()

    def score(x: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        if c.alibi:
            return x - slopes[h] * torch.abs(i - j)
        return x if c.softcap is None else c.softcap * torch.tanh(x / c.softcap)

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i if c.window_left is None else (j <= i) & (j >= i - c.window_left)

    blocks = create_block_mask(mask, None, None, row.length, row.length) if c.causal else None
    flex = torch.compile(flex_attention)
    found["PyTorch FlexAttention"] = timed(flex(q, k, v, score_mod=score, block_mask=blocks))
    return found


def layer() -> None:
    """Forward and backward of one layer, with the memory that they take for a moment."""
    config = AttentionConfig(128, "bfloat16", heads_per_kv=4, causal=True, softcap=50.0)
    row = Row(config, 1, 32, 8192)
    (q, k, v, dout), _ = row.arrays()

    def by_metalgen(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return metalgen.attention(q, k, v, causal=True, softcap=50.0, device="cuda")

    def by_hand(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        n = q.shape[2]
        grouped = q.reshape(1, 8, 4, n, 128) * 128**-0.5
        scores = grouped @ k[:, :, None].swapaxes(-1, -2)
        scores = 50.0 * mx.tanh(scores / 50.0)
        seen = mx.arange(n)[:, None] >= mx.arange(n)
        weights = mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1, precise=True)
        return (weights @ v[:, :, None]).reshape(q.shape)

    print("layer: 1 x 32/8 heads, 8192 tokens, D=128, softcap 50, forward and backward")
    for name, function in (("metalgen", by_metalgen), ("plain MLX operations", by_hand)):
        call = lambda f=function: mx.vjp(f, [q, k, v], [dout])  # noqa: E731
        mx.eval(call())
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(call())
        peak = mx.get_peak_memory() - before
        print(f"    {name:24} {seconds_of(call) * 1e3:8.3f} ms, peak {peak / 1e9:6.3f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="dense,softcap,alibi,window,layer")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    info = mx.device_info(mx.Device(mx.gpu, 0))
    today = datetime.date.today().isoformat()
    print(
        f"{today}, {info['device_name']}, MLX {mx.__version__}, Python {platform.python_version()}"
    )
    names = options.rows.split(",")
    for row in rows(names, options.quick):
        print(f"{row.config}  {row.batch} x {row.heads} heads, {row.length} x {row.length}")
        found = ours(row, options.sweep)
        best = min(found.values(), default=math.nan)
        found |= mlx_own(row) | torch_own(row)
        for name, seconds in found.items():
            rate = row.operations / seconds / 1e12
            print(
                f"    {name:42} {seconds * 1e3:8.3f} ms {rate:7.1f} TFLOP/s  {best / seconds:5.2f}",
                flush=True,
            )
    if "layer" in names:
        layer()


if __name__ == "__main__":
    main()
