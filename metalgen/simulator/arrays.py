"""Between MLX arrays and plain bytes: real strides and offsets in, every dtype out."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.simulator.errors import LaunchError
from metalgen.simulator.generator import METAL_TYPES

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True)
class Storage:
    """Where an evaluated array lies in this process.

    Element (i, j, ...) is ``i * strides[0] + j * strides[1] + ...`` elements from the origin. The
    view covers ``size`` bytes, of which ``lead`` lie before the origin (negative strides).
    ``owner`` keeps the memory alive.
    """

    first: int
    size: int
    lead: int
    strides: tuple[int, ...]
    row_contiguous: bool
    owner: Any

    def copy_to(self, target: memoryview) -> None:
        """Copy the covered bytes, gaps between elements included."""
        if self.size:
            address = ctypes.addressof(ctypes.c_char.from_buffer(target))
            ctypes.memmove(address, self.first, self.size)


def storage(array: mx.array) -> Storage:
    """Locate an array's bytes without copying it; evaluates it first."""
    item = METAL_TYPES[array.dtype][1]
    bits = array.view(_UNSIGNED[item])  # keeps strides; NumPy knows neither bfloat16 nor 'Zf'
    try:
        mx.eval(bits)
    except ValueError as error:
        if "transformation" not in str(error):
            raise
        message = (
            "the simulator executes kernels at once; call it outside of mx.compile and mx.vmap"
        )
        raise LaunchError(f"{message}, where arrays have no contents yet") from None
    view = np.array(bits, copy=False)
    origin = view.__array_interface__["data"][0]
    strides = tuple(stride // item for stride in view.strides)
    if view.size == 0:
        return Storage(origin, 0, 0, strides, True, view)
    reach = [(extent - 1) * stride for extent, stride in zip(view.shape, view.strides, strict=True)]
    lead = -sum(step for step in reach if step < 0)
    size = lead + sum(step for step in reach if step > 0) + item
    return Storage(origin - lead, size, lead, strides, _row_contiguous(view), view)


def _row_contiguous(view: Any) -> bool:
    expected = view.itemsize
    for extent, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if extent != 1 and stride != expected:
            return False
        expected *= extent
    return True


def fill(target: memoryview, value: float, dtype: mx.Dtype) -> None:
    """Fill the bytes with ``value`` converted to ``dtype``, as MLX fills an ``init_value``."""
    element = mx.array(value, dtype=mx.float32).astype(dtype)
    item = METAL_TYPES[dtype][1]
    bits = np.array(element.view(_UNSIGNED[item]))
    np.frombuffer(target, dtype=bits.dtype)[:] = bits


def to_array(data: memoryview, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Copy bytes into a new, evaluated MLX array. Booleans are normalised to 0 and 1."""
    item = METAL_TYPES[dtype][1]
    bits = np.frombuffer(data, dtype=f"u{item}").reshape(shape)
    if dtype == mx.bool_:
        result = mx.array(bits != 0)
    else:
        result = mx.array(bits).view(dtype)
    mx.eval(result)
    return result
