"""Executes Metal compute kernels on a CPU, checks them and counts what they do.

>>> from metalgen import simulator
>>> kernel = simulator.metal_kernel(...)           # as mx.fast.metal_kernel
>>> with simulator.record(checked=True) as runs:   # races, bounds, uninitialised reads, ...
...     kernel(inputs=[...], ...)
>>> print(runs[0].findings.report(), runs[0].counters)

``install()`` runs code that calls ``mx.fast.metal_kernel`` unchanged; ``limits()`` bounds time,
memory and processes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metalgen.simulator.api import MetalKernel, metal_kernel
    from metalgen.simulator.checking import KernelCheck, SourceCheck, check_source
    from metalgen.simulator.counters import BufferTraffic, Counters
    from metalgen.simulator.errors import (
        CacheError,
        CheckFailed,
        CompileError,
        ExecutionError,
        KernelCrash,
        KernelTimeout,
        LaunchError,
        MemoryLimit,
        MissingToolchain,
        SimulatorError,
        StackOverflow,
    )
    from metalgen.simulator.findings import Access, Finding, Findings
    from metalgen.simulator.harness import Constant, InOut, Output, run_metal
    from metalgen.simulator.installing import install
    from metalgen.simulator.launch import Launch, Recorder, record
    from metalgen.simulator.launch_limits import Limits, limits

_HOMES = {
    "checking": ("KernelCheck", "SourceCheck", "check_source"),
    "api": ("MetalKernel", "metal_kernel"),
    "counters": ("BufferTraffic", "Counters"),
    "errors": (
        "CacheError",
        "CheckFailed",
        "CompileError",
        "ExecutionError",
        "KernelCrash",
        "KernelTimeout",
        "LaunchError",
        "MemoryLimit",
        "MissingToolchain",
        "SimulatorError",
        "StackOverflow",
    ),
    "launch_limits": ("Limits", "limits"),
    "findings": ("Access", "Finding", "Findings"),
    "harness": ("Constant", "InOut", "Output", "run_metal"),
    "installing": ("install",),
    "launch": ("Launch", "Recorder", "record"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Access",
    "BufferTraffic",
    "CacheError",
    "CheckFailed",
    "CompileError",
    "Constant",
    "Counters",
    "ExecutionError",
    "Finding",
    "Findings",
    "InOut",
    "KernelCheck",
    "KernelCrash",
    "KernelTimeout",
    "Launch",
    "LaunchError",
    "Limits",
    "MemoryLimit",
    "MetalKernel",
    "MissingToolchain",
    "Output",
    "Recorder",
    "SimulatorError",
    "SourceCheck",
    "StackOverflow",
    "check_source",
    "install",
    "limits",
    "metal_kernel",
    "record",
    "run_metal",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME_OF[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
