"""What can go wrong when Metal source is compiled or executed here: one exception a cause.

Each class also derives from the built-in exception that MLX raises for the same cause on a Mac
(``RuntimeError`` when a library does not build, ``ValueError`` for a bad launch), so code written
for ``mx.fast.metal_kernel`` catches what it always caught.
"""

from __future__ import annotations

from metalgen.errors import MetalgenError


class SimulatorError(MetalgenError):
    """Base of every error of the simulator."""


class MissingToolchain(SimulatorError, RuntimeError):
    """The compiler (the PyPI package ``ziglang``) is not installed, or does not run here."""


class CacheError(SimulatorError, OSError):
    """The folder of compiled kernels cannot be made or written."""


class CompileError(SimulatorError, RuntimeError):
    """The Metal source does not compile. ``line`` counts in the user's own text, from 1."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None) -> None:
        super().__init__(message)
        self.file = file
        self.line = line


class LaunchError(SimulatorError, ValueError):
    """A launch that a GPU would refuse: its grid, threadgroup, template, inputs or outputs."""


class ExecutionError(SimulatorError, RuntimeError):
    """A kernel that started and could not finish.

    ``file`` and ``line`` say where, when that is known; ``thread`` and ``threadgroup`` are
    positions in the threadgroup and in the grid of threadgroups.
    """

    def __init__(
        self,
        message: str,
        *,
        kernel: str = "",
        file: str | None = None,
        line: int | None = None,
        thread: tuple[int, int, int] | None = None,
        threadgroup: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.kernel = kernel
        self.file = file
        self.line = line
        self.thread = thread
        self.threadgroup = threadgroup


class KernelTimeout(ExecutionError):
    """The kernel ran longer than the time limit and was ended."""


class KernelCrash(ExecutionError):
    """The kernel touched memory that it does not own, or executed an illegal instruction."""


class StackOverflow(KernelCrash):
    """A thread of the kernel used more stack than its fibre has."""


class Deadlock(ExecutionError):
    """Threads wait at a barrier or collective that their peers never reach."""


class MemoryLimit(SimulatorError, MemoryError):
    """The launch needs more memory than the simulator may take."""


class WorkerLost(ExecutionError):
    """The process that executes kernels ended for a reason that is not the kernel's."""


class CheckFailed(SimulatorError, RuntimeError):
    """A checked run found defects, and the caller asked for an exception (``findings``)."""

    def __init__(self, message: str, findings: tuple[object, ...] = ()) -> None:
        super().__init__(message)
        self.findings = findings
