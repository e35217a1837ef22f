"""``metalgen explain``: which kernel a call gets, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.options import (
    Sizes,
    chip_option,
    config_options,
    json_option,
    milliseconds,
    print_json,
    problem_fields,
)
from metalgen.problem.config import AttentionConfig

if TYPE_CHECKING:
    from metalgen.chips import Chip
    from metalgen.database.hit import Hit


@click.command()
@config_options
@chip_option("Chip whose records to look up. Default: this machine's, or the last one tuned.")
@click.option(
    "--device",
    type=click.Choice(["metal", "cuda", "simulator", "reference"]),
    help="Where the call would run. Default: this machine's GPU, else plain MLX.",
)
@json_option
def command(
    config: AttentionConfig, sizes: Sizes, chip: str | None, device: str | None, as_json: bool
) -> None:
    """Say where the schedule of a call comes from, why better places missed, and what runs.

    A kernel that was never checked on the device is checked now, as a first call would do.
    """
    from metalgen.calls.resolve import get_kernel
    from metalgen.database.hit import brief
    from metalgen.database.lookup import lookup
    from metalgen.families import APPLE
    from metalgen.source.hashes import template_hashes

    problem = sizes.problem(config)
    found, how = _chip(chip)
    path: list[str] = []
    language = (found.limits if found else APPLE).language
    hit = lookup(problem, found, template_hashes(problem.family, language), trace=path)
    kernel = get_kernel(
        config,
        batch=sizes.batch,
        heads=sizes.heads,
        q_len=sizes.q_len,
        kv_len=sizes.kv_len,
        device=device,
        chip=chip,
    )
    if as_json:
        print_json(
            {
                "problem": problem_fields(problem),
                "chip": found.name if found else None,
                "path": path,
                "hit": _fields(hit),
                "kernel": {
                    "device": kernel.device,
                    "backend": kernel.backend,
                    "backward": kernel.backward,
                    "schedule": kernel.schedule.to_dict(),
                    "path": list(kernel.path),
                },
            }
        )
        return
    click.echo(f"Look-up of {problem} for chip {found.name if found else 'unknown'} ({how}):")
    for step in brief(path):
        click.echo(f"  {step}")
    if hit:
        click.echo(f"  found: {hit.place}, {hit.provenance}, {milliseconds(hit.seconds)}")
        click.echo(f"         {hit.schedule}")
    else:
        click.echo("  no matching record: the default schedule")
    click.echo("What a call gets here:")
    said = {f"  {step}" for step in brief(path)}
    for line in kernel.explain().splitlines():
        if line not in said:
            click.echo(f"  {line}")


def _chip(name: str | None) -> tuple[Chip | None, str]:
    from metalgen import chips
    from metalgen.database.lookup import last_chip
    from metalgen.errors import MetalgenError

    if name:
        return chips.get_chip(name), "as asked"
    here = chips.detect()
    if here:
        return here, "this machine's"
    last = last_chip()
    try:
        return (chips.get_chip(last), "the one tuned last") if last else (None, "none tuned yet")
    except MetalgenError:
        return None, "the last one tuned is no longer known"


def _fields(hit: Hit | None) -> dict[str, Any] | None:
    if hit is None:
        return None
    return {
        "schedule": hit.schedule.to_dict(),
        "place": hit.place,
        "provenance": hit.provenance,
        "chip": hit.chip,
        "exact": hit.exact,
        "stale": hit.stale,
        "seconds": hit.seconds,
        "default_seconds": hit.default_seconds,
        "mlx_seconds": hit.mlx_seconds,
        "verified": hit.verified,
        "error": hit.error,
    }
