"""Outputs that show whether their kernel ran.

MLX's CUDA back end launches nothing, and says nothing, where a kernel needs more registers or
shared memory than a block may have; its outputs are then whatever lay in that memory, which may
well be an earlier kernel's right answer. So whoever judges a kernel marks its outputs first: they
hold NaN before it runs, which no kernel leaves in a row that it writes. The simulator always does
so.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

Launcher = Callable[..., list[mx.array]]
"""What MLX's constructors of custom kernels return."""

UNWRITTEN = "all of it is NaN, as where nothing is launched"
"""What is said of a marked output that is as it was."""

_marking: contextvars.ContextVar[bool] = contextvars.ContextVar("marking", default=False)


@contextlib.contextmanager
def marked_outputs() -> Iterator[None]:
    """Kernels that are called meanwhile (evaluated whenever) find NaN in their outputs."""
    token = _marking.set(True)
    try:
        yield
    finally:
        _marking.reset(token)


def marking(kernel: Launcher) -> Launcher:
    """The same kernel, whose outputs are marked where `marked_outputs` asks for it."""

    def launch(**arguments: Any) -> list[mx.array]:
        if _marking.get():  # but outputs to which kernels add begin with zeros
            arguments.setdefault("init_value", math.nan)
        return kernel(**arguments)

    return launch


def is_unwritten(output: mx.array) -> bool:
    """Whether a marked output of floats is as it was; evaluates it. An empty one never is."""
    return bool(output.size) and bool(mx.isnan(output).all().item())
