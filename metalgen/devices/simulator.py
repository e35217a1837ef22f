"""Metal kernels, executed on this machine's CPU."""

from __future__ import annotations

import importlib.util
from typing import Any

from metalgen.devices.metal import MetalDevice


class SimulatorDevice(MetalDevice):
    """Runs the very source that a Mac would compile; eager, right, and no measure of speed."""

    name = "simulator"
    has_clock = False
    is_gpu = False

    def unavailable(self) -> str | None:
        if importlib.util.find_spec("ziglang") is None:
            return "its compiler is missing (pip install 'metalgen[simulator]')"
        return None

    def kernel(self, **arguments: Any) -> Any:
        from metalgen import simulator

        return simulator.metal_kernel(**arguments)
