"""From a complete Metal translation unit to a shared object that executes one of its kernels."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from ..errors import CompileError
from . import bitcasts, build, cache, toolchain
from .instrument import instrument
from .kernels import Kernel
from .lines import LineTable
from .reconverge import WAITS, inline_waiting, reconverge
from .transform import Transformed, TransformError, transform

Mode = Literal["plain", "checked"]
SOURCE_NAME = "program.metal"  # what the user's text is called in diagnostics and line tables


@dataclass(frozen=True)
class BufferParameter:
    """A buffer that the kernel takes; `index` is its Metal buffer index."""

    index: int
    name: str
    space: Literal["device", "constant"]
    writable: bool
    type: str
    is_reference: bool


@dataclass(frozen=True)
class CompiledKernel:
    """A kernel as a shared object in the cache. `threadgroup_bytes`: its static threadgroup memory.

    `threadgroup_variables`: name and bytes of each threadgroup variable, by the number that
    findings give; 0 bytes for one of another kernel of the source.
    """

    path: Path
    kernel: str
    mode: Mode
    buffers: tuple[BufferParameter, ...]
    threadgroup_bytes: int
    threadgroup_variables: tuple[tuple[str, int], ...] = ()

    @property
    def variables(self) -> tuple[str, ...]:
        """The names of the threadgroup variables."""
        return tuple(name for name, _ in self.threadgroup_variables)

    @cached_property
    def _lines(self) -> LineTable:
        return LineTable(self.path)

    def line_of(self, address: int) -> tuple[str, int] | None:
        """The file and line of the instruction before `address`, an offset into the object.

        The user's own text is called SOURCE_NAME. None where the line is not known.
        """
        return self._lines.find(address)


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
    try:
        note = json.loads(base.with_suffix(".json").read_bytes())
    except (OSError, ValueError):
        return None
    path = base.with_suffix(".so")
    if not path.exists():
        return None
    for name, size, modified in note["files"]:
        try:
            status = Path(name).stat()
        except OSError:
            return None
        if (status.st_size, status.st_mtime_ns) != (size, modified):
            return None
    buffers = tuple(BufferParameter(**b) for b in note["buffers"])
    return CompiledKernel(
        path,
        note["kernel"],
        note["mode"],
        buffers,
        note["threadgroup_bytes"],
        tuple((name, size) for name, size in note["variables"]),
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

    def language(thorough: bool = False, merged: bool = False) -> tuple[Transformed, Kernel, str]:
        return _language(preprocessed, kernel, folder, mode, constants, machine, thorough, merged)

    try:
        unit, chosen, code = language()
    except CompileError as error:
        casts, copies = (re.search(p, str(error)) for p in (_VECTOR_CAST, _CONSTANT_COPY))
        if not (casts or copies):
            raise
        try:
            unit, chosen, code = language(thorough=casts is not None, merged=copies is not None)
        except CompileError:
            raise error from None
    _generate(code, folder, mode, machine)
    sizes = re.findall(_VARIABLE, code)
    by_number = {int(i): int(n) for i, n in sizes}
    names = re.findall(r"mg_type_(\w+)& \1 = ", unit.text)
    variables = tuple((name, by_number.get(i, 0)) for i, name in enumerate(names))
    return Unit(folder / "unit.o", chosen, variables, tuple(_files(preprocessed)))


def _generate(code: str, folder: Path, mode: Mode, machine: build.Machine) -> None:
    """From the language stage's assembly to unit.o: checks put in, optimised, lanes brought together."""
    code = inline_waiting(instrument(code) if mode == "checked" else code)
    if not toolchain.is_x86(machine):
        code = toolchain.retarget(code)
    (folder / "unit.ll").write_text(code)
    waits = WAITS in code
    stage = ["-S", "-emit-llvm", "-o", "optimised.ll"] if waits else ["-c", "-o", "unit.o"]
    done = toolchain.run(["clang", "-x", "ir", *toolchain.CODE, *machine, *stage, "unit.ll"], folder)
    if waits and done.returncode == 0:
        optimised = (folder / "optimised.ll").read_text()
        (folder / "optimised.ll").write_text(reconverge(optimised))
        arguments = ["clang", "-x", "ir", *toolchain.CODE, "-Xclang", "-disable-llvm-passes", *machine]
        done = toolchain.run([*arguments, "-c", "-o", "unit.o", "optimised.ll"], folder)
    if done.returncode != 0:
        raise CompileError(f"the compiler failed on its own code:\n{_shorten(done.stderr)}")


