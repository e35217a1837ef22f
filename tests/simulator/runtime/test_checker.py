"""What the checked mode finds, kind by kind, and that it stays silent on what is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

Run = Callable[..., Any]

(
    RACE,
    BETWEEN,
    ATOMIC,
    BOUNDS,
    WILD,
    UNINITIALISED,
    READ_ONLY,
    MISALIGNED,
    BARRIER,
    COLLECTIVE,
    INACTIVE,
    UNDEFINED,
    TOO_LARGE,
    _,
    TOO_MANY_THREADS,
) = range(1, 16)
READ, WRITE = 1, 2
DEVICE, THREADGROUP = 1, 2


def floats() -> list[np.ndarray[Any, Any]]:
    return [np.arange(64, dtype=np.float32), np.zeros(64, np.float32)]


def integers() -> list[np.ndarray[Any, Any]]:
    return [np.arange(64, dtype=np.int32), np.zeros(64, np.int32)]


SHARE = "threadgroup float s[64];\ns[t] = a[i];\n{}\nb[i] = s[63 - t];"
TG, DEV, NONE = "mem_flags::mem_threadgroup", "mem_flags::mem_device", "mem_flags::mem_none"

CLEAN = {
    "a barrier with the right flag": SHARE.format(f"threadgroup_barrier({TG});"),
    "a barrier with both flags": SHARE.format(f"threadgroup_barrier({TG} | {DEV});"),
    "a simdgroup barrier within the simdgroup": f"threadgroup float s[64];\ns[t] = a[i];\nsimdgroup_barrier({TG});\nb[i] = s[t ^ 5];",
    "the own element without a barrier": "threadgroup float s[64];\ns[t] = a[i];\nb[i] = s[t];",
    "many readers": "threadgroup float s[64];\ns[t] = a[i];\n"
    f"threadgroup_barrier({TG});\nb[i] = s[0] + s[t] + s[63];",
    "device memory through a barrier": f"b[i] = a[i];\nthreadgroup_barrier({DEV});\nfloat x = b[63 - i];\n"
    f"threadgroup_barrier({DEV});\nb[i] = x;",
    "the buffer's last element": "b[63 - i] = a[63];",
    "divergent lanes in a reduction": "if (lane < 9) b[i] = simd_sum(a[i]);",
    "neighbouring bytes by different threads": "threadgroup uchar s[64];\ns[t] = uchar(t);\n"
    f"threadgroup_barrier({TG});\nb[i] = s[63 - t];",
    "unsigned arithmetic": "uint x = 4294967295u + uint(i);\nb[i] = float(x << (i & 31));",
    "a swizzle written in place": "float4 v = float4(a[i]);\nv.xy += 1.0f;\nb[i] = v.x;",
}

# title: body, kind, line of the finding
FAULTS = {
    "a missing barrier": (SHARE.format(""), RACE, None),
    "a barrier for the other memory": (SHARE.format(f"threadgroup_barrier({DEV});"), RACE, 4),
    "a barrier for no memory": (SHARE.format(f"threadgroup_barrier({NONE});"), RACE, 4),
    "a simdgroup barrier across simdgroups": (
        SHARE.format(f"simdgroup_barrier({TG});"),
        RACE,
        None,
    ),
    "a collective in place of a barrier": (
        "threadgroup float s[64];\ns[t] = a[i];\nfloat x = simd_sum(1.0f);\nb[i] = x + s[t ^ 1];",
        RACE,
        4,
    ),
    "a write after a read": (
        "threadgroup float s[64];\ns[t] = a[i];\n"
        f"threadgroup_barrier({TG});\nb[i] = s[63 - t];\ns[t] = 0;",
        RACE,
        None,
    ),
    "two writers": ("b[0] = a[i];", RACE, 1),
    "past the end of a buffer": ("b[i] = a[i + 1];", BOUNDS, 1),
    "before the start of a buffer": ("b[i] = a[int(i) - 1];", BOUNDS, 1),
    "past the end of a threadgroup array": (
        "threadgroup float s[63];\ns[t] = a[i];\nb[i] = 0;",
        BOUNDS,
        2,
    ),
    "a vector half out of bounds": ("float2 v = *(device float2*)(a + i);\nb[i] = v.x;", BOUNDS, 1),
    "a structure out of bounds": (
        "struct w { float v[4]; };\nw x = *(device w*)(a + i);\nb[i] = x.v[0];",
        BOUNDS,
        2,
    ),
    "a wild pointer": ("b[i] = *(device float*)(ulong)(0x123450 + 4 * i);", WILD, 1),
    "threadgroup memory that nothing wrote": (
        "threadgroup float s[64];\nif (t < 60) s[t] = a[i];\nb[i] = s[t];",
        UNINITIALISED,
        3,
    ),
    "a misaligned vector": (
        "device float2* p = (device float2*)(b + 1);\nif (t < 31) p[t] = float2(a[i]);",
        MISALIGNED,
        2,
    ),
    "barriers in two branches": (
        f"if (t < 40)\nthreadgroup_barrier({TG});\nelse\nthreadgroup_barrier({TG});\nb[i] = 1;",
        BARRIER,
        None,
    ),
    "a thread that returns before a barrier": (
        f"if (t == 5) return;\nthreadgroup_barrier({TG});\nb[i] = 1;",
        BARRIER,
        2,
    ),
    "half a simdgroup in a matrix product": (
        "simdgroup_float8x8 m = make_filled_simdgroup_matrix<float, 8, 8>(1.0f);\nif (lane < 16)\n"
        "simdgroup_multiply_accumulate(m, m, m, m);\nb[i] = m.thread_elements()[0];",
        COLLECTIVE,
        3,
    ),
    "a shuffle from an inactive lane": (
        "float x = a[i];\nif (lane < 7)\nx += simd_shuffle_xor(x, ushort(8));\nb[i] = x;",
        INACTIVE,
        3,
    ),
}
INTEGER_FAULTS = {
    "an overflowing sum": ("b[i] = 2147483600 + a[i];", 1),
    "an overflowing product": ("b[i] = a[i] * 100000000;", 1),
    "a division by zero": ("b[i] = 10 / a[i];", 3),
    "a remainder by zero": ("b[i] = 10 % a[i];", 3),
    "a shift by the width": ("b[i] = 1 << a[i];", 2),
    "a right shift by the width": ("b[i] = 99 >> a[i];", 2),
}


@pytest.mark.parametrize("title", CLEAN)
def test_what_is_right_is_clean(run: Run, title: str) -> None:
    for seed in (0, 1, 12345):
        result = run(CLEAN[title], floats(), seed=seed)
        assert (result.code, result.findings) == (0, [])


@pytest.mark.parametrize("title", FAULTS)
def test_a_fault_is_found_on_every_schedule(run: Run, title: str) -> None:
    body, kind, line = FAULTS[title]
    for seed in (0, 1, 12345):
        result = run(body, floats(), seed=seed)
        found = [f for f in result.findings if f.kind == kind]
        assert result.code == 1 and found
        assert line is None or {f.line for f in found} == {line}


@pytest.mark.parametrize("title", INTEGER_FAULTS)
def test_undefined_integer_arithmetic_is_found(run: Run, title: str) -> None:
    body, what = INTEGER_FAULTS[title]
    (found,) = run(body, integers()).findings
    assert (found.kind, found.value, found.line) == (UNDEFINED, what, 1)


def test_a_race_names_both_accesses(run: Run) -> None:
    body = f"threadgroup float s[64];\ns[t] = a[i];\nthreadgroup_barrier({DEV});\nif (t == 3) b[i] = s[40];"
    (found,) = run(body, floats()).findings
    assert (found.access, found.line, found.thread) == (READ, 4, (3, 0, 0))
    assert (found.other_access, found.other_line, found.other_thread) == (WRITE, 2, (40, 0, 0))
    assert (found.space, found.buffer, found.offset, found.count) == (THREADGROUP, 0, 160, 1)


def test_out_of_bounds_tells_the_buffer_and_the_distance(run: Run) -> None:
    (found,) = run("b[i] = a[2 * i];", floats()).findings
    assert (found.space, found.buffer, found.limit, found.count) == (DEVICE, 0, 256, 32)
    assert (found.offset, found.thread) == (256, (32, 0, 0))


def test_a_write_out_of_bounds_changes_nothing(run: Run) -> None:
    arrays = [np.arange(64, dtype=np.float32), np.zeros(64, np.float32)]
    run("b[i + 32] = a[i] + 1;", arrays)
    assert np.array_equal(arrays[1], np.r_[np.zeros(32), np.arange(32) + 1].astype(np.float32))


def test_threadgroups_are_never_ordered(run: Run) -> None:
    body = f"threadgroup_barrier({DEV});\nif (t == 0) b[0] = a[i];"
    (found,) = run(body, floats(), threadgroup=32).findings
    assert (found.kind, found.threadgroup, found.other_threadgroup) == (
        BETWEEN,
        (1, 0, 0),
        (0, 0, 0),
    )


def test_an_atomic_and_a_plain_access_race(run: Run) -> None:
    add = "atomic_fetch_add_explicit((device atomic_int*)b, 1, memory_order_relaxed);"
    arrays = integers()
    assert run(add, arrays).code == 0
    assert arrays[1][0] == 64
    assert run(f"{add}\nif (t == 3) b[0] = 7;", integers()).kinds == {ATOMIC}


def test_a_buffer_that_may_not_be_written_is_kept(run: Run) -> None:
    arrays = floats()
    (found,) = run("a[i] = 1; b[i] = 2;", arrays, flags={0: 2}).findings
    assert (found.kind, found.buffer, found.access) == (READ_ONLY, 0, WRITE)
    assert np.array_equal(arrays[0], np.arange(64))


def test_an_output_is_uninitialised_until_written(run: Run) -> None:
    assert run("b[i] += a[i];", floats(), flags={1: 1}).kinds == {UNINITIALISED}
    assert run("b[i] = a[i]; b[i] += 1;", floats(), flags={1: 1}).code == 0


def test_threadgroup_memory_has_a_limit(run: Run) -> None:
    body = "threadgroup float s[{}];\ns[t] = a[i];\nb[i] = s[t];"
    assert run(body.format(8192), floats()).code == 0
    (found,) = run(body.format(8193), floats()).findings
    assert (found.kind, found.value) == (TOO_LARGE, 32772)


def test_a_threadgroup_has_at_most_1024_threads(run: Run) -> None:
    arrays = [np.zeros(1056, np.float32)]
    assert run("a[i] = 1;", arrays, threads=1024, threadgroup=1024).code == 0
    assert run("a[i] = 1;", arrays, threads=1056, threadgroup=1056).kinds == {TOO_MANY_THREADS}


def test_each_place_is_reported_once_with_its_count(run: Run) -> None:
    """The compiler may unroll the loop; each copy of the access is a place of its own."""
    findings = run("for (int k = 0; k < 5; k++)\nb[i] = a[i + 64];", floats()).findings
    assert sum(f.count for f in findings) == 320
    assert {f.line for f in findings} == {2}
    assert len(findings) <= 5
