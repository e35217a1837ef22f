"""``metalgen render``: the Metal source of a kernel."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from metalgen.cli.options import Sizes, chip_option, config_options, json_option, print_json
from metalgen.errors import ArgumentError
from metalgen.families import (
    APPLE,
    Limits,
    Schedule,
    check_schedule,
    default_schedule,
    get_family,
)
from metalgen.kinds import get_kind
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import all_knobs


def schedule_options(function: Any) -> Any:
    """One option per knob; the command gets those that were given, as ``changes``."""
    for knob in reversed(all_knobs().values()):
        function = click.option(
            "--" + knob.name.replace("_", "-"),
            type=int if knob.is_integer else click.Choice(list(knob.choices)),
            metavar="N" if knob.is_integer else None,
            help=knob.help,
        )(function)
    return function


@click.command()
@config_options
@chip_option("Start from this chip's best schedule on record, and keep its limits.")
@schedule_options
@json_option
def command(
    config: AttentionConfig, sizes: Sizes, chip: str | None, as_json: bool, **changes: Any
) -> None:
    """Print the Metal source of a kernel; for an NVIDIA chip the CUDA source.

    The schedule is the default one, or with --chip the best on record for it; options that name a
    field of the schedule change it. Up to 64 queries (--q-len) get the decode kernel, and behind it
    the one that combines its splits.
    """
    from metalgen.source.hashes import template_hash
    from metalgen.source.render import render

    family = sizes.problem(config).family
    schedule, place, limits = starting_point(config, sizes, chip)
    given = {name: value for name, value in changes.items() if value is not None}
    if given:
        schedule = change(config, schedule, given)
        place += ", changed"
    check_schedule(config, schedule, limits)
    steps = get_family(family).steps(schedule)
    sources = {step.name: render(config, schedule, step) for step in steps}
    if as_json:
        kernels = [
            {
                "family": name,
                "name": source.name,
                "inputs": list(source.inputs),
                "outputs": list(source.outputs),
                "threads": source.threads,
                "math_mode": source.math_mode,
                "header": source.header,
                "source": source.source,
            }
            for name, source in sources.items()
        ]
        print_json(
            {
                "config": config.to_dict(),
                "schedule": schedule.to_dict(),
                "place": place,
                "template_hash": template_hash(schedule),
                "target": limits.language,
                **kernels[0],
                "combine": kernels[1] if len(kernels) > 1 else None,
            }
        )
        return
    click.echo(f"// {config}, {family}\n// schedule ({place}): {schedule}")
    for source in sources.values():
        click.echo(source.text)


def starting_point(
    config: AttentionConfig, sizes: Sizes, chip: str | None
) -> tuple[Schedule, str, Limits]:
    """The schedule to start from, where it comes from, and the limits that it keeps.

    Without a chip it is the default one within an Apple GPU's limits; with a chip the best on
    record for it, where there is one.
    """
    problem = sizes.problem(config)
    if chip is None:
        return default_schedule(config, APPLE, problem.family), "default", APPLE
    from metalgen.chips import get_chip
    from metalgen.database.lookup import lookup
    from metalgen.source.hashes import template_hashes

    found = get_chip(chip)
    hit = lookup(problem, found, template_hashes(problem.family, found.limits.language))
    if hit:
        return hit.schedule, f"{hit.place}, {hit.provenance}", found.limits
    return default_schedule(config, found.limits, problem.family), "default", found.limits


def change(config: AttentionConfig, schedule: Schedule, given: dict[str, Any]) -> Schedule:
    """A schedule with some knobs changed; those that follow from them follow unless given too.

    Raises:
        ArgumentError: a knob that the schedule does not have.
    """
    for name, value in given.items():
        if name not in schedule.knobs:
            having = f"{schedule.family} schedules for {schedule.kind} matrices"
            raise ArgumentError(name, f"none, because {having} have no such knob", value)
    changed = dataclasses.replace(schedule, **given)
    follow = get_kind(schedule.kind).follow(config, changed, given)
    return dataclasses.replace(
        changed, **{name: value for name, value in follow.items() if name not in given}
    )
