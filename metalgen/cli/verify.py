"""``metalgen verify``: prove this installation on a device."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.options import columns, duration, json_option, print_json
from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.verification.items import Item
    from metalgen.verification.running import Report

SHOWN = 10
"""Faults that are printed; the file has them all."""


@click.command()
@click.option(
    "--device",
    "device_name",
    type=click.Choice(["metal", "cuda", "simulator", "reference"]),
    help="What to verify. Default: this machine's GPU, else the simulator.",
)
@click.option("--full", is_flag=True, help="All types, widths and random combinations.")
@click.option(
    "-o",
    "--output",
    default="metalgen-verify.json",
    show_default=True,
    type=click.Path(path_type=Path),
    help="File that keeps everything, to attach to an issue.",
)
@click.option(
    "--jobs",
    type=int,
    metavar="N",
    help="Processes that compile and check side by side; 0: none but this one.",
)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    device_name: str | None,
    full: bool,
    output: Path,
    jobs: int | None,
    as_json: bool,
) -> None:
    """Prove this installation on a device: every feature and type against float64.

    Runs each kernel on a small ragged call, compares it with the float64 reference, and says what
    computes typical calls here. Takes about a minute; --full takes much longer. The exit code is 1
    where anything is wrong. Ctrl-C keeps what was found.
    """
    from metalgen.cli.doctor import examine
    from metalgen.devices import default_device, get_device
    from metalgen.report.writing import Kind, check_target, write_whole
    from metalgen.verification.running import verify_device

    file = Kind(b'{"metalgen_verify":', "verification", "--output")
    check_target(output, file)
    if device_name is None:
        device_name = default_device().name if default_device().is_gpu else "simulator"
    device = get_device(device_name)
    report = verify_device(device, full=full, jobs=jobs, observe=_observer(as_json))
    document = {"metalgen_verify": 1} | report.to_dict() | {"installation": examine()}
    write_whole(output, json.dumps(document).encode() + b"\n", file)
    if as_json:
        print_json(document)
    else:
        _print(report, output)
    if report.interrupted:
        click.echo(f"metalgen: interrupted; what was found is in {output}", err=True)
        ctx.exit(130)
    if report.faults:
        ctx.exit(1)


def _observer(quiet: bool) -> Any:
    """Progress: one line on standard error that is rewritten, on a terminal only."""
    if quiet or not sys.stderr.isatty():
        return lambda report, item: None

    def observe(report: Report, item: Item) -> None:
        done = len(report.outcomes)
        wrong = f", {counted(len(report.faults), 'fault')}" if report.faults else ""
        line = f"{done}/{report.total}{wrong}  {item.group}: {item.name}"
        click.echo(f"\r\x1b[K{line[:78]}", nl=False, err=True)
        if done == report.total - 1:
            click.echo("\r\x1b[K", nl=False, err=True)

    return observe


def _print(report: Report, output: Path) -> None:
    manner = {"simulator": "simulated: the Metal source was executed on this CPU"}
    note = manner.get(report.device, "executed on this machine")
    click.echo(f"device {report.device} ({note})")
    rows = [("", "checked", "right", "largest error")]
    for group, outcomes in report.groups().items():
        errors = [o.error for o in outcomes if o.error]
        right = sum(o.status == "ok" for o in outcomes)
        largest = f"{max(errors):.1e}" if errors else "-"
        rows.append((group, str(len(outcomes)), str(right), largest))
    for line in columns(rows):
        click.echo("  " + line)
    for outcome in report.faults[:SHOWN]:
        click.echo(f"{outcome.status.upper()}  {outcome.group}: {outcome.name}")
        click.echo(f"    {' '.join(outcome.detail.split())[:300]}")
    if len(report.faults) > SHOWN:
        click.echo(f"and {counted(len(report.faults) - SHOWN, 'more fault')}, all in {output}")
    if report.calls:
        click.echo("what computes calls on this device:")
        names = {"metalgen": "metalgen's kernel", "mlx": "MLX's own", "plain": "plain MLX"}
        for line in columns(
            [(n, names.get(c["backend"], c["backend"]), c["why"]) for n, c in report.calls.items()]
        ):
            click.echo("  " + line)
    verdict = "FAULTS FOUND" if report.faults else "everything is right"
    if report.interrupted:
        verdict = f"interrupted after {len(report.outcomes)} of {report.total}"
    click.echo(
        f"{counted(len(report.outcomes), 'kernel')} in {duration(report.seconds)}: {verdict}. "
        f"Kept in {output}"
    )
