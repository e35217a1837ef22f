"""``metalgen check FILE.metal``: whether its kernels compile, and how one of them runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalgen.errors import MetalgenError
from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.simulator.checking import KernelCheck, SourceCheck
    from metalgen.simulator.findings import Findings
    from metalgen.simulator.launch import Recorder

MOST_ERRORS = 10
"""Different errors of one file that are printed."""


def compile_all(
    file: Path, source: str, kernel: str | None, folders: list[Path]
) -> tuple[str, Findings, str]:
    """Compile the kernels of a file, or the one named.

    Returns:
        What there is in words, the lints, and what does not compile, with the lines of the file.
    """
    from metalgen.simulator.checking import check_source
    from metalgen.simulator.compiler import SOURCE_NAME
    from metalgen.simulator.findings import Findings

    check = check_source(source, kernels=[kernel] if kernel else None, include_dirs=folders)
    findings = Findings(check.findings, {SOURCE_NAME: source})
    errors = [each for each in check.kernels if each.error]
    if check.error:
        return "", findings, of_file(check.error, file)
    if not check.kernels:
        return (
            "",
            findings,
            f"{file}: the file has no kernel that a host could call" + _uninstantiated(check),
        )
    words = [f"{counted(len(check.kernels) - len(errors), 'kernel')} compiled"]
    if refused := [each for each in errors if each.refused]:
        words.append(f"{len(refused)} not executed here")
    if check.failed:
        words.append(f"{len(check.failed)} wrong")
    parts = [_note(each) for each in refused]
    parts += _distinct(file, check.failed)
    failure = "\n".join(parts) if check.failed or (kernel and errors) else ""
    return ", ".join(words), findings, failure


def _uninstantiated(check: SourceCheck) -> str:
    if not check.templates:
        return ""
    return f" (templates without an instantiation: {', '.join(check.templates)})"


def _note(check: KernelCheck) -> str:
    return f"not executed: {check.error}"


def _distinct(file: Path, failed: tuple[KernelCheck, ...]) -> list[str]:
    """One text for each error, with the kernels that have it."""
    by_error: dict[str, list[KernelCheck]] = {}
    for each in failed:
        by_error.setdefault(each.error.split("\n")[0], []).append(each)
    parts = []
    for same in list(by_error.values())[:MOST_ERRORS]:
        names = ", ".join(each.name for each in same[:3])
        more = f" and {len(same) - 3} more" if len(same) > 3 else ""
        parts.append(f"{names}{more}: {of_file(same[0].error, file)}")
    if len(by_error) > MOST_ERRORS:
        parts.append(f"and {counted(len(by_error) - MOST_ERRORS, 'other error')}")
    return parts


def of_file(text: str, file: Path) -> str:
    """``text`` with the name of the file where it has the simulator's name for a source."""
    from metalgen.simulator.compiler import SOURCE_NAME

    return re.sub(rf"(?<![\w/]){re.escape(SOURCE_NAME)}(?=:\d)", lambda _: str(file), text)


def launch(
    file: Path, source: str, kernel: str | None, described: Path, folders: list[Path], seed: int
) -> tuple[Recorder, str, str]:
    """Run a kernel as a launch file says; the launches, what is wrong with outputs, a failure."""
    from metalgen.simulator import record
    from metalgen.simulator.launch_file import LaunchFile

    given = LaunchFile.read(described)
    chosen = kernel or given.kernel
    if chosen is None:
        raise click.UsageError("--kernel: expected the name of a kernel with --launch")
    with record(checked=True, seed=seed) as runs:
        try:
            wrong = given.run(source, chosen, folders)
        except MetalgenError as error:
            return runs, "", of_file(str(error), file)
    return runs, "\n".join([*wrong, *given.unwritten(runs[0].counters)]), ""
