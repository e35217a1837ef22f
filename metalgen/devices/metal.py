"""Metal kernels, on an Apple GPU through ``mx.fast.metal_kernel``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from metalgen.devices.kernel import KernelDevice, arguments
from metalgen.devices.marking import Launcher, marking

if TYPE_CHECKING:
    from metalgen.source.render import KernelSource


class MetalDevice(KernelDevice):
    """This machine's Apple GPU."""

    name = "metal"
    language = "metal"
    has_clock = True
    is_gpu = True

    def unavailable(self) -> str | None:
        if not mx.metal.is_available():
            return "this MLX has no Metal back end (an Apple GPU is needed)"
        return None

    def compile(self, source: KernelSource) -> Launcher:
        options = {"math_mode": source.math_mode}
        kernel: Any = mx.fast.metal_kernel(**arguments(source), compile_options=options)
        return marking(cast(Launcher, kernel))
