"""A launch of a kernel, written down in TOML: what a host would bind, and what must come out.

grid = [32, 1, 1]              # in threads
threadgroup = [32, 1, 1]

[constants]                    # function constants, by name or index
twice = true

[threadgroup_memory]           # bytes of threadgroup arguments, by index
0 = 2048

[buffers.0]
shape = [10]
type = "float32"
fill = "normal"                # zeros, ones, arange, normal, uniform, a number, or an expression

[buffers.1]
shape = [10]
type = "float32"
output = true                  # or inout = true, with a fill
expected = "2 * b[0]"          # NumPy; b holds what was bound, by index
tolerance = 1e-6               # relative to the largest expected magnitude

[buffers.2]
layout = "If"                  # a structure, packed as by Python's struct
values = [10, 0.5]
"""

from __future__ import annotations

import struct
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.simulator.counters import Counters
from metalgen.simulator.errors import LaunchError
from metalgen.simulator.generator import METAL_TYPES
from metalgen.simulator.harness import Buffer, Constant, InOut, Output, run_metal

_TYPES = {
    "bool": np.bool_,
    "int8": np.int8,
    "uint8": np.uint8,
    "int16": np.int16,
    "uint16": np.uint16,
    "int32": np.int32,
    "uint32": np.uint32,
    "int64": np.int64,
    "uint64": np.uint64,
    "float16": np.float16,
    "bfloat16": np.float32,
    "float32": np.float32,
    "complex64": np.complex64,
}
_FILLS = ("zeros", "ones", "arange", "normal", "uniform")
_KEYS = frozenset(("grid", "threadgroup", "kernel", "constants", "threadgroup_memory", "buffers"))
_BUFFER_KEYS = frozenset(
    "shape type fill output inout initial expected tolerance layout values partial".split()
)


@dataclass(frozen=True)
class Expectation:
    """What a buffer must hold after the launch; None: nothing is known of it."""

    values: np.ndarray | None
    tolerance: float
    partial: bool


@dataclass(frozen=True)
class LaunchFile:
    """A launch that a file describes; see the module."""

    buffers: Mapping[int, Buffer]
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    kernel: str | None = None
    constants: Mapping[int | str, Any] = field(default_factory=dict)
    threadgroup_memory: Mapping[int, int] = field(default_factory=dict)
    expected: Mapping[int, Expectation] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> LaunchFile:
        """Read a file. Raises ``LaunchError`` with its name and the key that is wrong.

        Expressions in it are evaluated as Python, with ``np`` and ``b``.
        """
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise LaunchError(f"{path}: {error}") from None
        try:
            return _launch(table)
        except LaunchError as error:
            raise LaunchError(f"{path}: {error}") from None

    def run(self, source: str, kernel: str, include_dirs: list[Path]) -> tuple[str, ...]:
        """Run ``kernel``; return what is wrong with its outputs, a sentence each."""
        outputs = run_metal(
            source,
            kernel,
            self.buffers,
            self.grid,
            self.threadgroup,
            constants=self.constants,
            threadgroup_memory=self.threadgroup_memory,
            include_dirs=include_dirs,
        )
        return tuple(
            fault
            for index, wanted in self.expected.items()
            if (fault := _fault(index, outputs[index], wanted))
        )

    def unwritten(self, counters: Counters | None) -> tuple[str, ...]:
        """A sentence for each output of which the kernel left a part, but not all, unwritten."""
        found = []
        for index, wanted in self.expected.items():
            value = self.buffers[index]
            if counters is None or wanted.partial or not isinstance(value, Output):
                continue
            if value.initial is None:
                traffic = counters.buffers[index]
                size = METAL_TYPES[value.dtype][1] * int(np.prod(value.shape))
                if 0 < traffic.distinct_written < size:
                    found.append(
                        f"buffer {index} ({traffic.name}): {size - traffic.distinct_written:,} of "
                        f"its {size:,} bytes were never written (partial = true allows it)"
                    )
        return tuple(found)


