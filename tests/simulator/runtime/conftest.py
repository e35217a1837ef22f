"""Calls mg_run of a compiled kernel directly, in this process, and reads its report's bytes."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest

from metalgen.simulator.compiler import CompiledKernel, compile_metal

_FINDING = "IIIIqQQQQ3I3IQ3I3IIIqQ"
_COUNTERS = (
    "threadgroups threads threadgroup_bytes multiply_accumulates exponentials threadgroup_barriers "
    "simdgroup_barriers shuffles reductions ballots thread_barriers bank_accesses bank_conflicts"
).split()
_BUFFER = (
    "bytes_read bytes_written distinct_read distinct_written reads writes atomics "
    "simdgroup_accesses lines"
).split()


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("lead", ctypes.c_uint64),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("first_group", ctypes.c_uint64),
        ("end_group", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("buffer_count", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(_Buffer)),
        ("fibre_stack_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("report", ctypes.c_void_p),
        ("report_bytes", ctypes.c_uint64),
        ("progress", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class RawFinding:
    """A finding as the report has it, with lines in the place of addresses."""

    kind: int
    access: int
    space: int
    buffer: int
    offset: int
    bytes: int
    limit: int
    line: int
    thread: tuple[int, ...]
    threadgroup: tuple[int, ...]
    other_line: int
    other_thread: tuple[int, ...]
    other_threadgroup: tuple[int, ...]
    other_access: int
    value: int
    count: int


@dataclass(frozen=True)
class Result:
    code: int
    findings: list[RawFinding]
    counters: dict[str, int]
    buffers: list[dict[str, int]]  # by Metal index; the last is threadgroup memory

    @property
    def kinds(self) -> set[int]:
        return {f.kind for f in self.findings}


def launch(
    kernel: CompiledKernel,
    arrays: Sequence[np.ndarray[Any, Any] | None],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    seed: int = 0,
    flags: Mapping[int, int] | None = None,
) -> Result:
    """Runs all threadgroups; arrays are written in place. flags: other than 3 (writable, initialised)."""
    library = ctypes.CDLL(str(kernel.path))
    buffers = (_Buffer * len(arrays))()
    for i, array in enumerate(arrays):
        if array is not None:
            buffers[i] = _Buffer(array.ctypes.data, array.nbytes, (flags or {}).get(i, 3), 0, 0)
    report = ctypes.create_string_buffer(1 << 19)
    asked = _Launch(
        step=1,
        buffer_count=len(arrays),
        buffers=buffers,
        seed=seed,
        report=ctypes.addressof(report),
        report_bytes=len(report),
    )
    asked.grid[:], asked.threadgroup[:] = grid, threadgroup
    asked.end_group = int(np.prod([-(-g // t) for g, t in zip(grid, threadgroup, strict=True)]))
    code = library.mg_run(ctypes.byref(asked))
    raw = report.raw
    head = struct.unpack_from("<8sIIQQIIQQQI3I3II", raw)
    assert head[0] == b"MGREPORT"
    counters = dict(zip(_COUNTERS, struct.unpack_from(f"<{len(_COUNTERS)}Q", raw, 96), strict=True))
    traffic = [
        dict(
            zip(
                _BUFFER, struct.unpack_from(f"<{len(_BUFFER)}Q", raw, head[3] + 72 * i), strict=True
            )
        )
        for i in range(33)
    ]

    def line(address: int) -> int:
        found = kernel.line_of(address) if address else None
        return found[1] if found else 0

    findings = []
    for i in range(head[5]):
        v = struct.unpack_from("<" + _FINDING, raw, head[4] + struct.calcsize("<" + _FINDING) * i)
        places = (line(v[8]), v[9:12], v[12:15], line(v[15]), v[16:19], v[19:22])
        fields = [*v[:7], *places, v[22], v[24], v[25]]
        findings.append(RawFinding(*fields))
    return Result(code, findings, counters, traffic)


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def launch_kernel() -> Callable[..., Result]:
    """The function `launch`."""
    return launch


@pytest.fixture(scope="session")
def run() -> Run:
    """run(body, arrays, ...) executes a kernel whose body's first line is line 1.

    Buffers are named a, b, c ...; i, t, lane and group are the usual indices.
    """

    def execute(
        body: str,
        arrays: Sequence[np.ndarray[Any, Any]],
        mode: Literal["plain", "checked"] = "checked",
        threads: int = 64,
        threadgroup: int = 64,
        seed: int = 0,
        flags: Mapping[int, int] | None = None,
        before: str = "",
    ) -> Result:
        types = {
            "float32": "float",
            "int32": "int",
            "uint32": "uint",
            "float16": "half",
            "uint8": "uchar",
        }
        parameters = ", ".join(
            f"device {types[str(x.dtype)]}* {'abcdef'[i]} [[buffer({i})]]"
            for i, x in enumerate(arrays)
        )
        source = (
            "#include <metal_stdlib>\n#include <metal_simdgroup_matrix>\nusing namespace metal;\n"
            f"{before}\n[[kernel]] void k({parameters}, uint i [[thread_position_in_grid]], "
            "uint t [[thread_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]], "
            f"uint group [[threadgroup_position_in_grid]]) {{\n#line 1\n{body}\n}}\n"
        )
        kernel = compile_metal(source, "k", mode=mode)
        return launch(kernel, arrays, (threads, 1, 1), (threadgroup, 1, 1), seed, flags)

    return execute
