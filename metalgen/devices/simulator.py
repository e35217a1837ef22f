"""Metal kernels, executed on this machine's CPU."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from metalgen.devices.kernel import KernelDevice, arguments
from metalgen.devices.marking import Launcher

if TYPE_CHECKING:
    from metalgen.source.render import KernelSource


class SimulatorDevice(KernelDevice):
    """Runs the very source that a Mac would compile; eager, right, and no measure of speed."""

    name = "simulator"
    language = "metal"

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("ziglang") is None:
            return "its compiler is missing (pip install 'metalgen[simulator]')"
        return None

    def compile(self, source: KernelSource) -> Launcher:
        from metalgen import simulator

        options = {"math_mode": source.math_mode}
        kernel: Launcher = simulator.metal_kernel(**arguments(source), compile_options=options)
        return kernel
