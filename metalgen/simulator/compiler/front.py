"""From a complete Metal translation unit to a shared object that executes one of its kernels."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..errors import CompileError, SimulatorError
from . import build, cache, toolchain
from .entry import BufferParameter, buffers, threadgroup_arguments
from .instrument import instrument
from .kernels import Kernel
from .language import SOURCE_NAME, LanguageStage, preprocess, shorten
from .lines import LineTable
from .own_memory import without_own
from .products import gather_products
from .reconverge import WAITS, inline_waiting, reconverge

__all__ = ["SOURCE_NAME", "BufferParameter", "CompiledKernel", "compile_metal", "compile_unit"]

Mode = Literal["plain", "checked"]


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as a shared object in the cache. `threadgroup_bytes`: its static threadgroup memory.

    `threadgroup_variables`: name and bytes of each threadgroup variable, by the number that
    findings give; 0 bytes for one of another kernel of the source. `threadgroup_arguments`: index
    and name of each argument in threadgroup memory, whose bytes the launch gives.
    """

    path: Path
    kernel: str
    mode: Mode
    buffers: tuple[BufferParameter, ...]
    threadgroup_bytes: int
    threadgroup_variables: tuple[tuple[str, int], ...] = ()
    threadgroup_arguments: tuple[tuple[int, str], ...] = ()

    def threadgroup_name(self, number: int) -> str | None:
        """The name of a threadgroup variable or argument, by the number that findings give."""
        if number < len(self.threadgroup_variables):
            return self.threadgroup_variables[number][0]
        return dict(self.threadgroup_arguments).get(LAST_VARIABLE - number)

    @cached_property
    def _lines(self) -> LineTable:
        return LineTable(self.path)

    def line_of(self, address: int) -> tuple[str, int] | None:
        """The file and line of the instruction before `address`, an offset into the object.

        The user's own text is called SOURCE_NAME. None where the line is not known.
        """
        return self._lines.find(address)


LAST_VARIABLE = 1023
"""The number of the first threadgroup argument; later ones count down (runtime/memory.cpp)."""


def compile_metal(
    source: str,
    kernel: str,
    *,
    mode: Mode = "plain",
    constants: Mapping[str | int, object] | None = None,
    include_dirs: Iterable[str | Path] = (),
) -> CompiledKernel:
    """Compiles the kernel named `kernel` of a complete Metal translation unit.

    `kernel` is a function's name, the host name of an explicit instantiation, or an instantiation
    such as `add<float, 4>`. `constants` gives function constants by name or by index. The result is
    cached on everything it depends on. Raises CompileError, with the line in `source` where there
    is one, and MissingToolchain.
    """
    constants = dict(constants or {})
    folders = [str(Path(p).resolve()) for p in include_dirs]
    key = cache.digest(
        [
            cache.own_sources(),
            str(toolchain.zig()),
            *toolchain.machine_flags(),
            mode,
            kernel,
            source,
            repr(sorted(constants.items(), key=repr)),
            *folders,
        ]
    )
    base = cache.directory() / key
    found = _load(base)
    if found is not None:
        return found
    with tempfile.TemporaryDirectory(dir=base.parent, prefix="compile-") as folder:
        return _compile(Path(folder), base, source, kernel, mode, constants, folders)


def _load(base: Path) -> CompiledKernel | None:
    """The kernel that the cache has, if it has all of it, unharmed and up to date."""
    note = cache.read_note(base.with_suffix(".json"))
    path = base.with_suffix(".so")
    if note is None or not cache.is_whole(path, note["digest"]):
        return None
    for name, size, modified in note["files"]:
        try:
            status = Path(name).stat()
        except OSError:
            return None
        if (status.st_size, status.st_mtime_ns) != (size, modified):
            return None
    return CompiledKernel(
        path,
        note["kernel"],
        note["mode"],
        tuple(BufferParameter(**b) for b in note["buffers"]),
        note["threadgroup_bytes"],
        tuple((name, size) for name, size in note["variables"]),
        tuple((index, name) for index, name in note["arguments"]),
    )


@dataclass(frozen=True)
class Unit:
    """A kernel's code as an object file, before it is linked with the runtime."""

    object: Path
    kernel: Kernel
    variables: tuple[tuple[str, int], ...]
    files: tuple[tuple[str, int, int], ...]