def _launch(table: dict[str, Any]) -> LaunchFile:
    _known(table, _KEYS, "")
    for key in ("grid", "threadgroup"):
        extents = table.get(key)
        if not isinstance(extents, list) or len(extents) != 3:
            raise LaunchError(f"{key}: expected three extents, but got {extents!r}")
    constants = {int(k) if k.isdigit() else k: v for k, v in table.get("constants", {}).items()}
    memory = {
        _index(k, "threadgroup_memory"): v for k, v in table.get("threadgroup_memory", {}).items()
    }
    entries = {_index(k, "buffers"): v for k, v in table.get("buffers", {}).items()}
    bound: dict[int, np.ndarray] = {}
    buffers: dict[int, Buffer] = {}
    expected: dict[int, Expectation] = {}
    for index, entry in sorted(entries.items()):
        name = f"buffers.{index}"
        if not isinstance(entry, dict):
            raise LaunchError(f"{name}: expected a table, but got {entry!r}")
        _known(entry, _BUFFER_KEYS, f"{name}.")
        buffers[index] = _buffer(name, index, entry, bound)
    for index, entry in entries.items():
        if entry.get("output") or entry.get("inout"):
            values = None
            if "expected" in entry:
                values = np.asarray(_value(f"buffers.{index}.expected", entry["expected"], bound))
            tolerance = float(entry.get("tolerance", 0.0))
            expected[index] = Expectation(values, tolerance, bool(entry.get("partial")))
        elif "expected" in entry:
            raise LaunchError(f"buffers.{index}.expected: expected with output or inout alone")
    return LaunchFile(
        buffers,
        tuple(table["grid"]),
        tuple(table["threadgroup"]),
        table.get("kernel"),
        constants,
        memory,
        expected,
    )


def _known(table: Mapping[str, Any], keys: frozenset[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise LaunchError(f"{where}{key}: expected one of {', '.join(sorted(keys))}")


def _index(key: str, where: str) -> int:
    if not key.isdigit():
        raise LaunchError(f"{where}.{key}: expected an index")
    return int(key)


def _buffer(name: str, index: int, entry: dict[str, Any], bound: dict[int, np.ndarray]) -> Buffer:
    if "layout" in entry:
        try:
            return Constant(entry["layout"], *entry.get("values", ()))
        except (struct.error, TypeError) as error:
            raise LaunchError(f"{name}.layout: {error}") from None
    kind = entry.get("type", "float32")
    if kind not in _TYPES:
        raise LaunchError(f"{name}.type: expected one of {', '.join(_TYPES)}, but got {kind!r}")
    dtype = getattr(mx, "bool_" if kind == "bool" else kind)
    shape = entry.get("shape", [1])
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise LaunchError(f"{name}.shape: expected extents of at least 0, but got {shape!r}")
    if entry.get("output"):
        return Output(tuple(shape), dtype, entry.get("initial"))
    values = _filled(f"{name}.fill", entry.get("fill", "zeros"), index, tuple(shape), bound)
    array = mx.array(np.ascontiguousarray(values.astype(_TYPES[kind]))).astype(dtype)
    bound[index] = np.array(array.astype(mx.float32) if kind == "bfloat16" else array)
    return InOut(array) if entry.get("inout") else array


def _filled(
    name: str, fill: Any, index: int, shape: tuple[int, ...], bound: Mapping[int, np.ndarray]
) -> np.ndarray:
    random = np.random.default_rng(index)
    count = int(np.prod(shape))
    if fill == "normal":
        return random.standard_normal(shape)
    if fill == "uniform":
        return random.random(shape)
    if fill == "arange":
        return np.arange(count).reshape(shape)
    if fill in ("zeros", "ones"):
        return np.full(shape, float(fill == "ones"))
    values = np.asarray(_value(name, fill, bound))
    try:
        return np.broadcast_to(values, shape)
    except ValueError:
        raise LaunchError(f"{name}: expected the shape {shape}, but got {values.shape}") from None


def _value(name: str, text: Any, bound: Mapping[int, np.ndarray]) -> Any:
    if not isinstance(text, str):
        return text
    try:
        return eval(text, {"np": np, "b": bound})  # the user's own file, as a test would be
    except Exception as error:
        raise LaunchError(f"{name}: {type(error).__name__}: {error}") from None


def _fault(index: int, found: mx.array, wanted: Expectation) -> str:
    if wanted.values is None:
        return ""
    values = np.array(found.astype(mx.float32) if found.dtype == mx.bfloat16 else found)
    try:
        right = np.broadcast_to(wanted.values, values.shape)
    except ValueError:
        return (
            f"buffer {index}: expected the shape {wanted.values.shape}, but it has {values.shape}"
        )
    kind = np.complex128 if np.iscomplexobj(values) else np.float64
    error = np.abs(values.astype(kind) - right.astype(kind))
    bound = wanted.tolerance * max(1e-300, float(np.max(np.abs(right), initial=0.0)))
    bad = ~(error <= bound) & ~(np.isnan(values.astype(kind)) & np.isnan(right.astype(kind)))
    if not bad.any():
        return ""
    first = tuple(int(i) for i in np.argwhere(bad)[0])
    at = first[0] if len(first) == 1 else first
    return (
        f"buffer {index}: {int(bad.sum())} of {bad.size} elements are wrong; the first, at {at}, "
        f"is {values[first]!s} and should be {right[first]!s}"
    )
