"""``metalgen report``: one HTML page about tuning records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalgen.cli.options import chip_option, json_option, print_json
from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.database.exchange import Summary

FILE = click.Path(path_type=Path)
REASONS = 5
"""Rows left out of which the reason is printed."""


@click.command()
@click.argument("files", nargs=-1, type=FILE)
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("report.html"),
    show_default=True,
    metavar="PAGE",
    help="Page to write; - for standard output.",
)
@chip_option("Only this chip's rows.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, files: tuple[Path, ...], output: Path, chip: str | None, as_json: bool
) -> None:
    """Write one HTML page about the rows of FILES, or of your database.

    FILE is a database or a file of records (JSON lines). The page needs no network and no script.
    """
    from metalgen.chips import get_chip
    from metalgen.report.page import render, write_report
    from metalgen.report.results import results
    from metalgen.report.sources import read_sources
    from metalgen.report.writing import check_target

    name = get_chip(chip).name if chip else None
    to_output = str(output) == "-" and not as_json
    if not to_output:
        check_target(output)
    sources = read_sources(files, name)
    show = _show_progress if sys.stderr.isatty() else None
    if to_output:
        click.echo(render(sources, results(sources), show).encode("utf-8", "replace"), nl=False)
        ctx.exit(1 if sources.summary.rejected else 0)
    found = write_report(output, sources, show)
    kinds = {kind: sum(r.provenance == kind for r in found) for kind in ("measured", "modelled")}
    if as_json:
        print_json(
            {
                "page": str(output),
                "bytes": output.stat().st_size,
                "sources": sources.names,
                "rows": len(sources.rows),
                "left_out": sources.summary.rejected,
                "results": kinds,
            }
        )
    else:
        told = " and ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
        noun = "result" if sum(kinds.values()) == 1 else "results"
        click.echo(f"{output}: {told} {noun} from {counted(len(sources.rows), 'row')}")
        say_left_out(sources.summary)
    ctx.exit(1 if sources.summary.rejected else 0)


def say_left_out(summary: Summary) -> None:
    """Print how many rows were left out, and the first reasons."""
    if summary.rejected:
        click.echo(f"  left out: {counted(summary.rejected, 'row')}, such as")
    for file, place, reason in summary.reasons[:REASONS]:
        click.echo(f"    {file}: {place}: {reason}")


def _show_progress(done: int, total: int) -> None:
    click.echo(f"\r{done} of {total} results drawn", nl=done == total, err=True)
