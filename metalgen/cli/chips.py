"""``metalgen chips``: the chips that metalgen knows."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from metalgen.cli.options import columns, json_option, print_json


@click.command()
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the chips that metalgen knows, or the facts of the one NAMED, with their sources."""
    from metalgen.chips import all_chips, detect, get_chip

    if name:
        _show(get_chip(name), as_json)
        return
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
    if as_json:
        print_json(_facts(chip) | {"origins": origins})
        return
    click.echo(f"{chip.name}: {chip}")
    rows = []
    for name, value in _facts(chip).items():
        origin = origins.get(name)
        source = "" if origin is None else origin["source"]
        if origin and origin["estimated"]:
            source = f"estimated: {source}"
        rows.append((name, _figure(value), source))
    for line in columns(rows):
        click.echo("  " + line)


def _facts(chip: Any) -> dict[str, Any]:
    return {f.name: getattr(chip, f.name) for f in dataclasses.fields(chip) if f.name != "origins"}


def _figure(value: object) -> str:
    return "unknown" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
