"""Whether this machine can run it, by the name that the MLX port of flash-attn gives to that."""

from __future__ import annotations

import mlx.core as mx

from metalgen.devices import default_device
from metalgen.errors import MetalgenError


def check_mlx_requirements() -> tuple[bool, str]:
    """Whether kernels of metalgen's compute calls here, and a sentence that says what does.

    Where none do, plain MLX operations compute every call, rightly and slowly.
    """
    try:
        device = default_device()
    except MetalgenError as error:
        return False, str(error)
    version = getattr(mx, "__version__", "unknown")
    if device.language is None:
        return False, f"MLX {version}: no GPU here; plain MLX operations compute every call."
    return True, f"MLX {version}: kernels run on device {device.name!r}."