def _language(
    preprocessed: str,
    kernel: str,
    folder: Path,
    mode: Mode,
    constants: Mapping[str | int, object],
    machine: build.Machine,
    thorough: bool,
    merged: bool,
) -> tuple[Transformed, Kernel, str]:
    """The language stage: the transformed text, the chosen kernel, LLVM assembly (also in unit.ll).

    `thorough`, `merged`: see transform.
    """
    try:
        unit = transform(preprocessed, constants, thorough=thorough, merged=merged)
        chosen, expression = choose(unit, kernel)
    except TransformError as error:
        raise CompileError(str(error), file=SOURCE_NAME, line=error.line or None) from None
    (folder / "unit.cl").write_text(unit.text + entry(chosen, expression))
    arguments = ["clang", *build.language_flags(mode, machine)]
    arguments += ["-include-pch", str(build.headers(mode, machine))]
    done = toolchain.run([*arguments, "-S", "-emit-llvm", "-o", "unit.ll", "unit.cl"], folder)
    if done.returncode != 0:
        raise _compile_error(done.stderr)
    code = (folder / "unit.ll").read_text()
    bad = bitcasts.find_reinterpretation(code)
    if bad is not None:
        message = f"{SOURCE_NAME}:{bad[0]}: {bad[1]}"
        raise CompileError(message, file=SOURCE_NAME, line=bad[0] or None)
    return unit, chosen, code


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
        raise CompileError(f"the linker failed on {kernel!r}:\n{_shorten(done.stderr)}")
    total = sum((n + 15) // 16 * 16 for _, n in unit.variables)
    path = base.with_suffix(".so")
    result = CompiledKernel(path, kernel, mode, _buffers(unit.kernel), total, unit.variables)
    (folder / "unit.so").replace(path)
    note = {
        "kernel": kernel,
        "mode": mode,
        "threadgroup_bytes": total,
        "variables": unit.variables,
        "buffers": [asdict(b) for b in result.buffers],
        "files": unit.files,
    }
    cache.replace(base.with_suffix(".json"), json.dumps(note).encode())
    return result


def preprocess(source: str, folder: Path, include_dirs: Iterable[str] = ()) -> str:
    """Metal `source` with its includes and macros resolved, by clang, in `folder`."""
    (folder / SOURCE_NAME).write_text(source)
    arguments = [
        "clang",
        "-E",
        "-x",
        "c++",
        "-std=c++17",
        "-undef",
        "-nostdinc",
        "-nostdinc++",
        "-DMG_MACROS_ONLY",
        "-D__cpp_variable_templates=201304L",
        "-Wno-everything",
        "-include",
        "metal_config",
        "-I",
        str(toolchain.INCLUDE),
    ]
    for path in include_dirs:
        arguments += ["-I", path]
    done = toolchain.run([*arguments, SOURCE_NAME], folder)
    if done.returncode != 0:
        raise _compile_error(done.stderr)
    return done.stdout


def choose(unit: Transformed, kernel: str) -> tuple[Kernel, str]:
    """The kernel that a name means, and the expression that calls it. Raises TransformError."""
    expression = kernel
    if kernel in unit.instantiations:
        expression = unit.instantiations[kernel].expression
    name = re.split(r"\s*<", expression, maxsplit=1)[0].split("::")[-1].strip()
    found = unit.kernels.get(name)
    if found is None:
        known = sorted({*unit.kernels, *unit.instantiations})
        listed = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
        raise TransformError(
            f"the source has no kernel {kernel!r}; it has {listed}"
            if known
            else f"the source has no kernel {kernel!r}, and no [[kernel]] function at all"
        )
    if found.template and "<" not in expression:
        raise TransformError(
            f"{kernel!r} is a template: name an instantiation of it, such as {kernel}<float>"
        )
    return found, expression


def entry(kernel: Kernel, expression: str) -> str:
    """The function that calls `expression` for one thread of the runtime."""
    arguments = []
    for i, p in enumerate(kernel.parameters):
        kind = f"mg_entry_signature::parameter<{i}>"
        if p.kind == "position":
            arguments.append(f"mg::position<{kind}>(thread_->{p.attribute})")
        elif p.kind == "threadgroup":
            arguments.append(f"mg::threadgroup_buffer<{kind}>::get({p.index})")
        else:
            arguments.append(f"mg::buffer<{kind}>::get({p.index})")
    call = ", ".join(arguments)
    return (
        f'\n#line 1 "metalgen_entry"\n'
        f"typedef mg::signature<decltype({expression})> mg_entry_signature;\n"
        f'extern "C" void mg_kernel(const __private mg_thread* thread_) '
        f"{{ {expression}({call}); }}\n"
    )


def _buffers(kernel: Kernel) -> tuple[BufferParameter, ...]:
    found = []
    for p in kernel.parameters:
        if p.kind != "buffer":
            continue
        words = p.type.split()
        space: Literal["device", "constant"] = "constant" if "constant" in words else "device"
        element = " ".join(w for w in words if w not in ("const", "device", "constant", "*", "&"))
        writable = space == "device" and "const" not in words
        found.append(BufferParameter(p.index, p.name, space, writable, element, "&" in words))
    return tuple(sorted(found, key=lambda b: b.index))


# Errors that a cast to a vector through a template's type parameter makes.
_VECTOR_CAST = r"from vector|excess elements|reinterpretation of bits"
# Errors that the copy of a structure out of constant memory makes.
_CONSTANT_COPY = r"cannot bind reference in address space 'constant'"
_VARIABLE = r"call i64 @mg_threadgroup_variable\(i32 noundef (\d+), i64 noundef (\d+)"
_DIAGNOSTIC = re.compile(r"^(\S[^:\n]*):(\d+):(\d+): (?:fatal )?error: (.*)$", re.MULTILINE)


def _compile_error(text: str) -> CompileError:
    text = text.replace("__global", "device").replace("__local", "threadgroup")
    text = text.replace("__private", "thread").replace("__constant", "constant")
    text = re.sub(r"static assertion failed due to requirement '.*?': ", "", text)
    text = _shorten(text)
    first = _DIAGNOSTIC.search(text)
    if first is None:
        return CompileError(text.strip() or "the compiler failed and said nothing")
    file, line, message = first.group(1), int(first.group(2)), first.group(4)
    if file != SOURCE_NAME:
        inside = re.search(
            rf"^{re.escape(SOURCE_NAME)}:(\d+):\d+: note: in instantiation", text, re.MULTILINE
        )
        if inside:
            return CompileError(
                f"{SOURCE_NAME}:{inside.group(1)}: {message} (at {file}:{line})\n\n" + text.strip(),
                file=SOURCE_NAME,
                line=int(inside.group(1)),
            )
    return CompileError(f"{file}:{line}: {message}\n\n{text.strip()}", file=file, line=line)


def _shorten(text: str, lines: int = 40, width: int = 300) -> str:
    """The first `lines` lines of `text`, none longer than `width` (macros make very long ones)."""
    kept = [t if len(t) <= width else t[:width] + " ..." for t in text.splitlines()]
    return "\n".join(kept[:lines] + (["..."] if len(kept) > lines else []))


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
