"""Checks whole Metal sources: does every kernel compile, and what would Apple's compiler refuse?"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalgen.simulator.errors import CompileError

if TYPE_CHECKING:
    from metalgen.simulator.compiler.language import LanguageStage
    from metalgen.simulator.findings import Finding


@dataclass(frozen=True)
class KernelCheck:
    """One kernel of a source: ``error`` says why it does not compile, "" if it does.

    ``refused`` is true where Metal has it and the simulator does not: textures, graphics. ``line``
    counts in the source, None if it is not known.
    """

    name: str
    error: str = ""
    line: int | None = None
    refused: bool = False


@dataclass(frozen=True)
class SourceCheck:
    """What ``check_source`` found: every kernel that a host can call, and lints.

    ``templates`` are kernels that nothing in the source instantiates; ``error``, if the source
    cannot be read as far as its kernels, the reason.
    """

    kernels: tuple[KernelCheck, ...] = ()
    templates: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    error: str = ""

    @property
    def failed(self) -> tuple[KernelCheck, ...]:
        """The kernels that are wrong, without those that the simulator does not take."""
        return tuple(each for each in self.kernels if each.error and not each.refused)


def check_source(
    source: str,
    *,
    kernels: Sequence[str] | None = None,
    constants: Mapping[int | str, Any] | None = None,
    include_dirs: Sequence[str | Path] = (),
    lints: bool = True,
    every: bool = True,
) -> SourceCheck:
    """Compile every kernel of a Metal translation unit, or those that ``kernels`` names.

    Unless ``every``, one instantiation of each template of kernels stands for all of them.
    Nothing is executed. Kernels are checked together, and apart only where that fails. Raises
    ``MissingToolchain``.
    """
    from metalgen.simulator.compiler import cache, toolchain
    from metalgen.simulator.compiler.language import LanguageStage, preprocess
    from metalgen.simulator.lints import lint

    folders = [str(Path(folder).resolve()) for folder in include_dirs]
    with tempfile.TemporaryDirectory(dir=cache.directory(), prefix="check-") as name:
        folder = Path(name)
        try:
            text = preprocess(source, folder, folders)
            stage = LanguageStage(
                text, folder, "plain", dict(constants or {}), toolchain.machine_flags()
            )
            found = stage.transformed()
        except CompileError as error:
            return SourceCheck(error=str(error))
        instantiated = {each.kernel.split("::")[-1] for each in found.instantiations.values()}
        plain = [full for full, kernel in found.kernels.items() if not kernel.template]
        templates = tuple(
            full
            for full, kernel in found.kernels.items()
            if kernel.template and kernel.name not in instantiated
        )
        # One instantiation of each template says what there is to say of it.
        first = {i.kernel: name for name, i in reversed(found.instantiations.items())}
        chosen = found.instantiations if every else first.values()
        names = [*plain, *chosen] if kernels is None else list(kernels)
        wrong = _wrong(stage, names)
    checks = [
        KernelCheck(each, str(wrong[each]), wrong[each].line)
        if each in wrong
        else KernelCheck(each)
        for each in names
    ]
    if kernels is None:
        checks += [
            KernelCheck(full, f"{full!r} {reason}", refused=True)
            for full, reason in found.refused.items()
        ]
    sound = [
        each
        for each in names
        if each not in wrong
        and (each not in found.instantiations or each in first.values() or kernels is not None)
    ]
    notes: tuple[Finding, ...] = ()
    if lints and sound:
        notes = lint(source, sound, constants=constants, include_dirs=include_dirs)
    return SourceCheck(tuple(checks), templates, notes)


def _wrong(stage: LanguageStage, names: Sequence[str]) -> dict[str, CompileError]:
    """The kernels of ``names`` that do not compile, with the error of each."""
    if not names:
        return {}
    try:
        stage.check(*names)
    except CompileError as error:
        if len(names) == 1:
            return {names[0]: error}
        half = len(names) // 2
        return _wrong(stage, names[:half]) | _wrong(stage, names[half:])
    return {}
