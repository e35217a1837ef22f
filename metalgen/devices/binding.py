"""How arrays and launches are handed to compiled kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.errors import InvalidSchedule
from metalgen.families.base import Dispatch
from metalgen.languages import Language

if TYPE_CHECKING:
    from metalgen.source.render import KernelSource


def launched(source: KernelSource, dispatch: Dispatch) -> dict[str, Any]:
    """The arguments of a compiled kernel for one launch, but for its inputs."""
    x, y, z = dispatch.groups
    zeros = {"init_value": 0.0} if dispatch.zeroed else {}
    return zeros | {
        "output_shapes": [output.shape for output in dispatch.outputs],
        "output_dtypes": [getattr(mx, output.dtype) for output in dispatch.outputs],
        "grid": (x * source.threads, y, z),
        "threadgroup": (source.threads, 1, 1),
    }


def rows_as_bound(x: mx.array, language: Language) -> mx.array:
    """An array of rows (of Q, keys, or what belongs to keys) as a language's kernels take it."""
    if not language.byte_rows:
        return x
    x = x.view(mx.uint8)
    # MLX binds arrays of fewer than 8 elements as `constant`, where no row can lie.
    missing = 8 - x.shape[-1] if x.size < 8 else 0
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def check_buffers(source: KernelSource, language: Language) -> None:
    """Whether a kernel's arrays, shapes and strides can all be bound in a language.

    Raises:
        InvalidSchedule: they cannot; so it is when nearly all features come at once.
    """
    buffers = len(source.inputs) + len(source.outputs)
    for name in source.inputs:
        buffers += sum(f"{name}_{fact}" in source.source for fact in ("shape", "strides"))
    most = language.most_buffers
    if most is not None and buffers > most:
        detail = f"the kernel binds {buffers}, and {language.label} has {most}: too many features"
        raise InvalidSchedule("buffers", detail)
