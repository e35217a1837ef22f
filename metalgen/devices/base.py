"""The interface of a device: something that executes kernels."""

from __future__ import annotations

import abc
from collections.abc import Callable

import mlx.core as mx

from metalgen.devices.backward import GradientRunner
from metalgen.errors import DeviceError, InvalidSchedule
from metalgen.families import APPLE, Limits, Schedule
from metalgen.features.base import Summed
from metalgen.problem.config import AttentionConfig

Runner = Callable[..., "tuple[mx.array, mx.array | None]"]
"""``run(q, k, v, scale) -> (out, lse or None)``; shapes as in `metalgen.attention`, unchecked.

A `metalgen.problem.inputs.Inputs` follows the scale where the config asks for more arrays.
"""


class Device(abc.ABC):
    """Executes the kernels of one language.

    Attributes:
        name: how users name it.
        language: name of the language of the sources that it runs, or None where it runs none.
        has_clock: whether its times are worth storing as measured.
        is_gpu: whether it is this machine's GPU, so that MLX's own kernels compete on it.
        compile_jobs: processes that compile for it in a tuning run; more would wait for the device.
    """

    name: str
    language: str | None = None
    has_clock: bool = False
    is_gpu: bool = False
    compile_jobs: int = 4

    @property
    def limits(self) -> Limits:
        """What a threadgroup may use."""
        return APPLE

    @abc.abstractmethod
    def unavailable(self) -> str | None:
        """Why this device cannot be used here; None when it can."""

    @abc.abstractmethod
    def build(self, config: AttentionConfig, schedule: Schedule) -> Runner:
        """A runner of one kernel; lazy where the device is lazy.

        Raises:
            InvalidSchedule: the schedule cannot run the config within this device's limits.
        """

    def build_gradients(
        self, config: AttentionConfig, schedules: tuple[Schedule, ...]
    ) -> GradientRunner:
        """A runner of backward kernels (`metalgen.devices.backward.build_gradients`).

        Raises:
            InvalidSchedule: as `build`, and on a device that runs no kernels.
        """
        raise InvalidSchedule("device", f"{self.name} runs no backward kernels")

    def build_sum(
        self, config: AttentionConfig, schedule: Schedule, summed: Summed
    ) -> GradientRunner:
        """A runner of a kernel that sums the gradient of one input (`metalgen.devices.sums`).

        Raises:
            InvalidSchedule: as `build_gradients`.
        """
        raise InvalidSchedule("device", f"{self.name} runs no backward kernels")

    def require(self) -> Device:
        """This device; raises `DeviceError` with the reason where it cannot be used."""
        reason = self.unavailable()
        if reason:
            raise DeviceError(f"device {self.name!r} is not available: {reason}")
        return self
