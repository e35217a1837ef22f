"""A device that runs CUDA sources on this CPU, block after block: see emulator.h.

It shows whether a kernel computes what it should and waits for what it reads, not whether NVIDIA's
compiler takes it, nor how fast it is.
"""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.devices.kernel import KernelDevice
from metalgen.devices.simulator import SimulatorDevice
from metalgen.families import Limits
from metalgen.simulator.compiler import toolchain
from metalgen.source.render import KernelSource

TYPES = {
    "bool": "bool",
    "uint8": "uint8_t",
    "uint32": "uint32_t",
    "int32": "int",
    "float32": "float",
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
}
FLAGS = "clang -x c++ -std=c++20 -O0 -w -fPIC -shared -nostdlib -nostdinc -nostdinc++".split()
FUNCTION = re.compile(
    r"^(?:template <[^\n]*>\n)?__device__ __forceinline__[^\n]*\{\n(?:[^\n]*\n)*?\}\n", re.MULTILINE
)


class EmulatedCuda(KernelDevice):
    """An NVIDIA GPU of compute capability 9.0, made of one core.

    Args:
        offset: bytes from a multiple of 256 to the start of each input.
        seed: of the order of threads.
        instructions: that this GPU has in addition (`metalgen.schedules.Limits`).
    """

    name = "cuda"
    language = "cuda"

    def __init__(self, offset: int = 0, seed: int = 0, instructions: tuple[str, ...] = ()) -> None:
        self.offset, self.seed, self.instructions = offset, seed, instructions

    @property
    def limits(self) -> Limits:
        return Limits(232448, 1024, "cuda", self.instructions)

    def unavailable(self) -> str | None:
        machine = platform.machine().lower()
        if machine not in ("x86_64", "amd64") or platform.system() != "Linux":
            return f"its threads are switched on x86-64 Linux, not on {machine}"
        return SimulatorDevice().unavailable()  # whose compiler this is, too

    def compile(self, source: KernelSource) -> Callable[..., list[mx.array]]:
        def run(
            *,
            inputs: list[mx.array],
            output_shapes: list[tuple[int, ...]],
            output_dtypes: list[mx.Dtype],
            grid: tuple[int, int, int],
            threadgroup: tuple[int, int, int],
            init_value: float | None = None,
        ) -> list[mx.array]:
            assert init_value in (None, 0.0)
            unwritten = 0xFF if init_value is None else 0
            views = [_view(x, self.offset) for x in inputs]
            outputs = [
                np.full(math.prod(shape) * dtype.size, unwritten, np.uint8)
                for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
            ]
            types = tuple(_type(x.dtype) for x in inputs), tuple(map(_type, output_dtypes))
            places = np.array([x.ctypes.data for x in (*views, *outputs)], np.uint64)
            shapes, strides = np.zeros((64, 8), np.int32), np.zeros((64, 8), np.int64)
            for n, x in enumerate(views):
                shapes[n, : x.ndim] = x.shape
                strides[n, : x.ndim] = [step // x.itemsize for step in x.strides]
            # Of scales 4 bytes are copied at once, at a multiple of that.
            spans = [_span(x) for x in views]
            first = np.array(
                [(x.ctypes.data + a) // 4 * 4 for x, (a, _) in zip(views, spans, strict=True)]
            )
            past = np.array(
                [-(-(x.ctypes.data + b) // 4) * 4 for x, (_, b) in zip(views, spans, strict=True)]
            )
            blocks = np.array([grid[0] // threadgroup[0], *grid[1:]], np.uint32)
            wrong = _library(source, *types).em_launch(
                blocks.ctypes,
                threadgroup[0],
                source.shared_memory,
                *(x.ctypes for x in (places, shapes, strides, first, past)),
                len(views),
                self.seed,
            )
            if wrong:
                raise RuntimeError(f"{source.name}: {wrong.decode()}")
            return [
                mx.array(x).view(dtype).reshape(shape)
                for x, shape, dtype in zip(outputs, output_shapes, output_dtypes, strict=True)
            ]

        return run


def _view(x: mx.array, offset: int) -> Any:
    """A copy of an array, gaps between its rows and all, at an offset from a multiple of 256."""
    if x.size == 0:
        return np.zeros(x.shape, np.uint8)
    mx.eval(x)
    given = np.asarray(memoryview(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x))
    low, high = _span(given)
    memory = np.full(high - low + 512, 0xFF, np.uint8)
    start = -memory.ctypes.data % 256 + offset
    own = memory[start : start + high - low].view(given.dtype)[-low // given.itemsize :]
    strided = np.lib.stride_tricks.as_strided(own, given.shape, given.strides)
    strided[...] = given
    return strided


def _span(x: Any) -> tuple[int, int]:
    """Where the memory of an array begins and ends, in bytes from its first element."""
    steps = [(size - 1) * step for size, step in zip(x.shape, x.strides, strict=True)]
    if not x.size:
        return 0, 0
    return sum(n for n in steps if n < 0), sum(n for n in steps if n > 0) + x.itemsize


def _type(dtype: mx.Dtype) -> str:
    return TYPES[str(dtype).removeprefix("mlx.core.")]


def translation(source: KernelSource, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> str:
    """The C++ of a kernel whose arrays have these types, for emulator.h."""

    def portable(function: re.Match[str]) -> str:
        words = ("asm", "mg_shared(const", "__floats2", "mg_add_4")
        own = any(word in function[0] for word in words)
        return "" if own else function[0]

    parameters, arguments = [], []
    for n, (name, kind) in enumerate(zip(source.inputs, inputs, strict=True)):
        given = {"": (f"const {kind}*", f"static_cast<const {kind}*>(pointers[{n}])")}
        given |= {"_shape": ("const Shape&", f"shapes[{n}]")}
        given |= {"_strides": ("const Strides&", f"strides[{n}]")}
        for suffix, (declared, argument) in given.items():
            if not suffix or name + suffix in source.source:
                parameters.append(f"{declared} {name}{suffix}")
                arguments.append(argument)
    for n, (name, kind) in enumerate(zip(source.outputs, outputs, strict=True), len(inputs)):
        parameters.append(f"{kind}* {name}")
        arguments.append(f"static_cast<{kind}*>(pointers[{n}])")
    small = re.search(r"fma\.rn\.(b?f16)x2", source.header)
    elements = {"f16": "#define EM_T __half\n#define EM_HALF", "bf16": "#define EM_T __nv_bfloat16"}
    body = re.sub(r"extern __shared__[^\n]*\n", "", source.source)
    return "\n".join(
        (
            elements[small[1]] if small else "",
            "#define EM_WARP_GROUPS" if "mbarrier" in source.header else "",
            '#include "emulator.h"',
            FUNCTION.sub(portable, source.header),
            f"static void body({', '.join(parameters)}) {{",
            body,
            "}",
            f"static void em_kernel() {{ body({', '.join(arguments)}); }}",
        )
    )


@functools.cache
def _library(
    source: KernelSource, inputs: tuple[str, ...], outputs: tuple[str, ...]
) -> ctypes.CDLL:
    # The files stay while the process runs: a library with an old one's inode would be that one.
    folder = Path(_folder().name)
    stem = f"kernel{len(list(folder.glob('*.cpp')))}"
    (folder / f"{stem}.cpp").write_text(translation(source, inputs, outputs))
    include = str(Path(__file__).parent)
    done = toolchain.run([*FLAGS, "-I", include, "-o", f"{stem}.so", f"{stem}.cpp"], folder)
    if done.returncode:
        raise RuntimeError(f"{source.name} does not compile: {done.stderr[:4000]}")
    library = ctypes.CDLL(str(folder / f"{stem}.so"))
    library.em_launch.restype = ctypes.c_char_p
    return library


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="emulated-cuda-")
