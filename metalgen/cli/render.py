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
    Limits,
    Schedule,
    check_schedule,
    default_schedule,
    widest_row,
)
from metalgen.targets import METAL, TARGETS, Target

FIELDS = {
    "bq": "Query rows of a threadgroup.",
    "bk": "Keys of one pass.",
    "bd": "Columns of K or V staged at once.",
    "simdgroups": "Simdgroups of a threadgroup.",
    "row_blocks": "Blocks of 8 rows (CUDA: 16) of a simdgroup.",
    "q_source": "Where Q is kept.",
    "k_source": "Where K is read from.",
    "v_source": "Where V is read from.",
    "buffers": "Staging buffers.",
    "load_width": "Elements of one vector load.",
    "fragment": "Type of matrix fragments.",
    "math_mode": "Metal's math mode.",
    "splits": "Threadgroups that share the keys of a row; decode only.",
    "value_parts": "Threadgroups that share the columns of the values.",
    "key_simdgroups": "Simdgroups that share the keys of each pass; decode on CUDA only.",
}
"""What each field of a schedule is, in the words of `--help`."""


def schedule_options(function: Any) -> Any:
    """One option a field of `Schedule`; the command gets those that were given, as ``changes``."""
    for field in reversed(dataclasses.fields(Schedule)):
        choices = CHOICES[field.name]
        number = isinstance(choices[0], int)
        function = click.option(
            "--" + field.name.replace("_", "-"),
            type=int if number else click.Choice(list(choices)),
            metavar="N" if number else None,
            help=FIELDS[field.name],
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
    from metalgen.render import render, template_hash

    family = sizes.problem(config).family
    schedule, place, limits = starting_point(config, sizes, chip)
    given = {name: value for name, value in changes.items() if value is not None}
    if given:
        schedule = change(config, schedule, given, TARGETS[limits.target])
        place += ", changed"
    check_schedule(config, schedule, limits, family)
    names = [family, "combine"] if schedule.joined > 1 else [family]
    sources = {name: render(config, schedule, limits.target, name) for name in names}
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
                "template_hash": template_hash(family, limits.target),
                "target": limits.target,
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
    from metalgen.render import template_hash

    found = get_chip(chip)
    hit = lookup(problem, found, template_hash(problem.family, found.limits.target))
    if hit:
        return hit.schedule, f"{hit.place}, {hit.provenance}", found.limits
    return default_schedule(config, found.limits, problem.family), "default", found.limits


def change(
    config: AttentionConfig, schedule: Schedule, given: dict[str, Any], target: Target = METAL
) -> Schedule:
    """A schedule with some fields changed; those that follow from them follow unless given too.

    ``bq`` follows from the rows that the simdgroups own, or their number from ``bq`` where only
    that is given; without anything staged there is one buffer, and ``bd`` is the whole width.
    """
    changed = dataclasses.replace(schedule, **given)
    follow: dict[str, Any] = {}
    rows, sharing = target.row_block * changed.row_blocks, changed.key_simdgroups
    if changed.simdgroups % sharing:
        sharing = 1  # which is complained about by its own name
    if "bq" not in given:
        follow["bq"] = rows * changed.simdgroups // sharing
    elif changed.bq % rows == 0:
        follow["simdgroups"] = changed.bq // rows * sharing
    elif "row_blocks" not in given and changed.bq % target.row_block == 0:
        follow |= {"simdgroups": changed.bq // target.row_block * sharing, "row_blocks": 1}
    widest = widest_row(config, changed.value_parts, target)
    follow["bd"] = min(changed.bd, widest)
    if target.name == "cuda":
        follow["bd"] = widest
    elif not changed.staged:
        follow |= {"bd": widest, "buffers": 1}
    return dataclasses.replace(
        changed, **{name: value for name, value in follow.items() if name not in given}
    )
