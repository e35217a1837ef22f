"""Who runs when: lockstep at collectives, partial threadgroups, loops that lanes leave early."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Run = Callable[..., Any]
LANE = np.arange(64) % 32


@pytest.mark.parametrize("seed", [0, 1, 99])
@pytest.mark.parametrize("mode", ["plain", "checked"])
def test_lanes_that_left_a_loop_wait_for_those_inside(run: Run, mode: str, seed: int) -> None:
    """Lane k takes k % 4 turns; each turn counts the lanes still inside; then all meet again."""
    body = (
        "float n = 0;\nfor (uint k = 0; k < lane % 4; k++) n += simd_sum(1.0f);\n"
        "a[i] = n * 100 + simd_sum(1.0f);"
    )
    out = [np.zeros(64, np.float32)]
    assert run(body, out, mode=mode, seed=seed).code == 0
    inside = np.array([0, 24, 24 + 16, 24 + 16 + 8])
    assert np.array_equal(out[0], inside[LANE % 4] * 100 + 32)


def test_a_partial_threadgroup_has_fewer_lanes(run: Run) -> None:
    out = [np.zeros(80, np.float32)]
    body = "threadgroup_barrier(mem_flags::mem_none);\na[i] = simd_sum(1.0f) + 100 * float(group);"
    assert run(body, out, threads=80, threadgroup=48).code == 0
    assert np.array_equal(out[0], np.r_[np.full(32, 32), np.full(16, 16), np.full(32, 132)])


def test_both_branches_may_hold_a_collective(run: Run) -> None:
    out = [np.zeros(64, np.float32)]
    run("if (lane < 10) a[i] = simd_sum(1.0f); else a[i] = simd_max(float(lane));", out)
    assert np.array_equal(out[0], np.where(LANE < 10, 10, 31))


def test_a_seed_changes_the_order_not_the_result(run: Run) -> None:
    body = (
        "threadgroup int next; if (t == 0) next = 0;\nthreadgroup_barrier(mem_flags::mem_threadgroup);\n"
        "a[i] = atomic_fetch_add_explicit((threadgroup atomic_int*)&next, 1, memory_order_relaxed);"
    )
    orders = []
    for seed in (0, 5):
        out = [np.zeros(64, np.int32)]
        assert run(body, out, seed=seed).code == 0
        assert sorted(out[0]) == list(range(64))
        orders.append(out[0].tolist())
    assert orders[0] != orders[1]


def test_threadgroups_run_in_parts(run: Run) -> None:
    out = [np.zeros(64, np.float32)]
    result = run("a[i] = float(group);", out, threadgroup=8)
    assert np.array_equal(out[0], np.arange(64) // 8)
    assert (result.counters["threadgroups"], result.counters["threads"]) == (8, 64)


CRASH = """
import ctypes, struct, sys
import numpy as np
from metalgen.simulator.compiler import compile_metal
sys.path.insert(0, sys.argv[1])
import conftest
source = '''#include <metal_stdlib>
using namespace metal;
int deep(int n, thread int* p) { int x[64]; x[n & 63] = n; return n == 0 ? *p : deep(n - 1, x) + x[3]; }
[[kernel]] void k(device int* a [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  int y = 1;
  a[i] = CALL;
}'''.replace("CALL", sys.argv[2])
kernel = compile_metal(source, "k")
report = np.memmap(sys.argv[3], np.uint8, "r+")
class Report:
    pass
conftest.ctypes.create_string_buffer = lambda n: (ctypes.c_char * n).from_buffer(report)
conftest.launch(kernel, [np.zeros(4, np.int32)], (4, 1, 1), (4, 1, 1))
"""


@pytest.mark.skipif(
    sys.platform != "linux", reason="reads the report of a process that a Linux signal ended"
)
@pytest.mark.parametrize(
    ("call", "status"), [("deep(1000000 + a[i], &y)", 3), ("*(device int*)16ul", 4)]
)
def test_a_fatal_signal_leaves_its_cause_in_the_report(
    call: str, status: int, tmp_path: Any
) -> None:
    from pathlib import Path

    report = tmp_path / "report"
    report.write_bytes(bytes(1 << 19))
    ended = subprocess.run(
        [sys.executable, "-c", CRASH, str(Path(__file__).parent), call, str(report)],
        capture_output=True,
    )
    assert ended.returncode == -11, ended.stderr
    raw = report.read_bytes()
    assert raw[:8] == b"MGREPORT"
    assert int.from_bytes(raw[12:16], "little") == status
