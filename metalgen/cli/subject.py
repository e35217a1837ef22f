"""What `metalgen check` checked: its launches, what is wrong with them, and how that is printed."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.locating import line_in
from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.simulator import Finding, Findings, Launch

CLEAN, FINDINGS, COULD_NOT_RUN = 0, 1, 2


@dataclasses.dataclass
class Subject:
    """One thing that was checked: a schedule or a file, its launches and what went wrong."""

    title: str
    launches: Sequence[Launch]
    wrong: str = ""
    """How its numbers differ from the float64 reference."""
    failure: str = ""
    """Why it could not run."""
    files: tuple[Path, ...] = ()
    """The Python file that was run, and those that it imported, or the Metal file."""
    kernels: str = ""
    """How many kernels of a Metal file compiled, in words."""
    lints: Findings | None = None
    """What Apple's compiler would refuse in a Metal file that was only compiled."""

    @property
    def findings(self) -> int:
        launched = sum(len(launch.findings or ()) for launch in self.launches)
        return launched + len(self.lints or ())

    @property
    def exit_code(self) -> int:
        if self.failure:
            return COULD_NOT_RUN
        return FINDINGS if self.findings or self.wrong else CLEAN

    def place(self, launch: Launch, finding: Finding) -> tuple[Path, int] | None:
        """The Python file and its line that a finding is on, where that can be told."""
        source = launch.findings.sources.get(finding.file or "") if launch.findings else None
        if source is None or not finding.line:
            return None
        program = source.split("\n")
        for file in self.files:
            if line := line_in(_lines(file), program, finding.line):
                return file, line
        return None

    def before(self, launch: Launch, finding: Finding) -> str:
        """The same as text that stands before a finding."""
        place = self.place(launch, finding)
        return f"{place[0]}:{place[1]}: " if place else ""

    def written(self, launch: Launch, finding: Finding) -> dict[str, Any]:
        """The same for JSON, of a file that was run."""
        if not self.files:
            return {}
        place = self.place(launch, finding)
        return {"written": {"file": str(place[0]), "line": place[1]} if place else None}

    def as_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "exit_code": self.exit_code,
            "wrong": self.wrong,
            "failure": self.failure,
            "lints": [finding.as_dict() for finding in self.lints or ()],
            "launches": [
                {
                    "kernel": launch.kernel,
                    "grid": launch.grid,
                    "threadgroup": launch.threadgroup,
                    "findings": [
                        finding.as_dict() | self.written(launch, finding)
                        for finding in launch.findings or ()
                    ],
                    "counters": launch.counters.as_dict() if launch.counters else None,
                }
                for launch in self.launches
            ],
        }


@functools.cache
def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:  # removed meanwhile
        return []


def show(subject: Subject, counters: bool) -> None:
    """Print what was found, with the source around it."""
    words = [subject.kernels or counted(len(subject.launches), "launch", "launches")]
    words += [counted(subject.findings, "finding")]
    words += ["wrong numbers"] if subject.wrong else []
    words += ["could not run"] if subject.failure else []
    mark = {CLEAN: "clean", FINDINGS: "FOUND", COULD_NOT_RUN: "ERROR"}[subject.exit_code]
    click.echo(f"{mark}  {subject.title}  ({', '.join(words)})")
    if subject.lints:
        click.echo("\n" + subject.lints.report())
    for launch in subject.launches:
        if launch.findings:
            click.echo(f"\n{launch.kernel}, grid {launch.grid}, threadgroup {launch.threadgroup}:")
            click.echo(launch.findings.report(place=functools.partial(subject.before, launch)))
    for text in (subject.wrong, subject.failure):
        if text:
            click.echo(f"\n{text}", err=text is subject.failure)
    if counters:
        from rich.console import Console

        console = Console(file=sys.stdout)
        for launch in subject.launches:
            if launch.counters is not None:
                click.echo(f"\n{launch.kernel}, grid {launch.grid}")
                with console.capture() as drawn:
                    console.print(launch.counters)
                click.echo(drawn.get(), nl=False)
