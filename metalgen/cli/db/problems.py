"""``metalgen db``: the rows of one problem, and its pin."""

from __future__ import annotations

import json

import click

from metalgen.cli.options import (
    Sizes,
    chip_option,
    columns,
    config_options,
    json_option,
    milliseconds,
    print_json,
    problem_fields,
)
from metalgen.errors import ArgumentError
from metalgen.plurals import counted
from metalgen.problem.config import AttentionConfig


@click.command("show")
@config_options
@chip_option("Only this chip's rows.")
@json_option
def show(config: AttentionConfig, sizes: Sizes, chip: str | None, as_json: bool) -> None:
    """List your rows of one problem, the best first."""
    from metalgen.chips import get_chip
    from metalgen.database.store import Store
    from metalgen.database.winners import ordered
    from metalgen.source.hashes import present_templates

    problem = sizes.problem(config)
    with Store.open(read_only=True) as store:
        rows = store.measurements(problem, chip=get_chip(chip).name if chip else None)
    current = present_templates()
    groups = ([m for m in rows if (m.template_hash in current) is now] for now in (True, False))
    rows = [m for group in groups for m in sorted(ordered(group), key=lambda m: not m.verified)]
    if as_json:
        print_json({"problem": problem_fields(problem), "rows": [m.to_record() for m in rows]})
        return
    click.echo(f"{problem}: {counted(len(rows), 'row')}")
    cells = [
        (
            m.chip,
            milliseconds(m.seconds),
            m.provenance,
            m.phase,
            "checked" if m.verified else m.status,
            m.template_hash,
            str(m.schedule),
        )
        for m in rows
    ]
    for line in columns(cells):
        click.echo("  " + line)


@click.command("pin")
@config_options
@chip_option("Chip whose limits the schedule must respect. Default: an Apple GPU.")
@click.option("--schedule", "text", required=True, metavar="JSON", help="As --json shows them.")
@click.option("--note", default="", help="Note stored with the pin.")
@json_option
def pin(
    config: AttentionConfig, sizes: Sizes, chip: str | None, text: str, note: str, as_json: bool
) -> None:
    """Make look-ups of a problem answer with a schedule, for A/B tests."""
    from metalgen.chips import get_chip
    from metalgen.database.store import Store
    from metalgen.families import APPLE, check_schedule, decode_schedule

    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError("--schedule", "a JSON object", text[:80]) from error
    problem = sizes.problem(config)
    limits = get_chip(chip).limits if chip else APPLE
    schedule = decode_schedule(fields, problem.family, limits.language)
    check_schedule(config, schedule, limits)
    with Store.open() as store:
        store.pin(problem, schedule, note)
    if as_json:
        pinned = {"pinned": True, "schedule": schedule.to_dict(), "note": note}
        print_json({"problem": problem_fields(problem)} | pinned)
        return
    click.echo(f"Pinned {problem} to {schedule}; `metalgen db unpin` undoes it.")


@click.command("unpin")
@config_options
@json_option
def unpin(config: AttentionConfig, sizes: Sizes, as_json: bool) -> None:
    """Undo `metalgen db pin`."""
    from metalgen.database.store import Store

    problem = sizes.problem(config)
    with Store.open() as store:
        was_pinned = store.unpin(problem)
    if as_json:
        print_json({"problem": problem_fields(problem), "was_pinned": was_pinned, "pinned": False})
    elif was_pinned:
        click.echo(f"Unpinned {problem}: look-ups answer with its best row again.")
    else:
        click.echo(f"{problem} was not pinned.")
