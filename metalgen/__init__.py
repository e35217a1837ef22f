"""Writes, tunes and dispatches fused attention kernels for MLX.

    import metalgen

    out = metalgen.attention(q, k, v, causal=True)
    kernel = metalgen.get_kernel(metalgen.AttentionConfig(head_dim=64, causal=True))

Importing this package imports MLX and the standard library, nothing else; everything public is
resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import mlx.core  # noqa: F401  (first, so that its absence is said before anything else)

from metalgen._version import __version__

if TYPE_CHECKING:
    from metalgen.config import AttentionConfig
    from metalgen.dispatch import Kernel, get_kernel
    from metalgen.errors import ArgumentError, DeviceError, InvalidSchedule, MetalgenError
    from metalgen.ops.attention import attention
    from metalgen.schedule import Schedule

_WHERE = {
    "ArgumentError": "metalgen.errors",
    "AttentionConfig": "metalgen.config",
    "DeviceError": "metalgen.errors",
    "InvalidSchedule": "metalgen.errors",
    "Kernel": "metalgen.dispatch",
    "MetalgenError": "metalgen.errors",
    "Schedule": "metalgen.schedule",
    "attention": "metalgen.ops.attention",
    "get_kernel": "metalgen.dispatch",
}

__all__ = [
    "ArgumentError",
    "AttentionConfig",
    "DeviceError",
    "InvalidSchedule",
    "Kernel",
    "MetalgenError",
    "Schedule",
    "__version__",
    "attention",
    "get_kernel",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_WHERE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
