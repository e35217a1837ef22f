"""Checking candidates against the float64 reference, once each, with the outcome on record."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

from metalgen.config import AttentionConfig
from metalgen.database.protocol import Check, TuningStore
from metalgen.devices import Device
from metalgen.errors import DeviceError, InvalidSchedule, MetalgenError
from metalgen.schedule import Schedule
from metalgen.tuning.workers.executing import KernelFailure, NoRoom
from metalgen.verify import Verification, of_compiler

Verify = Callable[..., Verification]
"""``verify(device, config, schedule, *, family)``, as `metalgen.verify.verify`."""


class CannotCheck(MetalgenError):
    """The device could not check anything, whatever the kernel: it is missing, or out of memory."""


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
    return "compile" if of_compiler(error) else "runtime"


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
    """Whether the device had no room, as MLX words it on Metal and CUDA."""
    text = str(error).lower()
    found = ("out of memory", "insufficient memory", "unable to allocate")
    return isinstance(error, MemoryError) or any(words in text for words in found)


class Checker:
    """Checks kernels on one device and records the outcome; asks the store first.

    Args:
        store: where checks are kept.
        device: what executes the kernels, or None: nothing can be checked here.
        template_hash: of the current templates.
        verify: `metalgen.verify.verify`; another one for tests.
    """

    def __init__(
        self,
        store: TuningStore,
        device: Device | None,
        template_hash: str,
        verify: Verify | None = None,
    ) -> None:
        self.store = store
        self.device = device
        self.template_hash = template_hash
        self._verify = verify
        self.target = (device.target if device else None) or "metal"
        self.checked = 0

    def source_hash(
        self, config: AttentionConfig, schedule: Schedule, family: str = "forward"
    ) -> str:
        """What a kernel is, on the device or the target of a chip model; empty if it is none."""
        from metalgen.source_hash import source_hash

        try:
            return source_hash(config, schedule, self.target, family)
        except MetalgenError:
            return ""

    def known(
        self, config: AttentionConfig, schedule: Schedule, family: str = "forward"
    ) -> Check | None:
        """The check on record: a failed one on any device, else one on this device, or None."""
        kernel = (config, schedule, self.template_hash)
        found = self.store.find_check(*kernel, family=family)
        if found is None or not found.ok or self.device is None or not self.device.is_gpu:
            return found
        return self.store.find_check(*kernel, self.device.name, family=family)

    def error(
        self, config: AttentionConfig, schedule: Schedule, family: str = "forward"
    ) -> float | None:
        """The relative error that is on record of a kernel."""
        found = self.known(config, schedule, family)
        return found.error if found else None

    def check(self, config: AttentionConfig, schedule: Schedule, family: str = "forward") -> Check:
        """The check of a kernel: the one on record, or a new one, which is recorded.

        Raises:
            CannotCheck: there is none on record and the device cannot make one.
        """
        found = self.known(config, schedule, family)
        if found is not None:
            return found
        if self.device is None:
            raise CannotCheck("no device here executes kernels")
        error = tolerance = None
        shape = detail = ""
        try:
            result = self._run(config, schedule, family)
        except (MetalgenError, RuntimeError, ValueError, MemoryError) as problem:
            status, detail = failure_status(problem), first_line(problem)
            if no_memory(problem):  # a check is small: something else took it all
                raise CannotCheck(f"no memory to check a kernel: {detail}") from problem
        else:
            status = "ok" if result.ok else "wrong"
            error, tolerance = result.error, result.tolerance
            shape, detail = result.shape, result.detail
        self.checked += 1
        self.store.record_check(
            config,
            schedule,
            self.template_hash,
            self.device.name,
            status,
            error=error,
            tolerance=tolerance,
            shape=shape,
            detail=detail,
            family=family,
            source_hash=self.source_hash(config, schedule, family),
        )
        found = self.store.find_check(
            config, schedule, self.template_hash, self.device.name, family=family
        )
        assert found is not None
        return found

    @functools.cached_property
    def _function(self) -> Verify:
        if self._verify is not None:
            return self._verify
        from metalgen.verify import verify

        return verify

    def _run(self, config: AttentionConfig, schedule: Schedule, family: str) -> Verification:
        assert self.device is not None
        return self._function(self.device, config, schedule, family=family)
