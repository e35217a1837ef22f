"""CUDA kernels, on an NVIDIA GPU through ``mx.fast.cuda_kernel``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from metalgen.devices.compact import compact
from metalgen.devices.kernel import KernelDevice, arguments
from metalgen.devices.marking import Launcher, marking
from metalgen.families import Limits

if TYPE_CHECKING:
    from metalgen.source.render import KernelSource

SHARED_MEMORY = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448}
"""Most bytes of shared memory a block, by compute capability; 101,376 for the others.

CUDA C++ Programming Guide, technical specifications per compute capability.
"""
OTHER_SHARED_MEMORY = 101376
INSTRUCTIONS: dict[tuple[int, int], tuple[str, ...]] = {(9, 0): ("wgmma",)}
"""What matrix kinds may use, by compute capability. No later one has ``wgmma`` (PTX ISA)."""


class CudaDevice(KernelDevice):
    """This machine's NVIDIA GPU, of compute capability 8.0 or later."""

    name = "cuda"
    language = "cuda"
    has_clock = True
    is_gpu = True
    compile_jobs = 8
    most_groups = 65535  # CUDA C++ Programming Guide: y- and z-dimension of a grid

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability, such as (9, 0); None where MLX sees no GPU.

        MLX built for CUDA calls itself available on any machine.
        """
        return _capability(mx.device_info) if mx.cuda.is_available() else None

    @property
    def limits(self) -> Limits:
        """What a block may use; raises nothing, and without a GPU is that of most GPUs."""
        here = self.capability or (0, 0)
        shared = SHARED_MEMORY.get(here, OTHER_SHARED_MEMORY)
        return Limits(shared, 1024, "cuda", INSTRUCTIONS.get(here, ()))

    def unavailable(self) -> str | None:
        if not mx.cuda.is_available():
            return "this MLX has no CUDA back end (an NVIDIA GPU and metalgen[cuda13] are needed)"
        capability = self.capability
        if capability is None:
            return "MLX sees no NVIDIA GPU (its driver, or CUDA_VISIBLE_DEVICES, may be why)"
        if capability < (8, 0):
            major, minor = capability
            return f"its GPU has compute capability {major}.{minor}, and 8.0 is needed"
        return None

    def number(self, x: float) -> mx.array:
        return _device_number(x)

    def compile(self, source: KernelSource) -> Launcher:
        short = arguments(compact(source))
        kernel: Any = mx.fast.cuda_kernel(**short, shared_memory=source.shared_memory)
        return marking(cast(Launcher, kernel))


@functools.lru_cache(maxsize=8)
def _capability(device_info: Callable[[mx.Device], dict[str, Any]]) -> tuple[int, int] | None:
    """Of the first GPU, as MLX's function says, which need not make its dictionary at each call."""
    info = device_info(mx.Device(mx.gpu, 0))
    major, minor = (info.get(f"compute_capability_{part}") for part in ("major", "minor"))
    return None if major is None or minor is None else (int(major), int(minor))


@functools.lru_cache(maxsize=64)
def _device_number(x: float) -> mx.array:
    """A number in the GPU's own memory, several times.

    MLX keeps arrays of up to 8 bytes in memory that it shares with the host, for which every block
    might have to reach across the bus. (By mlx/backend/cuda/allocator.cpp; what that costs was not
    measured by itself.)
    """
    numbers = mx.full((4,), x)
    mx.async_eval(numbers)  # type: ignore[no-untyped-call]
    return numbers
