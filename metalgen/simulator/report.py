"""Reads the binary report that the runtime leaves behind (``runtime/report.h`` has its layout)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import c_char, c_int64, c_uint32, c_uint64
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from metalgen.simulator import errors
from metalgen.simulator.counters import BufferTraffic, Counters
from metalgen.simulator.findings import Access, Finding, Findings
from metalgen.simulator.wording import ACCESSES, THREADGROUP, describe

if TYPE_CHECKING:
    from metalgen.simulator.compiler import CompiledKernel
    from metalgen.simulator.memory import Segment

VERSION = 1


class RawFinding(ctypes.Structure):
    _fields_ = [
        ("kind", c_uint32),
        ("access", c_uint32),
        ("space", c_uint32),
        ("buffer", c_uint32),
        ("offset", c_int64),
        ("bytes", c_uint64),
        ("limit", c_uint64),
        ("memory", c_uint64),
        ("address", c_uint64),
        ("thread", c_uint32 * 3),
        ("threadgroup", c_uint32 * 3),
        ("other_address", c_uint64),
        ("other_thread", c_uint32 * 3),
        ("other_threadgroup", c_uint32 * 3),
        ("other_access", c_uint32),
        ("pad", c_uint32),
        ("value", c_int64),
        ("count", c_uint64),
    ]


_TRAFFIC = (
    "bytes_read",
    "bytes_written",
    "distinct_read",
    "distinct_written",
    "reads",
    "writes",
    "atomics",
    "simdgroup_accesses",
    "lines",
)


class _BufferCounters(ctypes.Structure):
    _fields_ = [(name, c_uint64) for name in _TRAFFIC]


class _Report(ctypes.Structure):
    _fields_ = [
        ("magic", c_char * 8),
        ("version", c_uint32),
        ("status", c_uint32),
        ("buffer_counters", c_uint64),
        ("findings", c_uint64),
        ("finding_count", c_uint32),
        ("finding_capacity", c_uint32),
        ("findings_dropped", c_uint64),
        ("fatal_address", c_uint64),
        ("fatal_memory", c_uint64),
        ("fatal_signal", c_uint32),
        ("fatal_thread", c_uint32 * 3),
        ("fatal_threadgroup", c_uint32 * 3),
        ("checked", c_uint32),
        ("threadgroups", c_uint64),
        ("threads", c_uint64),
        ("threadgroup_bytes", c_uint64),
        ("multiply_accumulates", c_uint64),
        ("exponentials", c_uint64),
        ("threadgroup_barriers", c_uint64),
        ("simdgroup_barriers", c_uint64),
        ("shuffles", c_uint64),
        ("reductions", c_uint64),
        ("ballots", c_uint64),
        ("thread_barriers", c_uint64),
        ("bank_accesses", c_uint64),
        ("bank_conflicts", c_uint64),
        ("patterns_dropped", c_uint64),
    ]


NEVER_WRITTEN = "output never written"
MAX_BUFFERS = 32
THREADGROUP_ENTRY = 32

RUNNING, DONE, STACK_OVERFLOW, CRASH, OUT_OF_MEMORY, BAD_LAUNCH = 1, 2, 3, 4, 5, 6


def size(checked: bool) -> int:
    """Return how many bytes of report a run is given."""
    return (1 << 20) if checked else (1 << 16)


def _header(data: bytes) -> _Report | None:
    header = _Report.from_buffer_copy(data)
    if header.magic != b"MGREPORT" or header.version != VERSION:
        return None
    return header


def _position(values: Any) -> tuple[int, int, int]:
    return values[0], values[1], values[2]


def _line(compiled: CompiledKernel, address: int) -> tuple[str | None, int | None]:
    found = compiled.line_of(address) if address else None
    return (str(found[0]), found[1]) if found else (None, None)


def fatal_error(
    data: bytes, code: int | None, compiled: CompiledKernel, segments: Sequence[Segment]
) -> errors.SimulatorError | None:
    """Return the exception for a run that did not finish, or None when it did.

    ``code`` is what ``mg_run`` returned, None when its process died.
    """
    header = _header(data)
    if header is None or header.status == DONE:
        if code in (None, 0, 1):
            return None
        return errors.ExecutionError(f"kernel {compiled.kernel}: the runtime returned {code}")
    place = _fatal_place(header, compiled)
    where = f"kernel {compiled.kernel}"
    if place["line"]:
        where += f", {place['file']}:{place['line']}"
    who = f"thread {place['thread']} of threadgroup {place['threadgroup']}"
    if header.status == STACK_OVERFLOW:
        return errors.StackOverflow(
            f"{where}: {who} used more stack than its {_stack_kib()} KiB (endless recursion, or "
            "large arrays; simulator.limits(stack_bytes=...) changes the size)",
            **place,
        )
    if header.status == CRASH:
        return errors.KernelCrash(
            f"{where}: {who} {_crash_cause(header.fatal_signal, header.fatal_memory)}; "
            "a checked run (simulator.record(checked=True)) names the buffer",
            **place,
        )
    if header.status == OUT_OF_MEMORY:
        return errors.MemoryLimit(
            f"kernel {compiled.kernel}: no memory for the stacks of its threads or for the "
            "checker's shadow; simulator.limits(memory_bytes=...) raises the limit"
        )
    if header.status == BAD_LAUNCH:
        return errors.LaunchError(f"kernel {compiled.kernel}: the runtime refused the launch")
    return None


def place(data: bytes, compiled: CompiledKernel) -> dict[str, Any]:
    """Return kernel, line, thread and threadgroup where a run was stopped, as far as known."""
    header = _header(data)
    if header is None or not header.fatal_address:
        return {"kernel": compiled.kernel, "file": None, "line": None}
    return _fatal_place(header, compiled)


def _fatal_place(header: _Report, compiled: CompiledKernel) -> dict[str, Any]:
    # A finding's address is a return address; this one is the instruction itself.
    file, line = _line(compiled, header.fatal_address + 1)
    return {
        "kernel": compiled.kernel,
        "file": file,
        "line": line,
        "thread": _position(header.fatal_thread),
        "threadgroup": _position(header.fatal_threadgroup),
    }


def _stack_kib() -> int:
    from metalgen.simulator.launch_limits import current_limits

    return current_limits().stack_bytes // 1024


def _crash_cause(number: int, memory: int) -> str:
    import signal

    name = signal.Signals(number).name if number else "a fault"
    if name in ("SIGSEGV", "SIGBUS"):
        return f"touched memory that no buffer owns (address {memory:#x}, {name})"
    if name == "SIGFPE":
        return f"divided an integer by zero ({name})"
    return f"ended with {name}"


def findings(
    reports: Sequence[bytes],
    compiled: CompiledKernel,
    segments: Sequence[Segment],
    sources: Mapping[str, str],
    lints: Sequence[Finding] = (),
    others: Sequence[Finding] = (),
) -> Findings:
    """Return the findings of all processes; equal places are merged and their counts added.

    ``lints`` come first, as they are, and ``others`` last.
    """
    merged: dict[tuple[Any, ...], Finding] = {}
    dropped = 0
    for data in reports:
        header = _header(data)
        if header is None:
            continue
        dropped += header.findings_dropped
        kept = min(header.finding_count, header.finding_capacity)
        step = ctypes.sizeof(RawFinding)
        for index in range(kept):
            raw = RawFinding.from_buffer_copy(data, header.findings + index * step)
            finding = _translate(raw, compiled, segments)
            key = _place(finding, raw)
            before = merged.get(key)
            if before is not None:
                finding = replace(before, count=before.count + finding.count)
            merged[key] = finding
    return Findings((*lints, *merged.values(), *others), dict(sources), dropped)


def _place(finding: Finding, raw: RawFinding) -> tuple[Any, ...]:
    """Return what makes two findings one: a race is the same seen from either of its accesses."""
    ends = [
        (access.kind.split()[0], access.file, access.line or address)
        for access, address in ((finding.access, raw.address), (finding.other, raw.other_address))
        if access is not None
    ]
    return finding.kind, finding.memory, frozenset(ends)


def _memory_name(raw: RawFinding, compiled: CompiledKernel, segments: Sequence[Segment]) -> str:
    if raw.space == THREADGROUP:
        variable = compiled.threadgroup_name(raw.buffer)
        return f"threadgroup {variable}" if variable else "threadgroup memory"
    if raw.buffer < len(segments):
        name: str = segments[raw.buffer].name
        return name
    return "memory"


def _translate(raw: RawFinding, compiled: CompiledKernel, segments: Sequence[Segment]) -> Finding:
    file, line = _line(compiled, raw.address)
    access = other = None
    if raw.address:  # of a whole launch's finding there is none
        verb = ACCESSES.get(raw.access, "reached")  # a barrier or a function is no access
        access = Access(verb, file, line, _position(raw.thread), _position(raw.threadgroup))
    if raw.other_address:
        other_file, other_line = _line(compiled, raw.other_address)
        other = Access(
            ACCESSES.get(raw.other_access, "access"),
            other_file,
            other_line,
            _position(raw.other_thread),
            _position(raw.other_threadgroup),
        )
    memory = _memory_name(raw, compiled, segments) if raw.space else None
    kind, message = describe(raw, memory or "memory")
    return Finding(
        kind=kind,
        message=message,
        kernel=compiled.kernel,
        file=file,
        line=line,
        memory=memory,
        offset=raw.offset if raw.space else None,
        access=access,
        other=other,
        count=raw.count,
    )


def counters(
    reports: Sequence[bytes], compiled: CompiledKernel, segments: Sequence[Segment]
) -> Counters:
    """Return the counts of all processes added up."""
    headers = [(data, header) for data in reports if (header := _header(data)) is not None]

    def total(name: str) -> int:
        return sum(getattr(header, name) for _, header in headers)

    def entry(index: int) -> dict[str, int]:
        step = ctypes.sizeof(_BufferCounters)
        sums: dict[str, int] = {}
        for data, header in headers:
            raw = _BufferCounters.from_buffer_copy(data, header.buffer_counters + index * step)
            for name in _TRAFFIC:
                sums[name] = sums.get(name, 0) + getattr(raw, name)
        return sums

    if not headers:
        return Counters()
    return Counters(
        buffers=tuple(
            _traffic(segment.name, entry(index))
            for index, segment in enumerate(segments[:MAX_BUFFERS])
        ),
        threadgroup=_traffic("threadgroup memory", entry(THREADGROUP_ENTRY)),
        threadgroup_memory=max(header.threadgroup_bytes for _, header in headers),
        multiply_accumulates=total("multiply_accumulates"),
        exponentials=total("exponentials"),
        barriers=total("thread_barriers"),
        threadgroup_barriers=total("threadgroup_barriers"),
        simdgroup_barriers=total("simdgroup_barriers"),
        shuffles=total("shuffles"),
        reductions=total("reductions"),
        ballots=total("ballots"),
        threadgroup_accesses=total("bank_accesses"),
        bank_conflicts=total("bank_conflicts"),
        patterns_dropped=total("patterns_dropped"),
    )


def never_written(
    counted: Counters, compiled: CompiledKernel, segments: Sequence[Segment]
) -> tuple[Finding, ...]:
    """Return a finding for each output that the host left as it was, and the kernel too."""
    return tuple(
        Finding(
            NEVER_WRITTEN,
            f"nothing was written to {segment.name}, an output of {segment.size} bytes",
            compiled.kernel,
            memory=segment.name,
        )
        for segment, traffic in zip(segments, counted.buffers, strict=False)
        if segment.writable
        and not segment.initialised
        and segment.size
        and not traffic.distinct_written
    )


def _traffic(name: str, raw: Mapping[str, int]) -> BufferTraffic:
    return BufferTraffic(name, **raw)
