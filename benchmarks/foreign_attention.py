"""Run ggml's flash attention kernels (llama.cpp), unmodified, on the simulator, against float64.

    python benchmarks/foreign_attention.py CHECKOUT [--types f16,q4_0] [--dims 64,128] [--plain]

CHECKOUT is a checkout of ggml or of llama.cpp. The launches are those of its own host code:
function constants, arguments, threadgroup memory, the padding and mask kernels before, and the
reduction after.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from foreign_metal import DEFINED

from metalgen import simulator
from metalgen.errors import MetalgenError
from metalgen.simulator.launch import current_recorder

BLOCK = 32
"""Elements of one quantized block."""


def quantized(kind: str, shape: tuple[int, ...], random: Any) -> tuple[np.ndarray, np.ndarray]:
    """Random blocks of a format as bytes, and the values that they stand for."""
    rows = (*shape[:-1], shape[-1] // BLOCK)
    d = (random.random(rows) * 0.05 + 0.01).astype(np.float16)
    m = (random.standard_normal(rows) * 0.1).astype(np.float16)
    q = random.integers(0, {"q8": 256, "q5": 32, "q4": 16}[kind[:2]], (*rows, BLOCK))
    scale, least = d.astype(np.float64)[..., None], m.astype(np.float64)[..., None]
    parts = [d[..., None].view(np.uint8)]
    if kind.endswith("_1"):
        parts.append(m[..., None].view(np.uint8))
        values = q * scale + least
    else:
        values = (q - {"q8": 128, "q5": 16, "q4": 8}[kind[:2]]) * scale
    if kind == "q8_0":
        parts.append((q - 128).astype(np.int8).view(np.uint8))
    else:
        if kind.startswith("q5"):
            bits = (q >> 4 << np.arange(BLOCK)).sum(axis=-1).astype(np.uint32)
            parts.append(bits[..., None].view(np.uint8))
        low = q & 15
        parts.append((low[..., :16] | low[..., 16:] << 4).astype(np.uint8))
    blocks = np.concatenate(parts, axis=-1)
    return blocks.reshape(*shape[:-1], -1), values.reshape(shape)


def stored(kind: str, shape: tuple[int, ...], random: Any) -> tuple[np.ndarray, np.ndarray, int]:
    """Bytes, values, and the bytes of one element (of a block, if quantized)."""
    plain: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    if kind in plain:
        values = random.standard_normal(shape).astype(plain[kind])
        size = values.dtype.itemsize
        raw = np.ascontiguousarray(values).view(np.uint8).reshape(*shape[:-1], -1)
        return raw, values.astype(np.float64), size
    raw, values = quantized(kind, shape, random)
    return raw, values, raw.shape[-1] * BLOCK // shape[-1]


@dataclass(frozen=True)
class Problem:
    """One attention: lengths, heads, dimensions; `vec` is the kernel for few queries."""

    kind: str
    dk: int
    dv: int
    queries: int
    keys: int
    vec: bool
    heads: int = 4
    kv_heads: int = 2
    mask: bool = True
    softcap: float = 0.0

    def __str__(self) -> str:
        name = "vec" if self.vec else "ext"
        return (
            f"{name} {self.kind} dk{self.dk} dv{self.dv} q{self.queries} k{self.keys}"
            + (" mask" if self.mask else "")
            + (" softcap" if self.softcap else "")
        )


@dataclass
class Runner:
    """Launches kernels of one source, and notes what the checker finds."""

    source: str
    folders: list[Path]
    findings: int = 0
    reports: str = ""

    def __call__(
        self,
        kernel: str,
        buffers: dict[int, Any],
        groups: tuple[int, int, int],
        threads: tuple[int, int, int],
        constants: dict[int | str, Any],
        memory: int = 0,
    ) -> dict[int, mx.array]:
        grid = tuple(a * b for a, b in zip(groups, threads, strict=True))
        with simulator.record(checked=current_recorder().checked) as runs:
            found = simulator.run_metal(
                self.source,
                kernel,
                buffers,
                grid,  # type: ignore[arg-type]
                threads,
                constants=constants,
                threadgroup_memory={0: memory} if memory else {},
                include_dirs=self.folders,
            )
        for launch in runs:
            if launch.findings:
                self.findings += len(launch.findings)
                self.reports += f"{kernel}: {launch.findings.report()}\n"
        return found


def arguments(p: Problem, sizes: dict[str, int], scale: float) -> bytes:
    """The argument structure of the attention kernels."""
    s = sizes
    heads_log2 = 1 << (p.heads.bit_length() - 1)
    fields: list[tuple[str, Any]] = [
        *[("i", n) for n in (p.queries, p.heads, 1)],
        *[("Q", n) for n in (s["nb01"], s["nb02"], s["nb03"])],
        *[("i", n) for n in (p.keys, p.kv_heads, 1, s["ns10"])],
        *[("Q", n) for n in (s["nb11"], s["nb12"], s["nb13"])],
        ("i", s["ns20"]),
        *[("Q", n) for n in (s["nb21"], s["nb22"], s["nb23"])],
        *[("i", n) for n in (p.queries, 1, 1)],
        *[("Q", n) for n in (s["nb31"], s["nb32"], s["nb33"])],
        *[("i", n) for n in (p.heads, p.queries, 1)],
        *[("f", n) for n in (scale / (p.softcap or 1.0), 0.0, 1.0, 1.0)],
        ("i", heads_log2),
        ("f", p.softcap),
    ]
    data = struct.pack("@" + "".join(c for c, _ in fields), *[v for _, v in fields])
    return data + bytes(-len(data) % 8)


def run(p: Problem, runner: Runner, seed: int) -> float:
    """Run one attention; its largest error relative to the largest value."""
    random = np.random.default_rng(seed)
    q = random.standard_normal((p.heads, p.queries, p.dk)).astype(np.float32)
    k_raw, k, k_size = stored(p.kind, (p.kv_heads, p.keys, p.dk), random)
    v_raw, v, v_size = stored(p.kind, (p.kv_heads, p.keys, p.dv), random)
    mask = np.where(random.random((p.queries, p.keys)) < 0.3, -np.inf, 0).astype(np.float16)
    mask[:, 0] = 0
    scale = p.dk**-0.5
    nb11, nb21, nb31 = k_raw.shape[-1], v_raw.shape[-1], p.keys * 2
    sizes = {
        "nb01": p.dk * 4,
        "nb02": p.queries * p.dk * 4,
        "nb03": p.heads * p.queries * p.dk * 4,
        "ns10": nb11 // k_size,
        "nb11": nb11,
        "nb12": nb11 * p.keys,
        "nb13": nb11 * p.keys * p.kv_heads,
        "ns20": nb21 // v_size,
        "nb21": nb21,
        "nb22": nb21 * p.keys,
        "nb23": nb21 * p.keys * p.kv_heads,
        "nb31": nb31,
        "nb32": nb31 * p.queries,
        "nb33": nb31 * p.queries,
    }
    step, block = (32, 1) if p.vec else (64, 8)
    padded = p.keys % step != 0
    arrays = {n: mx.array(a) for n, a in (("q", q), ("k", k_raw), ("v", v_raw), ("m", mask))}
    pad: mx.array = mx.zeros((64,), mx.uint8)
    if padded:
        n = p.kv_heads * (nb11 + nb21) * step + step * 2 * p.queries
        note = [p.keys, p.kv_heads, 1, *(sizes[f"nb{i}"] for i in (11, 12, 13, 21, 22, 23))]
        data = struct.pack("@iiiQQQQQQiiiQQQ", *note, p.queries, 1, 1, nb31, *2 * [sizes["nb32"]])
        pad = runner(
            "kernel_flash_attn_ext_pad",
            {
                0: data,
                1: arrays["k"],
                2: arrays["v"],
                3: arrays["m"],
                4: simulator.Output((n,), mx.uint8, 0),
            },
            (step, p.kv_heads, 1),
            (32, 1, 1),
            {100: p.mask, 125: step},
        )[4]
    blocks: mx.array = mx.zeros((64,), mx.uint8)
    if p.mask and not p.vec:
        rows, columns = -(-p.queries // block), -(-p.keys // step)
        data = struct.pack(
            "@iiiiiQQQ", p.queries, p.keys, p.queries, 1, 1, nb31, *2 * [sizes["nb32"]]
        )
        blocks = runner(
            "kernel_flash_attn_ext_blk",
            {0: data, 1: arrays["m"], 2: simulator.Output((rows * columns,), mx.uint8)},
            (columns, rows, 1),
            (32, 1, 1),
            {224: block, 225: step},
        )[2]
    simdgroups, groups = (1, 32) if p.vec else (8 if p.dk >= 512 else 4, 1)
    while p.vec and 2 * groups * simdgroups * step < p.keys and simdgroups < 4:
        simdgroups *= 2
    base = 400 if p.vec else 300
    constants: dict[int | str, Any] = {
        base: p.mask,
        base + 1: False,
        base + 2: False,
        base + 3: bool(p.softcap),
        base + 4: padded,
        base + 20: sizes["ns10"],
        base + 21: sizes["ns20"],
        base + 22: simdgroups,
    }
    wide = -(-p.dv // (128 if p.vec else 64)) * (128 if p.vec else 64)
    if p.vec:
        constants[base + 23] = groups
        memory = (-(-p.dk // 128) * 128 + 4 * step + 2 * wide) * simdgroups * 2
    else:
        constants[base + 10] = p.mask and p.queries % 8 != 0
        extra = 16 * 32 * simdgroups if p.kind.startswith("q") else 0
        memory = (block * (p.dk + 2 * wide + 4 * step) + extra) * 2
    given = {
        0: arguments(p, sizes, scale),
        1: arrays["q"],
        2: arrays["k"],
        3: arrays["v"],
        4: arrays["m"] if p.mask else arrays["q"],
        5: arrays["q"],
        6: pad,
    }
    name = f"kernel_flash_attn_ext{'_vec' if p.vec else ''}_{p.kind}_dk{p.dk}_dv{p.dv}"
    rows = p.heads * p.queries
    out = simulator.Output((p.queries, p.heads, p.dv), mx.float32)
    if p.vec:
        partial = simulator.Output((rows * groups * (p.dv + 2),), mx.float32)
        grid = (p.queries, p.heads, groups)
        made = runner(name, {**given, 7: partial}, grid, (32, simdgroups, 1), constants, memory)
        data = struct.pack("@i", rows)
        found = runner(
            "kernel_flash_attn_ext_vec_reduce",
            {0: data, 1: made[7], 2: out},
            (rows, 1, 1),
            (32 * groups, 1, 1),
            {500: p.dv, 501: groups},
        )[2]
    else:
        grid = (-(-p.queries // block), p.heads, 1)
        found = runner(
            name, {**given, 7: blocks, 8: out}, grid, (32, simdgroups, 1), constants, memory
        )[8]
    group = p.heads // p.kv_heads
    scores = np.einsum("hqd,hkd->hqk", q.astype(np.float64), k.repeat(group, 0)) * scale
    if p.softcap:
        scores = p.softcap * np.tanh(scores / p.softcap)
    if p.mask:
        scores = scores + mask.astype(np.float64)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    right = np.einsum("hqk,hkd->qhd", weights, v.repeat(group, 0))
    return float(np.abs(np.array(found) - right).max() / np.abs(right).max())


def problems(types: list[str], dims: list[int]) -> Iterator[Problem]:
    for kind in types:
        for d in dims:
            yield Problem(kind, d, d, 3, 64, vec=True)
            yield Problem(kind, d, d, 2, 75, vec=True, mask=False, softcap=20.0)
            yield Problem(kind, d, d, 21, 64, vec=False)
            yield Problem(kind, d, d, 24, 100, vec=False, softcap=20.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--types", default="f32,f16,bf16,q4_0,q4_1,q5_0,q5_1,q8_0")
    parser.add_argument("--dims", default="64,128")
    parser.add_argument("--plain", action="store_true", help="Without the checker.")
    given = parser.parse_args()
    (path,) = given.checkout.glob("**/ggml-metal.metal")
    runner = Runner(DEFINED + path.read_text(), [path.parent, path.parent.parent])
    failed = 0
    for seed, problem in enumerate(
        problems(given.types.split(","), [int(d) for d in given.dims.split(",")])
    ):
        before = runner.findings
        with simulator.record(checked=not given.plain):
            try:
                error = run(problem, runner, seed)
            except MetalgenError as fault:
                failed += 1
                print(f"FAILED {problem}: {str(fault).splitlines()[0]}", flush=True)
                continue
        wrong = not error < 2e-2
        failed += wrong
        found = runner.findings - before
        print(
            f"{'WRONG ' if wrong else 'right '} {problem}: {error:.1e}, {found} findings",
            flush=True,
        )
    print(f"{failed} failed, {runner.findings} findings")
    if runner.reports:
        print(runner.reports, file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
