"""Putting `scaled_dot_product_attention` in the place of MLX's, and taking it away."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx

from metalgen.chips import get_chip
from metalgen.devices import get_device
from metalgen.devices.mlx_attention import mlx_sdpa
from metalgen.ops.sdpa import attend, scaled_dot_product_attention


class Installed:
    """What `install` returns; as a context manager it uninstalls at its end."""

    def __enter__(self) -> Installed:
        return self

    def __exit__(self, *error: object) -> None:
        uninstall()


def install(*, device: str | None = None, chip: str | None = None) -> Installed:
    """Make every caller of ``mx.fast.scaled_dot_product_attention`` call metalgen's.

    That is all that looks the function up in ``mx.fast`` when it calls it: ``mlx.nn``, mlx-lm,
    mlx-vlm and most other code. A name that was bound to MLX's function before
    (``from mlx.core.fast import ...``) stays bound to it. Installing again changes device and chip.

    Args:
        device: as in `metalgen.attention`; None: ``METALGEN_DEVICE``, or this machine's GPU.
        chip: whose tuning records to use; None: this machine's.

    Returns:
        A context manager that calls `uninstall` at its end; it need not be used as one.

    Raises:
        ArgumentError: an unknown device or chip.
        DeviceError: the device is not available here.
    """
    if device is not None:
        get_device(device)
    if chip is not None:
        get_chip(chip)
    ours: Any = scaled_dot_product_attention
    if device is not None or chip is not None:
        ours = _on(device, chip)
    mx.fast.scaled_dot_product_attention = ours
    return Installed()


def uninstall() -> bool:
    """Put MLX's own function back; says whether metalgen's was there."""
    there = is_installed()
    if there:
        mx.fast.scaled_dot_product_attention = mlx_sdpa
    return there


class Routed:
    """While it is entered, ``mx.fast``'s function is ours; it may be entered again, by any thread.

    Other threads that call ``mx.fast``'s function meanwhile call ours, too.
    """

    _lock = threading.Lock()
    _entered = 0
    _before: Any = None

    def __init__(self, device: str | None = None, chip: str | None = None) -> None:
        named = device is not None or chip is not None
        self._ours: Any = _on(device, chip) if named else scaled_dot_product_attention

    def __enter__(self) -> None:
        with Routed._lock:
            if not Routed._entered:
                Routed._before = mx.fast.scaled_dot_product_attention
            Routed._entered += 1
            mx.fast.scaled_dot_product_attention = self._ours

    def __exit__(self, *error: object) -> None:
        with Routed._lock:
            Routed._entered -= 1
            if not Routed._entered:
                mx.fast.scaled_dot_product_attention = Routed._before


def is_installed() -> bool:
    """Whether `install` has put metalgen's function in the place of MLX's."""
    found = mx.fast.scaled_dot_product_attention
    return getattr(found, "__module__", None) in (attend.__module__, __name__)


def _on(device: str | None, chip: str | None) -> Any:
    def scaled_dot_product_attention(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float,
        mask: mx.array | str | None = None,
        sinks: mx.array | None = None,
        force_fused: bool = False,
        stream: Any = None,
    ) -> mx.array:
        """`metalgen.scaled_dot_product_attention` on the device that `install` was given."""
        return attend(q, k, v, scale, mask, sinks, force_fused, stream, device, chip)

    return scaled_dot_product_attention
