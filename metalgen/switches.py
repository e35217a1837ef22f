"""What environment variables say about where attention is computed.

They are read when the first call needs them, and then kept, since reading one costs as much as the
rest of a look-up. `metalgen.calls.resolve.forget_kernels` makes the next call read them again.
"""

from __future__ import annotations

import functools
import os

from metalgen.errors import ArgumentError

REFERENCE = ("METALGEN_REFERENCE", "FLASH_ATTENTION_MLX_REF")
"""Either forces plain MLX; the second is the name that the MLX port of flash-attn uses."""

_ON, _OFF = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


@functools.cache
def asked_device() -> str | None:
    """The device that ``METALGEN_DEVICE`` names, unchecked; None where it names none."""
    return os.environ.get("METALGEN_DEVICE", "").strip() or None


@functools.cache
def forced_reference() -> str | None:
    """The variable that forces plain MLX, or None.

    Raises:
        ArgumentError: its value is neither on nor off.
    """
    for name in REFERENCE:
        value = os.environ.get(name, "").strip().lower()
        if value in _ON:
            return name
        if value not in _OFF:
            raise ArgumentError(name, "1 (plain MLX) or 0", os.environ[name])
    return None


def read_again() -> None:
    """Make the next call read the environment again."""
    asked_device.cache_clear()
    forced_reference.cache_clear()
