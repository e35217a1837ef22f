"""One launch of a compiled kernel: buffers in, outputs, findings and counters out."""

from __future__ import annotations

import contextlib
import contextvars
import operator
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from metalgen.arguments import check_integer
from metalgen.plurals import counted
from metalgen.simulator import errors, executor, report
from metalgen.simulator.counters import Counters
from metalgen.simulator.executor import Job, ProcessFailed
from metalgen.simulator.findings import Finding, Findings
from metalgen.simulator.launch_limits import current_limits
from metalgen.simulator.memory import LaunchMemory, Segment

if TYPE_CHECKING:
    from metalgen.simulator.compiler import CompiledKernel

MAX_THREADS = 1024
MAX_BUFFERS = 31
THREADGROUP_MEMORY = 32768
THREADGROUP_ARGUMENTS = 31
MOST_DYNAMIC = 1 << 18
"""Bytes of one threadgroup argument: more than Metal has, so that a checked run can say so."""
SOURCE_NAME = "program.metal"
"""What a source is called in diagnostics and findings."""
POISON = 0xFF
"""Byte that fills outputs before a launch: NaN in every floating-point type, -1 in integers."""


@dataclass(frozen=True)
class Launch:
    """What is known of one finished launch.

    ``findings`` and ``counters`` are None for a plain run; ``seconds`` is the time inside the
    kernel on this CPU (it says nothing of a GPU); ``source`` is the text that line numbers in
    findings refer to.
    """

    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    seconds: float
    processes: int
    source: str = field(repr=False)
    findings: Findings | None = None
    counters: Counters | None = None


@dataclass
class Recorder:
    """What ``record`` hands out: a sequence of ``Launch`` in the order of their execution."""

    checked: bool = False
    seed: int = 0
    raise_on_findings: bool = False
    launches: list[Launch] = field(default_factory=list)

    def __getitem__(self, index: int) -> Launch:
        return self.launches[index]

    def __len__(self) -> int:
        return len(self.launches)

    def __iter__(self) -> Iterator[Launch]:
        return iter(self.launches)


_recorders: contextvars.ContextVar[tuple[Recorder, ...]] = contextvars.ContextVar(
    "metalgen_recorders", default=()
)


@contextlib.contextmanager
def record(
    *, checked: bool = False, seed: int = 0, raise_on_findings: bool = False
) -> Iterator[Recorder]:
    """Collect a ``Launch`` for every kernel that this thread runs inside the block.

    ``checked`` runs them under the checker (slower, about 3 times), which fills ``findings`` and
    ``counters``. ``seed`` other than 0 shuffles the order in which threads run. With
    ``raise_on_findings`` a launch with findings raises ``CheckFailed`` instead of returning.
    ``raise_on_findings`` a launch with findings raises ``CheckFailed`` instead of returning, and so
    does a block in which nothing was launched: a test of a kernel that did not run has shown
    nothing. Blocks nest: the innermost decides how kernels run, and each collects. Raises
    ``ArgumentError`` for a ``seed`` that is no integer of 64 bits from 0 on.
    """
    seed = check_integer("seed", seed, 0, (1 << 64) - 1)
    recorder = Recorder(checked, seed, raise_on_findings)
    token = _recorders.set((*_recorders.get(), recorder))
    try:
        yield recorder
    finally:
        _recorders.reset(token)
    if checked and raise_on_findings and not recorder.launches:
        raise errors.CheckFailed(
            "record(raise_on_findings=True): no kernel was launched in the block, so nothing was "
            "checked; simulator.install() must come before code that makes its kernels",
            (),
        )


def current_recorder() -> Recorder:
    """Return the innermost recorder, or one with the defaults that nobody reads."""
    stack = _recorders.get()
    return stack[-1] if stack else Recorder()


def integers(extents: Any) -> Any:
    """Extents as a tuple of Python's integers, of NumPy's too; what holds others stays as it is.

    Children are sent bytes, in which NumPy's would be something else.
    """
    try:
        return tuple(operator.index(extent) for extent in extents)
    except TypeError:
        return extents


def check_launch(
    grid: tuple[int, int, int], threadgroup: tuple[int, int, int], buffers: int
) -> tuple[int, int, int]:
    """Return the threadgroup clamped to the grid, as MLX does.

    Raises ``LaunchError`` for an extent below 1, more than 1024 threads a threadgroup (counted
    before clamping, as MLX counts them), or more than 31 buffers.
    """
    for name, extents in (("grid", grid), ("threadgroup", threadgroup)):
        whole = isinstance(extents, tuple) and all(type(extent) is int for extent in extents)
        if not whole or len(extents) != 3 or min(extents) < 1:
            raise errors.LaunchError(f"{name}: expected three extents of at least 1, got {extents}")
    threads = threadgroup[0] * threadgroup[1] * threadgroup[2]
    if threads > MAX_THREADS:
        raise errors.LaunchError(
            f"Thread group size ({threads}) is greater than  the maximum allowed threads per "
            f"threadgroup ({MAX_THREADS})."
        )
    if buffers > MAX_BUFFERS:
        raise errors.LaunchError(
            f"the kernel binds {buffers} buffers, and Metal has {MAX_BUFFERS} (shape, strides and "
            "ndim of an input count as one each)"
        )
    x, y, z = (min(size, extent) for size, extent in zip(threadgroup, grid, strict=True))
    return x, y, z


