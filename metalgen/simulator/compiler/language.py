"""The language stage: preprocessed Metal to LLVM assembly, by clang as C++ for OpenCL."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import CompileError
from . import bitcasts, build, toolchain
from .entry import Chosen, choose, entry
from .errors import TransformError
from .repair import diagnose, repair
from .transform import DEFAULT, Options, Transformed, transform

SOURCE_NAME = "program.metal"  # what the user's text is called in diagnostics and line tables
_ROUNDS = 6  # of repairs; each may show what the one before hid

# What the errors of a first attempt say of the options that a source needs; see transform.Options.
_NEEDS = {
    "thorough": r"from vector|excess elements|reinterpretation of bits",
    "merged": r"cannot bind reference in address space '(__)?constant'",
    "generic_this": r"cannot initialize object parameter of type|'this' argument has type"
    r"|address space mismatch in argument",
}
_DIAGNOSTIC = re.compile(r"^(\S[^:\n]*):(\d+):(\d+): (?:fatal )?error: (.*)$", re.MULTILINE)


def preprocess(source: str, folder: Path, include_dirs: Iterable[str] = ()) -> str:
    """Metal `source` with its includes and macros resolved, by clang, in `folder`."""
    (folder / SOURCE_NAME).write_text(source)
    arguments = [
        "clang",
        *"-E -x c++ -std=c++17 -undef -nostdinc -nostdinc++ -DMG_MACROS_ONLY".split(),
        *"-D__cpp_variable_templates=201304L -Wno-everything -include metal_config".split(),
        "-I",
        str(toolchain.INCLUDE),
    ]
    for path in include_dirs:
        arguments += ["-I", path]
    done = toolchain.run([*arguments, SOURCE_NAME], folder)
    if done.returncode != 0:
        raise compile_error(done.stderr)
    return done.stdout


@dataclass(frozen=True)
class Language:
    """What the language stage makes of one kernel: `code` is LLVM assembly before optimisation."""

    unit: Transformed
    chosen: Chosen
    code: str


@dataclass
class _Attempt:
    """One try: its text, what was chosen in it, and what clang says of it ("" if it compiles)."""

    unit: Transformed
    chosen: Sequence[Chosen]
    text: str
    stderr: str
    stdout: str
    options: Options

    @property
    def errors(self) -> int:
        return len(set(_DIAGNOSTIC.findall(self.stderr))) or int(bool(self.stderr))


class LanguageStage:
    """Compiles kernels of one preprocessed source in `folder`."""

    def __init__(
        self,
        preprocessed: str,
        folder: Path,
        mode: str,
        constants: Mapping[str | int, object],
        machine: build.Machine,
    ) -> None:
        self.preprocessed = preprocessed
        self.folder = folder
        self.constants = constants
        self.arguments = [
            "clang",
            *build.language_flags(mode, machine),
            "-include-pch",
            str(build.headers(mode, machine)),
        ]
        self.output = ["-S", "-emit-llvm", "-o", "unit.ll"]

    def transformed(self, options: Options = DEFAULT) -> Transformed:
        """The source as C++ for OpenCL. Raises CompileError."""
        try:
            return transform(self.preprocessed, self.constants, options)
        except TransformError as error:
            raise _located(error) from None

    def compile(self, *kernels: str) -> Language:
        """The kernels `kernels` as one unit, whose first entry point is mg_kernel.

        Raises CompileError.
        """
        tried: set[Options] = set()
        best = self._settled(kernels, tried)
        code = (self.folder / "unit.ll").read_text()
        bad = bitcasts.find_reinterpretation(code)
        if bad is not None:
            attempt = self._again(best, kernels, tried)
            if attempt is None:
                message = f"{SOURCE_NAME}:{bad[0]}: {bad[1]}"
                raise CompileError(message, file=SOURCE_NAME, line=bad[0] or None)
            best, code = attempt, (self.folder / "unit.ll").read_text()
        return Language(best.unit, best.chosen[0], code)

    def syntax_tree(self, *kernels: str) -> str:
        """clang's dump of the syntax tree of the kernels `kernels`. Raises CompileError."""
        self.output = ["-fsyntax-only", "-Xclang", "-ast-dump"]
        return self._settled(kernels, set()).stdout

    def check(self, *kernels: str) -> None:
        """Raises CompileError if one of the kernels `kernels` does not compile."""
        self.output = ["-fsyntax-only"]
        self._settled(kernels, set())

    def _settled(self, kernels: Sequence[str], tried: set[Options]) -> _Attempt:
        """The attempt that compiles. Raises CompileError where none does.

        What C++ for OpenCL refuses and Metal takes is repaired, as far as clang's own messages say
        it. The error is that of the attempt with the fewest: what others solved is none.
        """
        best = self._attempt(Options(), kernels)
        tried.add(best.options)
        while best.errors:
            wanted = _wanted(best)
            if wanted in tried:
                break
            tried.add(wanted)
            attempt = self._repaired(self._attempt(wanted, kernels))
            if attempt.errors >= best.errors:
                break
            best = attempt
        best = self._repaired(best)
        if best.errors:
            raise compile_error(best.stderr)
        return best

    def _again(
        self, best: _Attempt, kernels: Sequence[str], tried: set[Options]
    ) -> _Attempt | None:
        """An attempt that is thorough, where the one before reinterpreted bits."""
        wanted = replace(best.options, thorough=True)
        if wanted in tried:
            return None
        attempt = self._repaired(self._attempt(wanted, kernels))
        if attempt.errors:
            return None
        code = (self.folder / "unit.ll").read_text()
        return attempt if bitcasts.find_reinterpretation(code) is None else None

    def _attempt(self, options: Options, kernels: Sequence[str]) -> _Attempt:
        unit = self.transformed(options)
        try:
            chosen = [choose(unit, kernel) for kernel in kernels]
        except TransformError as error:
            raise _located(error) from None
        names = ["mg_kernel", *(f"mg_kernel_{n}" for n in range(1, len(chosen)))]
        entries = [entry(each, name) for each, name in zip(chosen, names, strict=True)]
        text = unit.text + "".join(entries)
        return _Attempt(unit, chosen, text, *self._clang(text), options)

    def _clang(self, text: str) -> tuple[str, str]:
        """What clang says of `text`, and what it prints, if it compiles."""
        (self.folder / "unit.cl").write_text(text)
        done = toolchain.run([*self.arguments, *self.output, "unit.cl"], self.folder)
        if done.returncode == 0:
            return "", done.stdout
        return done.stderr or "the compiler failed and said nothing", ""

    def _repaired(self, attempt: _Attempt) -> _Attempt:
        for _ in range(_ROUNDS):
            if not attempt.errors:
                break
            text = repair(attempt.text, diagnose(attempt.text, self.arguments, self.folder))
            if text is None:
                break
            stderr, stdout = self._clang(text)
            attempt = replace(attempt, text=text, stderr=stderr, stdout=stdout)
        return attempt


def _wanted(attempt: _Attempt) -> Options:
    """The options that the errors of `attempt` ask for, with those that it had."""
    needed = {name: True for name, why in _NEEDS.items() if re.search(why, attempt.stderr)}
    return replace(attempt.options, **needed)


def _located(error: TransformError) -> CompileError:
    at = f"{SOURCE_NAME}:{error.line}: " if error.line else ""
    return CompileError(at + str(error), file=SOURCE_NAME, line=error.line or None)


def compile_error(text: str) -> CompileError:
    """The exception for what clang said, in Metal's words and with the user's line."""
    text = text.replace("__global", "device").replace("__local", "threadgroup")
    text = text.replace("__private", "thread").replace("__constant", "constant")
    text = re.sub(r"static assertion failed due to requirement '.*?': ", "", text)
    text = shorten(text)
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


def shorten(text: str, lines: int = 40, width: int = 300) -> str:
    """The first `lines` lines of `text`, none longer than `width` (macros make very long ones)."""
    kept = [t if len(t) <= width else t[:width] + " ..." for t in text.splitlines()]
    return "\n".join(kept[:lines] + (["..."] if len(kept) > lines else []))
