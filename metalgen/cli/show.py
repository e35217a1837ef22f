"""``metalgen show``: what the tuning database holds."""

from __future__ import annotations

from typing import Any

import click

from metalgen.cli.options import (
    chip_option,
    echo_table,
    json_option,
    milliseconds,
    print_json,
    problem_cells,
    problem_fields,
    ratio,
)
from metalgen.database.measurement import Measurement
from metalgen.plurals import counted

AFTER_EDIT = "`metalgen db refresh` keeps those whose kernel source is unchanged"


@click.command()
@chip_option("Only this chip's rows.")
@json_option
def command(chip: str | None, as_json: bool) -> None:
    """Show the winners in your database against the default schedule, and how many rows it has.

    A winner is the best row of a problem on a chip that was checked against the reference under
    the present templates; a measured one comes before any modelled one.
    """
    from metalgen.chips import get_chip
    from metalgen.database.errors import MissingDatabase
    from metalgen.database.layout import user_database
    from metalgen.database.store import Store
    from metalgen.database.winners import winners
    from metalgen.source.hashes import named_hashes

    name = get_chip(chip).name if chip else None
    current = named_hashes()
    try:
        with Store.open(read_only=True) as store:
            rows = store.measurements(chip=name)
            path = store.path
    except MissingDatabase:
        rows, path = [], user_database()
    best = winners([m for m in rows if m.template_hash in current.values()])
    others = sum(m.template_hash not in current.values() for m in rows)
    if as_json:
        print_json(
            {
                "database": str(path),
                "template_hashes": current,
                "rows": len(rows),
                "rows_by_kind": _kinds(rows),
                "rows_of_other_templates": others,
                "winners": [_fields(m) for m in best],
            }
        )
        return
    if not rows:
        about = f" about {name}" if name else ""
        click.echo(f"{path}: no rows{about} yet; `metalgen tune --chip M3Max` makes some.")
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in _kinds(rows).items())
    click.echo(f"{path}: {counted(len(rows), 'row')} ({kinds})")
    if others:
        rows_of_others = counted(others, "row")
        click.echo(f"{rows_of_others} from other template versions, ignored; {AFTER_EDIT}.")
    header = ("chip", "problem", "sizes", "best", "default", "gain", "MLX", "times", "schedule")
    lines = [
        (
            m.chip,
            *problem_cells(m.problem),
            milliseconds(m.seconds),
            milliseconds(m.default_seconds),
            ratio(m.default_seconds, m.seconds),
            milliseconds(m.mlx_seconds),
            m.provenance,
            str(m.schedule),
        )
        for m in best
    ]
    if lines:
        echo_table([header, *lines])
    else:
        click.echo("No row has passed its check, so none can be dispatched.")


def _kinds(rows: list[Measurement]) -> dict[str, int]:
    kinds: dict[str, int] = {}
    for m in rows:
        kind = f"{m.provenance} {'checked' if m.verified else m.status}"
        kinds[kind] = kinds.get(kind, 0) + 1
    return dict(sorted(kinds.items()))


def _fields(m: Measurement) -> dict[str, Any]:
    return problem_fields(m.problem) | {
        "chip": m.chip,
        "schedule": m.schedule.to_dict(),
        "provenance": m.provenance,
        "seconds": m.seconds,
        "default_seconds": m.default_seconds,
        "mlx_seconds": m.mlx_seconds,
        "error": m.error,
        "created": m.created,
    }
