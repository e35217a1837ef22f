"""What is built once a machine: the precompiled Metal headers, and the runtime's object file."""

from __future__ import annotations

import tempfile
from pathlib import Path

from ..errors import MissingToolchain
from . import cache, toolchain

MODES = {"plain": (), "checked": tuple(toolchain.CHECKED)}


def _once(name: str, arguments: list[str], key: str) -> Path:
    """The file that zig makes with `arguments` (+ an output path), from the cache or made now."""
    stem, _, suffix = name.partition(".")
    final = cache.directory() / f"{stem}-{key}.{suffix}"
    note = cache.read_note(final.with_suffix(".json"))
    if note is not None and cache.is_whole(final, note["digest"]):
        return final
    with tempfile.TemporaryDirectory(dir=final.parent, prefix="build-") as folder:
        made = Path(folder) / final.name
        done = toolchain.run([*arguments, "-o", str(made)], Path(folder))
        if done.returncode != 0:
            raise MissingToolchain(f"the simulator's {name} does not build here:\n{done.stderr}")
        cache.write_note(final.with_suffix(".json"), {"digest": cache.keep(made, final)})
    return final


Machine = tuple[str, ...]  # flags for the processor; see toolchain.machine_flags


def _key(mode: str, machine: Machine) -> str:
    return cache.digest(
        [cache.own_sources(), mode, str(toolchain.zig()), str(toolchain.INCLUDE), *machine]
    )[:20]


def language_flags(mode: str, machine: Machine) -> list[str]:
    """The flags that the headers and every kernel of a `mode` are compiled with."""
    return [*toolchain.LANGUAGE, *MODES[mode], *(machine if toolchain.is_x86(machine) else ())]


def headers(mode: str, machine: Machine) -> Path:
    """The precompiled Metal headers."""
    source = toolchain.INCLUDE / "mg_all.h"
    arguments = ["clang", *language_flags(mode, machine), "-c", "-Xclang", "-emit-pch"]
    arguments += ["-Xclang", "-fno-pch-timestamp", "-I", str(toolchain.INCLUDE), str(source)]
    return _once(f"headers-{mode}.pch", arguments, _key(mode, machine))


def runtime(mode: str, machine: Machine) -> Path:
    """The runtime's object file."""
    arguments = [
        "clang",
        *toolchain.RUNTIME_FLAGS,
        *machine,
        f"-DMG_CHECKED={int(mode == 'checked')}",
    ]
    arguments += ["-c", str(toolchain.RUNTIME / "runtime.cpp")]
    return _once(f"runtime-{mode}.o", arguments, _key(mode, machine))
