"""Lets code written for a Mac run here: answers as MLX would on a machine with a GPU."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx

from metalgen.simulator import api

_lock = threading.Lock()
_depth = 0


@contextlib.contextmanager
def install() -> Iterator[None]:
    """Let code that calls ``mx.fast.metal_kernel`` run here unchanged, inside a ``with`` block.

    Replaces ``mx.fast.metal_kernel``, and answers as a Mac would where such code asks:
    ``mx.metal.is_available()`` and ``mx.is_available(mx.gpu)`` are true, ``mx.default_device()``
    is the GPU until ``mx.set_default_device`` says otherwise, and streams of the GPU are streams
    of the CPU. ``mx.compile`` is off meanwhile, because the simulator's kernels are eager.
    Affects the whole process; code that was imported before the block and then decided that there
    is no Metal stays so. Blocks nest.
    """
    global _depth
    with _lock:
        _depth += 1
        if _depth == 1:
            _saved.extend(_replace(_stand_ins()))
            mx.disable_compile()
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for owner, attribute, value in _saved:
                    setattr(owner, attribute, value)
                _saved.clear()
                api.stand_in_streams.clear()
                mx.enable_compile()


_Replacement = tuple[Any, str, Any]
_saved: list[_Replacement] = []


def _replace(replacements: list[_Replacement]) -> list[_Replacement]:
    """Put the values in place and return what was there."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    return before


def _stand_ins() -> list[_Replacement]:
    gpu = mx.Device(mx.gpu)
    default = gpu
    is_available, set_default_device = mx.is_available, mx.set_default_device

    def set_default(device: Any) -> None:
        nonlocal default
        if device != gpu:
            set_default_device(device)
        default = gpu if device == gpu else mx.Device(device)

    def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(device: Any, *arguments: Any) -> Any:
            result = function(mx.cpu if device == gpu else device, *arguments)
            if device == gpu and not isinstance(result, mx.StreamContext):
                api.stand_in_streams.append(result)
            return result

        return stand_in

    streams = ("stream", "default_stream", "new_stream", "new_thread_local_stream")
    return [
        (mx.fast, "metal_kernel", api.metal_kernel),
        (mx.metal, "is_available", lambda: True),
        (mx, "is_available", lambda device: device == gpu or is_available(device)),
        (mx, "default_device", lambda: default),
        (mx, "set_default_device", set_default),
        *((mx, name, on_cpu(getattr(mx, name))) for name in streams),
    ]
