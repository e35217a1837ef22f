"""Runs any Metal kernel function, not only those of ``metal_kernel``: for kernels in headers.

>>> outputs = simulator.run_metal(
...     '#include "mlx/backend/metal/kernels/softmax.h"\\ninstantiate_kernel("s", softmax, float)',
...     "s",
...     buffers={0: x, 1: simulator.Output((4, 8), mx.float32), 2: simulator.Constant("i", 8)},
...     grid=(32, 4, 1), threadgroup=(32, 1, 1))
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from metalgen.simulator import arrays, errors
from metalgen.simulator.findings import Finding
from metalgen.simulator.generator import METAL_TYPES
from metalgen.simulator.launch import POISON, check_launch, current_recorder, integers, run
from metalgen.simulator.memory import LaunchMemory, Segment


@dataclass(frozen=True)
class Output:
    """A buffer that the kernel writes; ``initial`` fills it, else it is poisoned.

    Raises ``LaunchError`` for a ``shape`` that is none.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype
    initial: float | None = None

    def __post_init__(self) -> None:
        shape = integers(self.shape)
        if not isinstance(shape, tuple) or any(
            type(extent) is not int or extent < 0 for extent in shape
        ):
            raise errors.LaunchError(
                f"Output.shape: expected extents of at least 0, got {self.shape}"
            )
        object.__setattr__(self, "shape", shape)


@dataclass(frozen=True)
class InOut:
    """A buffer that the kernel reads and writes; starts as a contiguous copy of ``array``."""

    array: mx.array


class Constant:
    """Bytes bound as a ``constant`` argument, packed as by ``struct`` (native layout, ``@``)."""

    def __init__(self, layout: str, *values: Any) -> None:
        self.data = struct.pack(f"@{layout}", *values)


Buffer = mx.array | Output | InOut | Constant | bytes


def run_metal(
    source: str,
    kernel: str,
    buffers: Mapping[int, Buffer],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    *,
    constants: Mapping[int | str, Any] | None = None,
    threadgroup_memory: Mapping[int, int] | None = None,
    include_dirs: Sequence[Path] | None = None,
) -> dict[int, mx.array]:
    """Compile ``source`` and run ``kernel`` over ``grid`` threads.

    ``source`` is a complete Metal translation unit; ``kernel`` a kernel function's name or the
    ``host_name`` of an instantiation; ``buffers`` maps Metal buffer indices to what is bound
    there (an array is read only and bound as it lies, strided or not); ``constants`` are function
    constants by index or name; ``threadgroup_memory`` gives the bytes of each argument in
    threadgroup memory, by its index, as ``setThreadgroupMemoryLength`` does; ``include_dirs``
    defaults to MLX's include folder.

    Returns the contents of every ``Output`` and ``InOut`` by buffer index. A buffer index that the
    kernel has and ``buffers`` lacks is bound to a page of zeros: an argument that function
    constants disable may still be read where the value is not used. Raises what ``metal_kernel``
    raises for source and launch.
    """
    from metalgen.simulator.api import mlx_include_dir
    from metalgen.simulator.compiler import compile_metal
    from metalgen.simulator.sweeping import kept

    for index, value in buffers.items():
        if not isinstance(value, (mx.array, Output, InOut, Constant, bytes)):
            raise errors.LaunchError(
                f"buffers[{index}]: expected an array, Output, InOut, Constant or bytes, got "
                f"{type(value).__name__}"
            )
    grid, threadgroup = integers(grid), integers(threadgroup)
    checked = current_recorder().checked
    given = dict(constants or {})
    folders = tuple(include_dirs) if include_dirs is not None else (mlx_include_dir(),)
    compiled = kept(
        lambda: compile_metal(
            source,
            kernel,
            mode="checked" if checked else "plain",
            constants=given,
            include_dirs=folders,
        )
    )
    lints: tuple[Finding, ...] = ()
    if checked:
        from metalgen.simulator.lints import lint

        lints = lint(source, kernel, constants=given, include_dirs=folders)
    group = check_launch(grid, threadgroup, len(buffers))
    names = {parameter.index: parameter.name for parameter in compiled.buffers}
    last = max([*buffers, *names], default=-1)
    bound = {
        index: _Bound(names.get(index, f"buffer {index}"), buffers.get(index, _UNBOUND))
        for index in range(last + 1)
    }

    def write(memory: LaunchMemory) -> None:
        for index, each in bound.items():
            each.write(memory.view(index))

    segments = [each.segment for each in bound.values()]
    with run(
        compiled,
        segments,
        write,
        grid,
        group,
        source=source,
        lints=lints,
        threadgroup_memory=threadgroup_memory,
    ) as memory:
        return {
            index: arrays.to_array(memory.view(index), tuple(each.value.shape), each.value.dtype)
            for index, each in bound.items()
            if isinstance(each.value, Output)
        } | {
            index: arrays.to_array(
                memory.view(index), tuple(each.value.array.shape), each.value.array.dtype
            )
            for index, each in bound.items()
            if isinstance(each.value, InOut)
        }


_UNBOUND = bytes(4096)


class _Bound:
    """One buffer of a launch: how large it is and what it holds at the start."""

    def __init__(self, name: str, value: Buffer) -> None:
        self.name = name
        self.value = value
        self.storage = None
        if isinstance(value, mx.array):
            self.storage = arrays.storage(value)
        elif isinstance(value, InOut):
            self.storage = arrays.storage(mx.contiguous(value.array))

    @property
    def segment(self) -> Segment:
        value = self.value
        if isinstance(value, Output):
            size = METAL_TYPES[value.dtype][1]
            for extent in value.shape:
                size *= extent
            return Segment(self.name, size, writable=True, initialised=value.initial is not None)
        if self.storage is not None:
            return Segment(
                self.name,
                self.storage.size,
                writable=isinstance(value, InOut),
                lead=self.storage.lead,
            )
        return Segment(self.name, len(_data(value)))

    def write(self, target: memoryview) -> None:
        value = self.value
        if isinstance(value, Output):
            if value.initial is None:
                target[:] = bytes([POISON]) * len(target)
            else:
                arrays.fill(target, value.initial, value.dtype)
        elif self.storage is not None:
            self.storage.copy_to(target)
        else:
            target[:] = _data(value)


def _data(value: Buffer) -> bytes:
    return value.data if isinstance(value, Constant) else bytes(value)  # type: ignore[arg-type]
