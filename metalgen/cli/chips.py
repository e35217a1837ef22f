"""``metalgen chips``: the chips that metalgen knows, and the model of their time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.options import columns, echo_table, json_option, print_json
from metalgen.errors import ArgumentError

if TYPE_CHECKING:
    from metalgen.chips.tables import Row


TABLE = click.Path(exists=True, dir_okay=False, path_type=Path)


class NameOrCommand(click.Group):
    """A group that takes the name of a chip for ``show`` of that chip."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            return "show", self.commands["show"], args
        return super().resolve_command(ctx, args)


@click.group(cls=NameOrCommand, invoke_without_command=True)
@json_option
@click.pass_context
def command(ctx: click.Context, as_json: bool) -> None:
    """List the chips that metalgen knows; show one, fit the chip model, or score it."""
    ctx.obj = as_json
    if ctx.invoked_subcommand is None:
        _list(as_json)


@command.command("list")
@json_option
@click.pass_obj
def list_(outer: bool, as_json: bool) -> None:
    """List the chips that metalgen knows, as `metalgen chips` does."""
    _list(as_json or outer)


@command.command(short_help="Show the facts of a chip, each with its source.")
@click.argument("name")
@json_option
@click.pass_obj
def show(outer: bool, name: str, as_json: bool) -> None:
    """Show the facts of the chip NAME, each with its source, and what the model lacks."""
    from metalgen.chips import get_chip

    _show(get_chip(name), as_json or outer)


@command.command(short_help="Fit the chip model's coefficients to measured times.")
@click.option("--tiles", type=TABLE, help="Tiles of metal-flash-attention by head dimension.")
@click.option("--published", type=TABLE, help="Published times of attention.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the fitted values there, as metalgen/chips/fitted.py.",
)
@json_option
@click.pass_obj
def fit(
    outer: bool, tiles: Path | None, published: Path | None, output: Path | None, as_json: bool
) -> None:
    """Fit the chip model's coefficients to measured times, the same way each time.

    Without --output nothing is written.
    """
    from metalgen.chips import fitting
    from metalgen.chips.coefficients import DEFAULT, FITTED, PRIOR

    rows = _read(tiles, published)
    samples = [row.sample for row in rows if row.sample is not None]
    values = fitting.rounded(fitting.fit(samples))
    if output is not None:
        output.write_text(fitting.as_module(values), encoding="utf-8")
    if as_json or outer:
        print_json(values)
        return
    click.echo(f"{len(samples)} of {len(rows)} rows, {len(FITTED)} coefficients")
    table = [("coefficient", "before any fit", "fitted", "in use")]
    table += [
        (name, f"{getattr(PRIOR, name):g}", f"{value:g}", f"{getattr(DEFAULT, name):g}")
        for name, value in values.items()
    ]
    for line in columns(table):
        click.echo(line)
    if output is not None:
        click.echo(f"written to {output}")


@command.command()
@click.option("--tiles", type=TABLE, help="Tiles of metal-flash-attention by head dimension.")
@click.option("--published", type=TABLE, help="Published times of attention.")
@json_option
@click.pass_obj
def validate(outer: bool, tiles: Path | None, published: Path | None, as_json: bool) -> None:
    """Score the chip model against measured times.

    As it is shipped; fitted again without each head dimension and without each chip, on what was
    left out; and beside two baselines. With --json, the first on standard output and the others on
    standard error.
    """
    from metalgen.chips import report, scoring
    from metalgen.chips.coefficients import DEFAULT

    rows = _read(tiles, published)
    if as_json or outer:
        scores = scoring.score(rows, scoring.shipped(rows, DEFAULT))
        print_json([one.to_dict() for one in scores])
    for line in report.lines(rows, DEFAULT):
        click.echo(line, err=as_json or outer)


def _read(tiles: Path | None, published: Path | None) -> list[Row]:
    from metalgen.chips.tables import read_published, read_tiles

    if tiles is None and published is None:
        raise ArgumentError("table", "--tiles FILE.csv, --published FILE.csv or both", None)
    rows = read_tiles(tiles) if tiles else []
    return rows + (read_published(published) if published else [])


def _list(as_json: bool) -> None:
    from metalgen.chips import all_chips, detect

    here = detect()
    if as_json:
        print_json(
            {
                "here": here.name if here else None,
                "chips": [_facts(chip) for chip in all_chips()],
            }
        )
        return
    rows = [("name", "chip", "cores", "GHz", "DRAM GB/s", "")]
    rows += [
        (
            chip.name,
            chip.product,
            str(chip.cores),
            _figure(chip.clock_ghz),
            _figure(chip.dram_gbs),
            "this machine" if here and chip.name == here.name else "",
        )
        for chip in all_chips()
    ]
    for line in columns(rows):
        click.echo(line)


def _show(chip: Any, as_json: bool) -> None:
    origins = {
        name: {"source": origin.source, "estimated": origin.estimated}
        for name, origin in chip.origins.items()
    }
    missing = _missing(chip)
    if as_json:
        print_json(_facts(chip) | {"origins": origins, "model_lacks": missing})
        return
    click.echo(f"{chip.name}: {chip}")
    rows = []
    for name, value in _facts(chip).items():
        origin = origins.get(name)
        source = "" if origin is None else origin["source"]
        if origin and origin["estimated"]:
            source = f"estimated: {source}"
        rows.append((name, _figure(value), source))
    echo_table(rows, "  ")
    if missing:
        click.echo(f"  The chip model does not cover it: it lacks {', '.join(missing)}.")


def _missing(chip: Any) -> list[str]:
    from metalgen.chips import IncompleteChip
    from metalgen.chips.model import require_figures

    try:
        require_figures(chip)
    except IncompleteChip as error:
        return list(error.missing)
    return []


def _facts(chip: Any) -> dict[str, Any]:
    return {f.name: getattr(chip, f.name) for f in dataclasses.fields(chip) if f.name != "origins"}


def _figure(value: object) -> str:
    return "unknown" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
