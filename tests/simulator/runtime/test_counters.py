"""The counters against hand calculation, and against the figures known for MLX's attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx
import numpy as np
import pytest

from metalgen.simulator.compiler import compile_metal

Run = Callable[..., Any]
MLX_INCLUDE = Path(next(iter(mlx.__path__))) / "include"


def test_bytes_are_counted_by_buffer(run: Run) -> None:
    arrays = [np.zeros(128, np.float16), np.zeros(64, np.float32)]
    result = run("half2 v = ((device half2*)a)[i / 2];\nb[i] = v.x + float(a[3]);", arrays)
    a, b = result.buffers[:2]
    assert (a["bytes_read"], a["reads"], a["distinct_read"]) == (64 * 4 + 64 * 2, 128, 128)
    assert (b["bytes_written"], b["writes"], b["distinct_written"], b["bytes_read"]) == (
        256,
        64,
        256,
        0,
    )


def test_threadgroup_memory_and_events_are_counted(run: Run) -> None:
    body = (
        "threadgroup float s[64];\ns[t] = exp(a[i]) + exp2(a[i]);\n"
        "threadgroup_barrier(mem_flags::mem_threadgroup);\nsimdgroup_barrier(mem_flags::mem_none);\n"
        "b[i] = simd_shuffle_xor(s[63 - t], ushort(1)) + simd_sum(s[t]) + (simd_any(true) ? 1 : 0);"
    )
    arrays = [np.zeros(128, np.float32), np.zeros(128, np.float32)]
    result = run(body, arrays, threads=128)
    shared, counters = result.buffers[32], result.counters
    assert (shared["bytes_read"], shared["bytes_written"]) == (128 * 8, 128 * 4)
    assert counters["exponentials"] == 256
    assert counters["threadgroup_barriers"] == 2
    assert (
        counters["simdgroup_barriers"],
        counters["shuffles"],
        counters["reductions"],
        counters["ballots"],
    ) == (4, 4, 4, 4)
    assert (counters["threadgroups"], counters["threads"], counters["threadgroup_bytes"]) == (
        2,
        128,
        256,
    )


def test_matrices_are_counted(run: Run) -> None:
    body = (
        "simdgroup_float8x8 x, y(0.0f);\nsimdgroup_load(x, a, 8);\n"
        "for (int k = 0; k < 3; k++) simdgroup_multiply_accumulate(y, x, x, y);\nsimdgroup_store(y, b, 8);"
    )
    result = run(
        body, [np.zeros(64, np.float32), np.zeros(64, np.float32)], threads=32, threadgroup=32
    )
    assert result.counters["multiply_accumulates"] == 3
    assert result.buffers[0]["bytes_read"] == result.buffers[1]["bytes_written"] == 256


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (
            128,
            dict(
                q=262144,
                kv=4194304,
                o=262144,
                shared_read=41943040,
                shared_written=8650752,
                products=262144,
                exponentials=655360,
                barriers=4160,
                threadgroup=14848,
            ),
        )
    ],
)
def test_the_counts_of_mlx_attention_are_exact(
    launch_kernel: Callable[..., Any], depth: int, expected: dict[str, int]
) -> None:
    """Half precision, 2 heads, 512 queries and keys: counted by hand from MLX's source."""
    heads, length, block_q, block_k = 2, 512, 32, 16
    arguments = f"half,{block_q},{block_k},{depth},{depth},4,1,bool,float"
    source = (
        '#include "mlx/backend/metal/kernels/utils.h"\n'
        '#include "mlx/backend/metal/kernels/steel/attn/kernels/steel_attention.h"\n'
        f'template [[host_name("attention_half")]] [[kernel]] decltype(attention<{arguments}>) '
        f"attention<{arguments}>;\n"
    )
    constants: dict[str | int, object] = {
        200: True,
        201: True,
        300: False,
        301: False,
        302: False,
        303: False,
    }
    kernel = compile_metal(
        source, "attention_half", mode="checked", constants=constants, include_dirs=[MLX_INCLUDE]
    )
    random = np.random.default_rng(0)
    q, k, v = (random.standard_normal((heads, length, depth)).astype(np.float16) for _ in range(3))
    out = np.zeros_like(q)
    scale = np.float32(1 / np.sqrt(depth))
    blocks_q, blocks_k = length // block_q, length // block_k
    head = np.array([1, heads, depth, length, length, 1], np.int32).tobytes() + scale.tobytes()
    head += np.array([blocks_q, blocks_k, blocks_q, blocks_k, 0, 0, 0], np.int32).tobytes()
    strides = np.array([heads * length * depth, length * depth, depth] * 4, np.int64).tobytes()
    params = np.frombuffer(head + strides, np.uint8).copy()
    result = launch_kernel(
        kernel,
        [q, k, v, out, params],
        (blocks_q * 128, heads, 1),
        (128, 1, 1),
        flags={0: 2, 1: 2, 2: 2, 4: 2},
    )
    assert result.findings == []
    scores = np.einsum("hqd,hkd->hqk", np.float64(q), np.float64(k)) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    right = np.einsum("hqk,hkd->hqd", weights / weights.sum(-1, keepdims=True), np.float64(v))
    assert np.abs(out - right).max() < 5e-4
    shared, counters = result.buffers[32], result.counters
    assert (
        dict(
            q=result.buffers[0]["bytes_read"],
            kv=result.buffers[1]["bytes_read"],
            o=result.buffers[3]["bytes_written"],
            shared_read=shared["bytes_read"],
            shared_written=shared["bytes_written"],
            products=counters["multiply_accumulates"],
            exponentials=counters["exponentials"],
            barriers=counters["threadgroup_barriers"],
            threadgroup=counters["threadgroup_bytes"],
        )
        == expected
    )
    assert result.buffers[2]["bytes_read"] == expected["kv"]
    assert result.buffers[1]["distinct_read"] == k.nbytes


