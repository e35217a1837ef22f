"""The live progress of a tuning run, on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import click

from metalgen.cli.options import duration, milliseconds, problem_cells, ratio
from metalgen.tuning.progress import Observer, Progress


def status(p: Progress) -> list[str]:
    """What a user sees of a run at a moment, as a few short lines."""
    kind = "modelled" if p.modelled else "measured"
    verbs = {
        "ranking": "ranking by the chip model",
        "measuring": "measuring",
        "checking": "checking the best against float64",
        "finals": "racing the best against the default and MLX",
        "done": "done",
    }
    return [
        f"{p.number}/{p.problems}  {'  '.join(problem_cells(p.problem))}",
        f"  {verbs[p.phase]}: {p.valid} valid, {p.tried} tried of {p.goal}",
        f"  best {milliseconds(p.best_seconds)}, default {milliseconds(p.default_seconds)}, "
        f"{ratio(p.default_seconds, p.best_seconds)} ({kind})",
        f"  time left: {duration(p.left)}",
    ]


def summary(p: Progress) -> str:
    """A finished problem in one line."""
    return (
        f"{p.number}/{p.problems}  {'  '.join(problem_cells(p.problem))}: {p.valid} valid, "
        f"{p.tried} tried, best {milliseconds(p.best_seconds)}, default "
        f"{milliseconds(p.default_seconds)} ({ratio(p.default_seconds, p.best_seconds)}), "
        f"left {duration(p.left)}"
    )


@contextlib.contextmanager
def observer(quiet: bool) -> Iterator[Observer]:
    """An observer that shows progress: redrawn on a terminal, a line a problem elsewhere.

    Args:
        quiet: show nothing (for ``--json``, unless standard error is a terminal).
    """
    if sys.stderr.isatty():
        with _redrawn() as observe:
            yield observe
        return
    yield (lambda p: None) if quiet else _lines


def _lines(p: Progress) -> None:
    if p.phase == "done":
        click.echo(summary(p), err=True)


@contextlib.contextmanager
def _redrawn() -> Iterator[Observer]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    console = Console(stderr=True)
    with Live(console=console, refresh_per_second=8, transient=True) as live:

        def observe(p: Progress) -> None:
            done = float(p.number - 1 + (p.phase == "done"))
            if not p.modelled and p.phase != "done" and p.goal:
                done += min(1.0, p.tried / p.goal)
            first, *rest = status(p)
            live.update(
                Group(
                    Text(first, style="bold", no_wrap=True),
                    *(Text(line, no_wrap=True) for line in rest),
                    ProgressBar(total=p.problems, completed=done, width=48),
                )
            )

        yield observe
