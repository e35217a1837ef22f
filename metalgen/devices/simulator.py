"""Metal kernels, executed on this machine's CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.devices.kernel import KernelDevice, arguments

if TYPE_CHECKING:
    from metalgen.render import KernelSource


class SimulatorDevice(KernelDevice):
    """Runs the very source that a Mac would compile; eager, right, and no measure of speed."""

    name = "simulator"
    target = "metal"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("ziglang") is None:
            return "its compiler is missing (pip install 'metalgen[simulator]')"
        return None

    def compile(self, source: KernelSource) -> Callable[..., list[mx.array]]:
        from metalgen import simulator

        options = {"math_mode": source.math_mode}
        kernel: Callable[..., list[mx.array]] = simulator.metal_kernel(
            **arguments(source), compile_options=options
        )
        return kernel