def compile_unit(
    source: str,
    kernel: str,
    folder: Path,
    *,
    mode: Mode,
    constants: Mapping[str | int, object],
    include_dirs: Iterable[str] = (),
    machine: build.Machine | None = None,
) -> Unit:
    """Compiles `kernel` to an object file in `folder`, for this machine or for the given one.

    Raises CompileError and MissingToolchain.
    """
    machine = toolchain.machine_flags() if machine is None else machine
    preprocessed = preprocess(source, folder, include_dirs)
    made = LanguageStage(preprocessed, folder, mode, constants, machine).compile(kernel)
    _generate(made.code, folder, mode, machine)
    by_number = {int(i): int(n) for i, n in re.findall(_VARIABLE, made.code)}
    names = re.findall(r"mg_type_(\w+)& \1 = ", made.unit.text)
    variables = tuple((name, by_number.get(i, 0)) for i, name in enumerate(names))
    files = tuple(_files(preprocessed))
    return Unit(folder / "unit.o", made.chosen.kernel, variables, files)


def _generate(code: str, folder: Path, mode: Mode, machine: build.Machine) -> None:
    """From the language stage's assembly to unit.o, by way of checks and of meeting points."""
    code = inline_waiting(instrument(code) if mode == "checked" else code)
    if not toolchain.is_x86(machine):
        code = toolchain.retarget(code)
    (folder / "unit.ll").write_text(code)
    compile_ir = ["clang", "-x", "ir", *toolchain.CODE, *machine]
    waits = WAITS in code
    stage = ["-S", "-emit-llvm", "-o", "optimised.ll"] if waits else ["-c", "-o", "unit.o"]
    first = toolchain.SCALAR if waits and mode == "checked" else []
    done = toolchain.run([*compile_ir, *first, *stage, "unit.ll"], folder)
    optimised = folder / "optimised.ll"
    if first and done.returncode == 0:  # once more, now that variables may become registers
        optimised.write_text(without_own(optimised.read_text()))
        done = toolchain.run([*compile_ir, *stage, "optimised.ll"], folder)
    if waits and done.returncode == 0:
        optimised.write_text(reconverge(gather_products(optimised.read_text())))
        last = ["-Xclang", "-disable-llvm-passes", "-c", "-o", "unit.o", "optimised.ll"]
        done = toolchain.run([*compile_ir, *last], folder)
    if done.returncode != 0:
        raise CompileError(f"the compiler failed on its own code:\n{shorten(done.stderr)}")


def _compile(
    folder: Path,
    base: Path,
    source: str,
    kernel: str,
    mode: Mode,
    constants: Mapping[str | int, object],
    folders: list[str],
) -> CompiledKernel:
    unit = compile_unit(
        source, kernel, folder, mode=mode, constants=constants, include_dirs=folders
    )
    runtime = build.runtime(mode, toolchain.machine_flags())
    done = toolchain.run(toolchain.link([unit.object.name, str(runtime)], "unit.so"), folder)
    if done.returncode != 0:
        raise CompileError(f"the linker failed on {kernel!r}:\n{shorten(done.stderr)}")
    total = sum((n + 15) // 16 * 16 for _, n in unit.variables)
    path = base.with_suffix(".so")
    arguments = threadgroup_arguments(unit.kernel)
    result = CompiledKernel(
        path, kernel, mode, buffers(unit.kernel), total, unit.variables, arguments
    )
    note = {
        "kernel": kernel,
        "mode": mode,
        "threadgroup_bytes": total,
        "variables": unit.variables,
        "arguments": arguments,
        "buffers": [asdict(b) for b in result.buffers],
        "files": unit.files,
        "digest": cache.keep(folder / "unit.so", path),
    }
    cache.write_note(base.with_suffix(".json"), note)
    return result


_TRIAL = """#include <metal_stdlib>
kernel void trial(device float* x [[buffer(0)]]) {{ x[0] = 1; }} // {nonce}
"""


def try_toolchain() -> str:
    """Compiles a kernel that the cache cannot have; returns why that fails, "" if it does not."""
    try:
        made = compile_metal(_TRIAL.format(nonce=os.urandom(8).hex()), "trial")
        for path in (made.path, made.path.with_suffix(".json")):
            path.unlink()
    except (SimulatorError, OSError) as error:
        return str(error).strip() or type(error).__name__
    return ""


_VARIABLE = r"call i64 @mg_threadgroup_variable\(i32 noundef (\d+), i64 noundef (\d+)"


def _files(preprocessed: str) -> list[tuple[str, int, int]]:
    """The files that the text came from, besides the simulator's own, with size and time."""
    names = set(re.findall(r'^# \d+ "([^"<]+)"', preprocessed, re.MULTILINE))
    found = []
    for name in sorted(names):
        path = Path(name)
        if path.is_absolute() and path.parent != toolchain.INCLUDE and path.exists():
            status = path.stat()
            found.append((name, status.st_size, status.st_mtime_ns))
    return found
