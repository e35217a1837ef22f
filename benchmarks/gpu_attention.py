"""Attention on an NVIDIA GPU: ours, MLX's own and PyTorch's, side by side in one run.

    python -m benchmarks.gpu_attention [--rows forward,softcap,window,decode] [--try FIELD=N,...]

Rows, in bfloat16: forward with 4 x 16 heads and 4096 queries and keys; the same with softcap 50; a
window of 1024 in 16384; decode of one query with 32 query and 8 KV heads over 32768 keys. "ours
tuned" is what the tuning database says for this GPU, "ours default" what runs without one; --try
adds variations of the default. Times are medians of repetitions that rotate among inputs larger
than the L2 cache, each call taking its queries from the one before, as layers of a model do: none
overlaps another, PyTorch's neither. Rates count 4 D operations a score that the mask keeps; ratios
are to "ours".
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from metalgen.calls.verify import verify
from metalgen.chips import detect
from metalgen.database.lookup import lookup
from metalgen.devices import get_device
from metalgen.families import Schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.reference import attention_mlx, config_features
from metalgen.source.hashes import template_hashes
from metalgen.tuning.timing.measure import chain

REPEATS, GROUP = 9, 8


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of work: a config and its sizes."""

    config: AttentionConfig
    batch: int
    heads: int
    q_len: int
    kv_len: int

    @property
    def operations(self) -> float:
        """Multiply-adds times two, of the scores that the mask keeps."""
        c, offset = self.config, self.kv_len - self.q_len
        kept = 0
        for i in range(self.q_len):
            end = min(self.kv_len, i + offset + 1) if c.causal else self.kv_len
            begin = 0 if c.window_left is None else max(0, i + offset - c.window_left)
            kept += max(0, end - begin)
        return 2.0 * (c.head_dim + c.v_dim) * kept * self.batch * self.heads

    @property
    def kv_bytes(self) -> float:
        """Bytes of K and V."""
        kv_heads = self.heads // self.config.heads_per_kv
        width = self.config.head_dim + self.config.v_dim
        return float(self.batch * kv_heads * self.kv_len * width * self.config.itemsize)

    def inputs(self) -> list[tuple[mx.array, ...]]:
        """Sets of Q, K and V that together are larger than any L2 cache."""
        kv = (self.batch, self.heads // self.config.heads_per_kv, self.kv_len)
        shapes = (
            (self.batch, self.heads, self.q_len, self.config.head_dim),
            (*kv, self.config.head_dim),
            (*kv, self.config.v_dim),
        )
        sets = max(3, min(16, math.ceil(256e6 / self.kv_bytes)))
        found = [
            tuple(
                mx.random.normal(shape, key=mx.random.key(3 * n + i)).astype(mx.bfloat16)
                for i, shape in enumerate(shapes)
            )
            for n in range(sets)
        ]
        mx.eval(found)
        return found


def rows(names: Sequence[str]) -> list[Row]:
    """The rows of the table."""
    found = []
    for dim in (64, 128):
        for causal in (False, True):
            plain = AttentionConfig(dim, "bfloat16", causal=causal)
            if "forward" in names:
                found.append(Row(plain, 4, 16, 4096, 4096))
            if "softcap" in names:
                found.append(Row(dataclasses.replace(plain, softcap=50.0), 4, 16, 4096, 4096))
    if "window" in names:
        causal_128 = AttentionConfig(128, "bfloat16", causal=True)
        for config in (causal_128, dataclasses.replace(causal_128, window_left=1023)):
            found.append(Row(config, 4, 16, 16384, 16384))
    if "decode" in names:
        grouped = AttentionConfig(128, "bfloat16", heads_per_kv=4, causal=True)
        found += [Row(grouped, batch, 32, 1, 32768) for batch in (1, 8)]
    return found


def seconds_of(call: Callable[..., Any], inputs: Sequence[tuple[mx.array, ...]]) -> float:
    """Median seconds of a call, of many that wait for one another."""
    begin = time.perf_counter()
    while time.perf_counter() - begin < 0.3:
        chain(call, inputs, len(inputs))
    begin = time.perf_counter()
    chain(call, inputs, GROUP)
    group = max(GROUP, min(512, int(0.02 * GROUP / (time.perf_counter() - begin))))
    times = []
    for repeat in range(REPEATS):
        begin = time.perf_counter()
        chain(call, inputs, group, repeat)
        times.append((time.perf_counter() - begin) / group)
    return statistics.median(times)


def ours(row: Row, changes: Sequence[str]) -> dict[str, float]:
    """Our kernels: tuned, default, and the variations asked for; each checked first."""
    device = get_device("cuda")
    family = Problem(row.config, 1, row.q_len, row.kv_len).family
    base = default_schedule(row.config, device.limits, family)
    tried: dict[str, Schedule] = {}
    hit = lookup(
        Problem(row.config, row.batch * row.heads, row.q_len, row.kv_len),
        detect(),
        template_hashes(family, "cuda"),
        limits=device.limits,
    )
    if hit and hit.schedule == base:
        tried[f"ours, tuned as the default {base}"] = base
    else:
        tried |= {f"ours tuned   {hit.schedule}": hit.schedule} if hit else {}
        tried[f"ours default {base}"] = base
    for change in changes:
        fields = dict(item.split("=") for item in change.split(","))
        values: dict[str, Any] = {k: int(v) if v.isdigit() else v for k, v in fields.items()}
        schedule = dataclasses.replace(base, **values)
        rows = 16 * schedule.row_blocks * schedule.simdgroups // schedule.key_simdgroups
        schedule = dataclasses.replace(schedule, bq=rows)
        tried[f"ours try     {schedule}"] = schedule
    inputs, scale = row.inputs(), row.config.head_dim**-0.5
    found = {}
    for label, schedule in tried.items():
        try:
            check = verify(device, row.config, schedule)
            if not check.ok:
                raise RuntimeError(f"WRONG: {check.detail}")
            run = device.build(row.config, schedule)
            found[label] = seconds_of(lambda q, k, v, run=run: run(q, k, v, scale)[0], inputs)
        except (RuntimeError, ValueError) as error:
            print(f"    {label}: {type(error).__name__} {str(error)[:200]}")
    return found


def mlx_own(row: Row) -> dict[str, float]:
    """MLX's own attention where it computes the same, and plain operations where they fit."""
    inputs, scale, c = row.inputs(), row.config.head_dim**-0.5, row.config
    found = {}
    if c.softcap is None and c.window_left is None:
        mask = "causal" if c.causal and row.q_len > 1 else None
        fused = mx.fast.scaled_dot_product_attention
        found["MLX fused"] = seconds_of(
            lambda q, k, v: fused(q, k, v, scale=scale, mask=mask), inputs
        )
    if row.q_len <= 4096 < row.q_len * 2:
        features = config_features(c)
        found["MLX unfused"] = seconds_of(
            lambda q, k, v: attention_mlx(q, k, v, scale=scale, **features)[0], inputs[:2]
        )
    return found


def torch_own(row: Row) -> dict[str, float]:
    """PyTorch's paths; empty where it is not installed."""
    try:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    except ImportError:
        return {}
    c = row.config
    kv = (row.batch, row.heads // c.heads_per_kv, row.kv_len)
    make: Any = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    arrays = (make(row.batch, row.heads, row.q_len, c.head_dim), make(*kv, 128), make(*kv, 128))
    arrays = (arrays[0], make(*kv, c.head_dim), make(*kv, c.v_dim))

    def timed(call: Callable[[Any, Any, Any], Any]) -> float:
        times = []
        for _ in range(1 + REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            q, k, v = arrays
            start.record()
            for _ in range(GROUP):
                q = call(q, k, v)
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / GROUP)
        return statistics.median(times[1:])  # the first compiles

    found = {}
    grouped = c.heads_per_kv > 1
    if c.softcap is None and c.window_left is None:
        fused = torch.nn.functional.scaled_dot_product_attention
        causal = c.causal and row.q_len > 1
        for name, backend in (
            ("PyTorch FlashAttention-2", SDPBackend.FLASH_ATTENTION),
            ("PyTorch cuDNN", SDPBackend.CUDNN_ATTENTION),
        ):
            with sdpa_kernel(backend):
                found[name] = timed(
                    lambda q, k, v: fused(q, k, v, is_causal=causal, enable_gqa=grouped)
                )
        return found
    torch._dynamo.reset()  # compiled afresh a shape
    cap, left, offset = c.softcap, c.window_left, row.kv_len - row.q_len

    def score(x: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return x if cap is None else cap * torch.tanh(x / cap)

    def mask(b: Any, h: Any, i: Any, j: Any) -> Any:
        kept = j <= i + offset
        return kept if left is None else kept & (j >= i + offset - left)

    blocks = create_block_mask(mask, None, None, row.q_len, row.kv_len) if c.causal else None
    flex = torch.compile(flex_attention)
    found["PyTorch FlexAttention"] = timed(
        lambda q, k, v: flex(q, k, v, score_mod=None if cap is None else score, block_mask=blocks)
    )
    return found


def copy_bandwidth() -> float:
    """Bytes a second of a large copy on the device, read and written."""
    source = mx.random.normal((1 << 28,))
    mx.eval(source)
    seconds = seconds_of(lambda x: x + 1, [(source,), (source * 2,)])
    return 2 * source.nbytes / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="forward,softcap,window,decode")
    parser.add_argument("--try", dest="changes", action="append", default=[])
    options = parser.parse_args()
    info = mx.device_info(mx.Device(mx.gpu, 0))
    today = datetime.date.today().isoformat()
    print(
        f"{today}, {info['device_name']}, MLX {mx.__version__}, Python {platform.python_version()}"
    )
    copy = copy_bandwidth()
    print(f"copy {copy / 1e12:.2f} TB/s")
    for row in rows(options.rows.split(",")):
        found = ours(row, options.changes)
        best = min(found.values(), default=math.nan)
        found |= mlx_own(row) | torch_own(row)
        print(f"{row.config}  {row.batch} x {row.heads} heads, {row.q_len} x {row.kv_len}")
        for name, seconds in found.items():
            rate = f"{row.operations / seconds / 1e12:7.1f} TFLOP/s"
            if row.q_len == 1:
                share = row.kv_bytes / seconds
                rate = f"{share / 1e12:7.2f} TB/s = {share / copy:.2f} of copy"
            print(
                f"    {name:72} {seconds * 1e3:8.3f} ms {rate}  {best / seconds:5.2f}", flush=True
            )


if __name__ == "__main__":
    main()