def aligned(count: int) -> np.ndarray[Any, Any]:
    """`count` float zeros from an address that 128 divides."""
    raw = np.zeros(count + 32, np.float32)
    first = -(raw.ctypes.data // 4) % 32
    return raw[first : first + count]


@pytest.mark.parametrize(
    ("index", "lines"),
    [
        ("i", 2),
        ("63 - i", 2),
        ("32 * i", 64),
        ("i / 32", 2),
        ("i + 1", 4),
        ("2 * i", 4),
        ("lane % 2 * 4096", 4),
    ],
)
def test_the_lines_that_a_simdgroup_touches_are_counted(run: Run, index: str, lines: int) -> None:
    """64 threads are two simdgroups, so two accesses."""
    arrays = [aligned(8192), aligned(64)]
    read = run(f"b[i] = a[{index}];", arrays).buffers[0]
    assert (read["simdgroup_accesses"], read["lines"]) == (2, lines)


def test_wide_accesses_count_each_line_once(run: Run) -> None:
    read = run(
        "float4 v = ((device float4*)a)[i]; b[i] = v.x;", [aligned(256), aligned(64)]
    ).buffers[0]
    assert (read["simdgroup_accesses"], read["lines"], read["bytes_read"]) == (2, 8, 1024)


@pytest.mark.parametrize(
    ("index", "conflicts"),
    [
        ("t", 0),
        ("t ^ 7", 0),
        ("0", 0),
        ("2 * lane", 1),
        ("4 * lane", 3),
        ("32 * lane", 31),
        ("33 * lane", 0),
    ],
)
def test_bank_conflicts_are_the_passes_beyond_the_fewest(
    run: Run, index: str, conflicts: int
) -> None:
    body = f"threadgroup float s[1056];\ns[t] = 0;\nif (t < 32) b[i] = a[i] + s[{index}];"
    counters = run(body, [aligned(64), aligned(64)]).counters
    assert counters["bank_accesses"] == 3  # two writes, one read
    assert counters["bank_conflicts"] == conflicts


def test_lanes_on_different_ways_are_matched_by_their_instruction(run: Run) -> None:
    """Half of the lanes read twice before all read once: three accesses a simdgroup, not more."""
    body = "float x = 0;\nif (lane < 16) { x = a[i] * a[i + 64]; }\nfloat y = simd_sum(x);\nb[i] = y + a[i + 128];"
    read = run(body, [aligned(256), aligned(64)]).buffers[0]
    assert (read["reads"], read["simdgroup_accesses"]) == (32 + 32 + 64, 6)
