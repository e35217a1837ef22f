"""The runtime on aarch64, under qemu's user mode: fibres, collectives, matrices, checks.

The kernels and the runtime are compiled for aarch64 by the same toolchain and linked with driver.c.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from metalgen.simulator.compiler import build, front, toolchain

MACHINE = ("-target", "aarch64-linux-musl")
DRIVER = Path(__file__).parent / "driver.c"
QEMU = shutil.which("qemu-aarch64")

pytestmark = pytest.mark.skipif(
    QEMU is None, reason="qemu-aarch64 (Debian's qemu-user) is not installed"
)

HEAD = """#include <metal_stdlib>
#include <metal_simdgroup_matrix>
using namespace metal;
[[kernel]] void k(device float* a [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]], uint lane [[thread_index_in_simdgroup]],
                  uint t [[thread_index_in_threadgroup]]) {
"""
Run = Callable[..., tuple[np.ndarray[Any, Any], list[int]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """run(body, a, size, mode="plain", seed=0): the output, and [code, findings, their kinds...]."""

    def execute(
        body: str,
        a: np.ndarray[Any, Any],
        size: int,
        mode: front.Mode = "plain",
        threadgroup: int = 64,
        seed: int = 0,
    ) -> tuple[np.ndarray[Any, Any], list[int]]:
        folder = tmp_path_factory.mktemp("aarch64")
        unit = front.compile_unit(
            HEAD + body + "\n}\n", "k", folder, mode=mode, constants={}, machine=MACHINE
        )
        program = folder / "program"
        done = toolchain.run(
            [
                "cc",
                *MACHINE,
                "-static",
                "-O1",
                "-o",
                str(program),
                str(DRIVER),
                str(unit.object),
                str(build.runtime(mode, MACHINE)),
                "-lm",
            ],
            folder,
        )
        assert done.returncode == 0, done.stderr
        out = np.zeros(size, np.float32)
        arguments = [
            str(QEMU),
            str(program),
            str(len(a)),
            str(threadgroup),
            str(seed),
            str(a.nbytes),
            str(out.nbytes),
        ]
        ended = subprocess.run(
            arguments, input=a.tobytes() + out.tobytes(), capture_output=True, timeout=120
        )
        assert ended.returncode == 0, ended.stderr
        got = np.frombuffer(ended.stdout[a.nbytes :], np.float32)
        return got, [int(word) for word in ended.stderr.split()]

    return execute


A = np.arange(128, dtype=np.float32)


@pytest.mark.parametrize("seed", [0, 7])
def test_threads_meet_at_barriers(run: Run, seed: int) -> None:
    body = (
        "threadgroup float s[64]; s[t] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "out[i] = s[63 - t];"
    )
    got, said = run(body, A, 128, seed=seed)
    assert np.array_equal(got, A.reshape(2, 64)[:, ::-1].reshape(-1))
    assert said == [0, 0]


def test_lanes_meet_at_collectives(run: Run) -> None:
    got, _ = run(
        "float x = simd_shuffle_xor(a[i], ushort(9)); if (lane < 5) x += simd_sum(a[i]);"
        "out[i] = x + simd_prefix_inclusive_sum(1.0f);",
        A,
        128,
    )
    lane = np.arange(128) % 32
    sums = np.repeat(A.reshape(-1, 32)[:, :5].sum(1), 32)
    assert np.array_equal(got, A[np.arange(128) ^ 9] + np.where(lane < 5, sums, 0) + lane + 1)


def test_registers_survive_a_wait(run: Run) -> None:
    """Values of every kind are live across many collectives."""
    body = (
        "float v[24]; int n[8]; for (int k = 0; k < 24; k++) v[k] = a[i] * (k + 1);"
        "for (int k = 0; k < 8; k++) n[k] = int(a[i]) + k;"
        "float s = 0; for (int r = 0; r < 3; r++) { s += simd_shuffle_xor(v[r], ushort(1));"
        "for (int k = 0; k < 24; k++) v[k] += n[k % 8]; }"
        "for (int k = 0; k < 24; k++) s += v[k]; out[i] = s;"
    )
    got, _ = run(body, A, 128)

    def expected(i: int) -> float:
        def v(j: int, k: int, rounds: int) -> float:
            return float(A[j]) * (k + 1) + rounds * (int(A[j]) + k % 8)

        return sum(v(i ^ 1, r, r) for r in range(3)) + sum(v(i, k, 3) for k in range(24))

    assert np.array_equal(got, np.array([expected(i) for i in range(128)], np.float32))


def test_matrices_multiply(run: Run) -> None:
    a = (np.arange(64, dtype=np.float32) * 7 % 13 - 6) / 4
    body = (
        "simdgroup_float8x8 x, z(0.0f); simdgroup_half8x8 y; simdgroup_load(x, a, 8);"
        "y.thread_elements() = half2(x.thread_elements().x, x.thread_elements().y);"
        "simdgroup_multiply_accumulate(z, x, y, z); simdgroup_store(z, out, 8);"
    )
    got, said = run(
        body.replace("half2(x", "half2(half(x")
        .replace(".x, x", ".x), half(x")
        .replace(".y);", ".y));", 1),
        a[:64],
        64,
        threadgroup=32,
    )
    assert np.allclose(got, (a.reshape(8, 8) @ a.reshape(8, 8)).reshape(-1), atol=1e-6)
    assert said == [0, 0]


def test_a_missing_barrier_is_found(run: Run) -> None:
    _got, said = run(
        "threadgroup float s[64]; s[t] = a[i]; out[i] = s[t ^ 1];", A, 128, mode="checked"
    )
    assert said[0] == 1 and 1 in said[2:]


def test_an_access_out_of_bounds_is_found(run: Run) -> None:
    _, said = run("out[i] = a[i + 1];", A, 128, mode="checked")
    assert said == [1, 1, 4]


def test_a_clean_kernel_is_clean(run: Run) -> None:
    body = (
        "threadgroup float s[64]; s[t] = a[i]; threadgroup_barrier(mem_flags::mem_threadgroup);"
        "out[i] = s[63 - t] + float(half(a[i])) + float(bfloat(1.0f));"
    )
    got, said = run(body, A, 128, mode="checked")
    assert said == [0, 0]
    assert np.array_equal(got, A.reshape(2, 64)[:, ::-1].reshape(-1) + A + 1)
