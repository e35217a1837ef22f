"""Checking a kernel: run it against the float64 reference, classify the outcome, record it.

Tuning and dispatch both do it here, so a status means the same whichever of them recorded it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import mlx.core as mx

from metalgen.calls import verify as verification
from metalgen.calls import verify_gradients as backward
from metalgen.calls.verify import Verification, of_compiler
from metalgen.database.protocol import Check, TuningStore
from metalgen.devices import Device
from metalgen.errors import DeviceError, InvalidSchedule, MetalgenError
from metalgen.families import AttentionFamily, Schedule, get_family
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import template_hash

Verify = Callable[..., Verification]
"""``verify(device, config, schedule)``, as `metalgen.calls.verify.verify`."""


def verify_kernel(device: Device, config: AttentionConfig, schedule: Schedule) -> Verification:
    """The check of a kernel of any family against the float64 reference."""
    if isinstance(get_family(schedule.family), AttentionFamily):
        return verification.verify(device, config, schedule)
    return backward.verify_gradients(device, config, schedule)


NO_ROOM = ("out of memory", "insufficient memory", "unable to allocate")
"""How MLX says on Metal and CUDA that the device has no memory left."""
NO_COMPILER = ("failed to open", "cannot open source file", "cannot open shared object")
"""How a run-time compiler says that a part of it is not installed."""


class CannotCheck(MetalgenError):
    """The device could not check anything, whatever the kernel: it is missing, or out of memory."""


class KernelFailure(MetalgenError):
    """A kernel that failed in a helper process, or took the process with it.

    ``status`` is that of the row that it becomes: ``"invalid"``, ``"compile"``, ``"runtime"`` or
    ``"timeout"``.
    """

    def __init__(self, status: str, detail: str) -> None:
        self.status = status
        super().__init__(detail)


class NoRoom(DeviceError):
    """A problem whose arrays the device has no room for, whatever the kernel."""


def failure_status(error: Exception) -> str:
    """The status of a kernel that raised this when it was built or run.

    Raises:
        CannotCheck: the failure says nothing about the kernel.
        NoRoom: nor that, but about the problem.
    """
    from metalgen.simulator import errors as simulator

    if isinstance(error, NoRoom):
        raise error
    if isinstance(error, KernelFailure):
        return error.status
    if isinstance(error, DeviceError | simulator.MissingToolchain | simulator.MemoryLimit):
        raise CannotCheck(str(error)) from error
    if isinstance(error, simulator.WorkerLost | MemoryError):
        raise CannotCheck(str(error)) from error
    if isinstance(error, InvalidSchedule):
        return "invalid"
    if isinstance(error, simulator.CompileError):
        return "compile"
    if isinstance(error, simulator.KernelTimeout):
        return "timeout"
    if isinstance(error, simulator.SimulatorError):
        return "runtime"
    if not of_compiler(error):
        return "runtime"
    if any(words in str(error).lower() for words in NO_COMPILER):
        raise CannotCheck(f"the compiler is incomplete: {first_line(error)}") from error
    return "compile"


def first_line(error: Exception) -> str:
    """What an error says, in one line of at most 300 characters: its first, and its first error.

    What compilers say begins with other things, and often with warnings.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = lines or [type(error).__name__]
    telling = (line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE))
    words = "; ".join(dict.fromkeys([lines[0], next(telling, lines[0])]))
    return "".join(c if c.isprintable() else " " for c in words)[:300]


def no_memory(error: Exception) -> bool:
    """Whether the device had no memory left, as MLX words it on Metal and CUDA."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in NO_ROOM)


def require_working(device: Device, when: str = "") -> None:
    """Raise `DeviceError` unless the device computes anything at all."""
    try:
        mx.eval(mx.random.normal((64,)).astype(mx.float16))
    except RuntimeError as error:
        raise DeviceError(f"the device {device.name!r} does not work{when}: {error}") from error


def run_check(
    device: Device,
    config: AttentionConfig,
    schedule: Schedule,
    verify: Verify | None = None,
) -> Check:
    """Run a kernel against the reference, and classify what comes of it.

    Args:
        device: what executes it.
        config, schedule: the kernel.
        verify: the check; None: that of the family.

    Raises:
        CannotCheck: the device failed, not the kernel.
        NoRoom: the device is too small for the problem.
    """
    outcome = functools.partial(
        Check, config, schedule, template_hash(schedule), device.name, family=schedule.family
    )
    try:
        result = (verify or verify_kernel)(device, config, schedule)
    except (MetalgenError, RuntimeError, ValueError, MemoryError) as error:
        status, detail = failure_status(error), first_line(error)
        if no_memory(error):  # a check is small: something else took it all
            raise CannotCheck(f"no memory to check a kernel: {detail}") from error
        if device.is_gpu and not isinstance(error, MetalgenError):  # MLX's, and in this process
            try:
                require_working(device, f" any more, after a kernel failed ({detail})")
            except DeviceError as broken:  # which may be an earlier kernel's doing
                raise CannotCheck(str(broken)) from error
        return outcome(status, detail=detail)
    return outcome(
        "ok" if result.ok else "wrong",
        error=result.error,
        tolerance=result.tolerance,
        shape=result.shape,
        detail=result.detail,
    )


def record_check(store: TuningStore, check: Check) -> None:
    """Commit a check of a kernel."""
    store.record_check(
        check.config,
        check.schedule,
        check.template_hash,
        check.device,
        check.status,
        error=check.error,
        tolerance=check.tolerance,
        shape=check.shape,
        detail=check.detail,
        family=check.family,
        source_hash=source_hash_of(check.config, check.schedule),
    )


def source_hash_of(config: AttentionConfig, schedule: Schedule) -> str:
    """The source hash of a kernel; empty where the schedule gives none."""
    from metalgen.source.digests import source_hash

    try:
        return source_hash(config, schedule)
    except MetalgenError:
        return ""
