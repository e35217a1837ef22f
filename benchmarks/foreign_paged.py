"""Run vllm-metal's paged attention kernels, unmodified, on the simulator, against float64.

    python benchmarks/foreign_paged.py CHECKOUT [--types float,half] [--plain]

The launches are those of its own host code: one query a sequence, one query over partitions with a
reduction after, and tiles of queries; sequences of several lengths, in shuffled pages.
"""

from __future__ import annotations

import argparse
import struct
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np
from foreign_metal import units

from metalgen import simulator
from metalgen.errors import MetalgenError

TYPES: dict[str, Any] = {
    "float": np.float32,
    "half": np.float16,
    "bfloat16_t": ml_dtypes.bfloat16,
}
MLX = {"float": mx.float32, "half": mx.float16, "bfloat16_t": mx.bfloat16}
THREADS, PARTITION, BLOCK, KV_HEADS, HEADS = 256, 512, 16, 2, 4


class Problem:
    """Sequences with `queries` at the end of `keys` each, in pages; and what must come out."""

    def __init__(self, kind: str, dim: int, queries: list[int], keys: list[int]) -> None:
        random = np.random.default_rng(dim)
        self.kind, self.dim, self.queries, self.keys = kind, dim, queries, keys
        most = max(-(-n // BLOCK) for n in keys)
        pages = sum(-(-n // BLOCK) for n in keys)
        shape = (pages, BLOCK, KV_HEADS, dim)
        self.k = random.standard_normal(shape).astype(TYPES[kind])
        self.v = random.standard_normal(shape).astype(TYPES[kind])
        self.q = random.standard_normal((sum(queries), HEADS, dim)).astype(TYPES[kind])
        order = list(random.permutation(pages))
        self.table = np.zeros((len(keys), most), np.uint32)
        for row, n in zip(self.table, keys, strict=True):
            for place in range(-(-n // BLOCK)):
                row[place] = order.pop()
        self.starts = np.concatenate([[0], np.cumsum(queries)]).astype(np.int32)

    def right(self) -> np.ndarray:
        out = np.zeros(self.q.shape)
        for s, (nq, nk) in enumerate(zip(self.queries, self.keys, strict=True)):
            rows = self.table[s][: -(-nk // BLOCK)]
            k, v = (
                a[rows].reshape(-1, KV_HEADS, self.dim)[:nk].astype(np.float64)
                for a in (self.k, self.v)
            )
            k, v = (a.repeat(HEADS // KV_HEADS, axis=1) for a in (k, v))
            q = self.q[self.starts[s] : self.starts[s + 1]].astype(np.float64)
            scores = np.einsum("qhd,khd->hqk", q, k) * self.dim**-0.5
            hidden = np.arange(nk)[None, :] > np.arange(nk - nq, nk)[:, None]
            scores = np.where(hidden, -np.inf, scores)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weights /= weights.sum(axis=-1, keepdims=True)
            out[self.starts[s] : self.starts[s + 1]] = np.einsum("hqk,khd->qhd", weights, v)
        return out

    def buffers(self) -> dict[int, Any]:
        lengths = np.array(self.keys, np.uint32)
        kind = MLX[self.kind]
        q, k, v = (mx.array(a.astype(np.float32)).astype(kind) for a in (self.q, self.k, self.v))
        return {
            3: q,
            4: k,
            5: v,
            8: struct.pack("i", KV_HEADS),
            9: struct.pack("f", self.dim**-0.5),
            10: struct.pack("f", 0.0),
            11: mx.array(self.table),
            12: mx.array(lengths),
            13: struct.pack("i", self.table.shape[1]),
            15: struct.pack("i", HEADS * self.dim),
            16: struct.pack("i", BLOCK * KV_HEADS * self.dim),
            17: struct.pack("i", self.dim),
            19: mx.array(self.starts),
            20: struct.pack("i", len(self.keys)),
            21: struct.pack("i", -1),
        }


def launch(source: str, kernel: str, folders: list[Path], **given: Any) -> dict[int, mx.array]:
    threads = given["threads"]
    grid = (given["groups"][0] * threads, *given["groups"][1:])
    return simulator.run_metal(
        source,
        kernel,
        given["buffers"],
        grid,  # type: ignore[arg-type]
        (threads, 1, 1),
        constants=given["constants"],
        threadgroup_memory={0: -(-given["memory"] // 16) * 16},
        include_dirs=folders,
    )


OFF: dict[int | str, Any] = {20: False, 30: False, 40: False, 50: False, 60: 0, 70: 0, 110: 0}


def decode(p: Problem, source: str, folders: list[Path], split: bool) -> np.ndarray:
    warps = THREADS // 32
    memory = max(warps * BLOCK * 4, (2 * warps + warps * p.dim) * 4)
    name = f"{p.kind}_cache_{p.kind}_{p.kind}_hs{p.dim}_bs{BLOCK}_nt256_nsl32"
    parts = -(-max(p.keys) // PARTITION) if split else 1
    rows = len(p.q)
    out = simulator.Output((rows, HEADS, p.dim), MLX[p.kind])
    buffers = p.buffers() | {2: out}
    if split:
        buffers |= {
            0: simulator.Output((rows, HEADS, parts), mx.float32),
            1: simulator.Output((rows, HEADS, parts), mx.float32),
            2: simulator.Output((rows, HEADS, parts, p.dim), MLX[p.kind]),
        }
    found = launch(
        source,
        f"paged_attention_{name}_ps{PARTITION if split else 0}",
        folders,
        buffers=buffers,
        groups=(HEADS, rows, parts),
        threads=THREADS,
        constants={10: split, **OFF},
        memory=memory,
    )
    if split:
        found = launch(
            source,
            f"paged_attention_v2_reduce_{p.kind}_hs{p.dim}_nt256_nsl32_ps{PARTITION}",
            folders,
            buffers={
                0: out,
                1: found[0],
                2: found[1],
                3: found[2],
                4: buffers[12],
                5: struct.pack("i", parts),
                7: buffers[19],
                8: buffers[20],
            },
            groups=(HEADS, rows, 1),
            threads=THREADS,
            constants={40: False, 50: False},
            memory=2 * parts * 4,
        )
    return np.array(found[0 if split else 2].astype(mx.float32))


def tiled(p: Problem, source: str, folders: list[Path]) -> np.ndarray:
    size = np.dtype(TYPES[p.kind]).itemsize
    found = launch(
        source,
        f"paged_attention_tiled_{p.kind}_hs{p.dim}_bs{BLOCK}_bq32_tk32_nt128",
        folders,
        buffers=p.buffers() | {2: simulator.Output((len(p.q), HEADS, p.dim), MLX[p.kind])},
        groups=(HEADS, len(p.q) // 32 + len(p.keys), 1),
        threads=128,
        constants={40: False},
        memory=(32 + 2 * 32) * (p.dim + 16 // size) * size,
    )
    return np.array(found[2].astype(mx.float32))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--types", default="float,half,bfloat16_t")
    parser.add_argument("--plain", action="store_true", help="Without the checker.")
    given = parser.parse_args()
    _, source, folders = next(u for u in units(given.checkout) if u[0] == "pagedattention_tiled")
    failed = findings = 0
    for kind in given.types.split(","):
        one, several = (
            Problem(kind, 64, [1, 1, 1], [5, 70, 33]),
            Problem(kind, 64, [40, 3], [40, 75]),
        )
        long = Problem(kind, 64, [1, 1], [600, 20])
        for name, problem, run in (
            ("decode", one, lambda p: decode(p, source, folders, False)),
            ("decode in partitions", long, lambda p: decode(p, source, folders, True)),
            # Tiles are of 16-bit types; others take a row a threadgroup.
            ("tiles", several, lambda p: tiled(p, source, folders))
            if kind != "float"
            else ("rows", several, lambda p: decode(p, source, folders, False)),
        ):
            with simulator.record(checked=not given.plain) as runs:
                try:
                    found = run(problem)
                except MetalgenError as error:
                    failed += 1
                    print(f"FAILED {name} {kind}: {str(error).splitlines()[0]}", flush=True)
                    continue
            right = problem.right()
            error = np.abs(found - right).max() / np.abs(right).max()
            failed += not error < 2e-2
            count = sum(len(each.findings or ()) for each in runs)
            findings += count
            verdict = "right" if error < 2e-2 else "WRONG"
            print(f"{verdict}  {name} {kind}: {error:.1e}, {count} findings", flush=True)
            for each in runs:
                if each.findings:
                    print(each.findings.report(), file=sys.stderr)
    print(f"{failed} failed, {findings} findings")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