def threadgroup_arguments(compiled: CompiledKernel, given: Mapping[int, int]) -> tuple[int, ...]:
    """Return the bytes of each threadgroup argument by index, as the host gives them.

    Raises ``LaunchError`` for an argument of the kernel that is not given, one that it does not
    have, and a size that Metal refuses.
    """
    taken = dict(compiled.threadgroup_arguments)
    for index, name in taken.items():
        if index not in given:
            raise errors.LaunchError(
                f"threadgroup_memory: kernel {compiled.kernel} has {name!r} at "
                f"[[threadgroup({index})]], whose size the host sets; give "
                f"threadgroup_memory={{{index}: bytes}}"
            )
    for index, size in given.items():
        if index not in taken:
            has = ", ".join(str(each) for each in taken) or "none"
            raise errors.LaunchError(
                f"threadgroup_memory: kernel {compiled.kernel} has no [[threadgroup({index})]]; "
                f"it has {has}"
            )
        if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= MOST_DYNAMIC:
            raise errors.LaunchError(
                f"threadgroup_memory[{index}]: expected bytes from 0 to {MOST_DYNAMIC:,}, "
                f"got {size!r}"
            )
        if size % 16:
            raise errors.LaunchError(
                f"threadgroup_memory[{index}]: expected a multiple of 16 bytes, which Metal asks "
                f"for, got {size}"
            )
    if sum(given.values()) > MOST_DYNAMIC:
        raise errors.LaunchError(
            f"threadgroup_memory: expected at most {MOST_DYNAMIC:,} bytes together, "
            f"got {sum(given.values()):,}"
        )
    return tuple(given.get(index, 0) for index in range(THREADGROUP_ARGUMENTS))


def run(
    compiled: CompiledKernel,
    segments: Sequence[Segment],
    write: Callable[[LaunchMemory], None],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    source: str,
    lints: tuple[Finding, ...] = (),
    threadgroup_memory: Mapping[int, int] | None = None,
) -> LaunchMemory:
    """Execute ``compiled`` over ``grid`` threads and return the memory, outputs written.

    ``write`` fills the buffers before the launch. The caller closes the memory. ``lints`` are
    what the source's text gave away; a checked launch has them among its findings. The launch is
    added to the recorders of this thread. Raises ``ExecutionError`` and its kin, ``MemoryLimit``,
    ``CompileError`` for more threadgroup memory than Metal has (a finding when checked), and
    ``CheckFailed`` when the innermost recorder asks for it.
    """
    recorder = current_recorder()
    checked = compiled.mode == "checked"
    arguments = threadgroup_arguments(compiled, threadgroup_memory or {})
    total = compiled.threadgroup_bytes + sum(arguments)
    if total > THREADGROUP_MEMORY and not checked:
        raise errors.CompileError(
            f"kernel {compiled.kernel}: {total:,} bytes of threadgroup "
            f"memory, and a threadgroup has {THREADGROUP_MEMORY:,}"
        )
    job = Job(
        str(compiled.path), compiled.kernel, grid, threadgroup, checked, recorder.seed, arguments
    )
    processes = executor.processes_for(job)
    memory = LaunchMemory(segments, report.size(checked), processes)
    try:
        write(memory)
        try:
            outcomes = executor.execute(job, memory, processes)
        except ProcessFailed as failed:
            raise explain(compiled, job, memory, failed.failure) from None
        for outcome in outcomes:
            fatal = report.fatal_error(outcome.report, outcome.code, compiled, memory.segments)
            if fatal is not None:
                raise fatal
        findings = counters = None
        if checked:
            reports = [outcome.report for outcome in outcomes]
            counters = report.counters(reports, compiled, segments)
            unwritten = report.never_written(counters, compiled, segments)
            findings = report.findings(
                reports, compiled, segments, {SOURCE_NAME: source}, lints, unwritten
            )
        seconds = max(outcome.seconds for outcome in outcomes)
        launch = Launch(
            compiled.kernel,
            grid,
            threadgroup,
            seconds,
            len(outcomes),
            source,
            findings,
            counters,
        )
        for each in _recorders.get():
            each.launches.append(launch)
        if findings and recorder.raise_on_findings:
            count = counted(len(findings), "finding")
            raise errors.CheckFailed(
                f"kernel {compiled.kernel}: {count}\n{findings.report()}", tuple(findings)
            )
    except BaseException:
        memory.close()
        raise
    return memory


def explain(
    compiled: CompiledKernel, job: Job, memory: LaunchMemory, failure: executor.Failure
) -> errors.SimulatorError:
    """Turn the end of a child process into the exception that names its cause and place."""
    fatal = report.fatal_error(failure.report, None, compiled, memory.segments)
    if fatal is not None and not failure.timeout:
        return fatal
    if failure.timeout:
        seconds = current_limits().seconds
        place = report.place(failure.report, compiled)
        at = f", {place['file']}:{place['line']}" if place["line"] else ""
        return errors.KernelTimeout(
            f"kernel {job.kernel}{at}: not finished after {seconds:g} s "
            f"({failure.finished_groups} of {job.groups} threadgroups done); "
            "simulator.limits(seconds=...) changes the limit",
            **place,
        )
    if failure.signal == signal.SIGKILL:
        return errors.WorkerLost(
            f"kernel {job.kernel}: something killed the child process (the system, when it runs "
            "out of memory)",
            kernel=job.kernel,
        )
    name = signal.Signals(failure.signal).name if failure.signal else "an early exit"
    return errors.KernelCrash(
        f"kernel {job.kernel}: the kernel ended its process with {name}", kernel=job.kernel
    )
