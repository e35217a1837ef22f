"""``metalgen render``: the Metal source of a kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from metalgen.cli.options import Sizes, chip_option, config_options, json_option, print_json
from metalgen.config import AttentionConfig
from metalgen.schedule import (
    APPLE,
    CHOICES,
    Schedule,
    check_schedule,
    default_schedule,
    padded,
)
from metalgen.targets import METAL, TARGETS, Target


def schedule_options(function: Any) -> Any:
    """One option a field of `Schedule`; the command gets those that were given, as ``changes``."""
    for field in reversed(dataclasses.fields(Schedule)):
        choices = CHOICES[field.name]
        kind: Any = int if isinstance(choices[0], int) else click.Choice(list(choices))
        function = click.option("--" + field.name.replace("_", "-"), type=kind)(function)
    return function


@click.command()
@config_options
@chip_option("Start from this chip's best schedule on record, and keep its limits.")
@schedule_options
@json_option
def command(
    config: AttentionConfig, sizes: Sizes, chip: str | None, as_json: bool, **changes: Any
) -> None:
    """Print the Metal source of a kernel.

    The schedule is the default one, or with --chip the best on record for it; options that name a
    field of the schedule change it.
    """
    from metalgen.chips import get_chip
    from metalgen.database.lookup import lookup
    from metalgen.render import render, template_hash

    found = get_chip(chip) if chip else None
    limits = found.limits if found else APPLE
    schedule, place = default_schedule(config, limits), "default"
    if found:
        hit = lookup(sizes.problem(config), found, template_hash("forward", limits.target))
        if hit:
            schedule, place = hit.schedule, f"{hit.place}, {hit.provenance}"
    given = {name: value for name, value in changes.items() if value is not None}
    if given:
        schedule = change(config, schedule, given, TARGETS[limits.target])
        place += ", changed"
    check_schedule(config, schedule, limits)
    source = render(config, schedule, limits.target)
    if as_json:
        print_json(
            {
                "config": config.to_dict(),
                "schedule": schedule.to_dict(),
                "place": place,
                "template_hash": template_hash("forward", limits.target),
                "target": limits.target,
                "name": source.name,
                "inputs": list(source.inputs),
                "outputs": list(source.outputs),
                "threads": source.threads,
                "math_mode": source.math_mode,
                "header": source.header,
                "source": source.source,
            }
        )
        return
    click.echo(f"// {config}\n// schedule ({place}): {schedule}\n{source.text}")


def change(
    config: AttentionConfig, schedule: Schedule, given: dict[str, Any], target: Target = METAL
) -> Schedule:
    """A schedule with some fields changed; those that follow from them follow unless given too.

    ``bq`` follows from the rows that the simdgroups own; without anything staged there is one
    buffer, and ``bd`` is the whole width.
    """
    changed = dataclasses.replace(schedule, **given)
    follow: dict[str, Any] = {}
    if "bq" not in given:
        follow["bq"] = target.row_block * changed.row_blocks * changed.simdgroups
    if not changed.staged:
        follow["bd"] = max(padded(config.head_dim, target), padded(config.v_dim, target))
        follow["buffers"] = 1
    return dataclasses.replace(
        changed, **{name: value for name, value in follow.items() if name not in given}
    )
