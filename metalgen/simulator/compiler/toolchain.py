"""The compiler: clang and lld from the PyPI package ziglang, and the flags of every stage."""

from __future__ import annotations

import functools
import importlib.util
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from ..errors import MissingToolchain

INCLUDE = Path(__file__).parent / "include"
RUNTIME = Path(__file__).parent.parent / "runtime"
PINNED = "0.17"

# Metal read as C++ for OpenCL: address spaces, vectors and half are the language's own. Double is
# switched off, as in Metal; half and bfloat arithmetic rounds after every operation. The language
# stage always targets x86-64: with other targets clang 22 cannot construct temporaries in this
# language. Its code names nothing of the processor, so retarget() makes it any machine's.
LANGUAGE = (
    "-target x86_64-linux-musl "
    "-x cl -cl-std=CLC++2021 -cl-no-stdinc -nostdinc "
    "-Xclang -cl-ext=+cl_khr_fp16,+__cl_clang_function_pointers,+__cl_clang_bitfields,"
    "-cl_khr_fp64,-__opencl_c_fp64 "
    "-Xclang -fnative-half-type -fsigned-char "
    "-Xclang -ffloat16-excess-precision=none -Xclang -fbfloat16-excess-precision=none "
    "-flax-vector-conversions=none -Wno-everything -O2 -g1 -fPIC -fstack-clash-protection "
    "-fsanitize=safe-stack -Xclang -disable-llvm-passes"
).split()
CHECKED = (
    "-DMG_CHECKED=1 -Xclang -ffake-address-space-map "
    "-fsanitize=signed-integer-overflow,shift,array-bounds "
    "-fsanitize-recover=signed-integer-overflow,shift,array-bounds"
).split()
# Arrays of a thread lie on a stack of their own (runtime/memory.cpp), so that a write past the end
# of one, which a GPU survives, does not change a saved pointer.
CODE = (
    "-O2 -g1 -fPIC -fno-stack-protector -Wno-everything -mllvm -safestack-use-pointer-address "
    "-mllvm -jump-threading-threshold=0"  # a threaded jump would miss where lanes meet
).split()
# Of a first round of optimisation. An access to several elements at once would keep a variable from
# becoming registers in the second.
SCALAR = ["-fno-slp-vectorize", "-fno-vectorize"]
RUNTIME_FLAGS = (
    "-x c++ -std=c++20 -ffreestanding -nostdinc -nostdinc++ -fno-exceptions -fno-rtti "
    "-fno-threadsafe-statics -mno-red-zone -fno-stack-protector -O3 -fPIC -fvisibility=hidden"
).split()


@functools.lru_cache(maxsize=1)
def zig() -> Path:
    """The zig program. Raises MissingToolchain when the package is absent or another version."""
    spec = importlib.util.find_spec("ziglang")
    if spec is None or not spec.submodule_search_locations:
        raise MissingToolchain(
            "the simulator needs the package 'ziglang' (its C++ compiler), which is not installed; "
            "run: pip install 'metalgen[simulator]'"
        )
    program = Path(next(iter(spec.submodule_search_locations))) / "zig"
    if not program.exists():
        program = program.with_suffix(".exe")
    if not program.exists():
        raise MissingToolchain(f"the package 'ziglang' has no program 'zig' in {program.parent}")
    return program


def link(objects: Sequence[str], output: str) -> list[str]:
    """The arguments that link `objects` to a shared object. On macOS: best effort, untested."""
    if platform.system() == "Darwin":
        return ["cc", "-shared", "-o", output, *objects]
    return ["ld.lld", "-shared", "-o", output, *objects]


def run(arguments: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs zig with `arguments` in `cwd`. Raises MissingToolchain when it cannot start."""
    try:
        return subprocess.run(
            [str(zig()), *arguments], cwd=cwd, capture_output=True, text=True, errors="replace"
        )
    except OSError as error:
        raise MissingToolchain(f"the compiler {zig()} does not start: {error}") from error


def is_x86(machine: Sequence[str]) -> bool:
    """Whether the flags of `machine` mean x86-64."""
    target = (
        machine[machine.index("-target") + 1]
        if "-target" in machine
        else platform.machine().lower()
    )
    return target.startswith(("x86_64", "amd64"))


def retarget(code: str) -> str:
    """LLVM assembly of the language stage without what names its target."""
    code = re.sub(r"^target (?:datalayout|triple) = .*$", "", code, flags=re.MULTILINE)
    return re.sub(
        r' "(?:target-cpu|target-features|tune-cpu|min-legal-vector-width)"="[^"]*"', "", code
    )


@functools.lru_cache(maxsize=1)
def machine_flags() -> tuple[str, ...]:
    """Flags for this machine's instructions."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64"):
        try:
            flags = set(
                Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n")[0].split()
            )
        except (OSError, IndexError):
            flags = set()
        return ("-march=x86-64-v3",) if {"avx2", "fma", "f16c", "bmi2"} <= flags else ("-mcx16",)
    return ()
