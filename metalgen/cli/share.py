"""``metalgen share``: make a contribution of what this machine measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from metalgen.cli.options import json_option, print_json
from metalgen.errors import ArgumentError
from metalgen.plurals import counted


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The new folder. Default: metalgen-CHIP.",
)
@click.option(
    "--verification",
    type=click.Path(path_type=Path),
    help="A file of `metalgen verify` on this device. Default: it is run now.",
)
@json_option
def command(output: Path | None, verification: Path | None, as_json: bool) -> None:
    """Make a contribution of what this machine measured: a folder for a pull request.

    It holds the measured and verified finals of this chip, the machine, a verification of this
    installation, and a summary. Nothing is sent anywhere.
    """
    from metalgen import contribution
    from metalgen.cli.tune import local_gpu
    from metalgen.database.store import Store

    chip, device = local_gpu()
    if chip is None or device is None:
        raise ArgumentError("share", "a machine whose GPU metalgen knows and runs on", "none")
    folder = output or Path(f"metalgen-{chip.name}")
    if folder.exists():
        raise ArgumentError("--output", "a folder that does not exist", str(folder))
    with Store.open(read_only=True) as store:
        given = _read(verification) if verification else _verified(device, as_json)
        made = contribution.collect(store, chip, given)
    contribution.write(made, folder)
    if as_json:
        print_json(made.about | {"folder": str(folder)})
        return
    click.echo(f"{counted(len(made.records), 'row')} of {chip.name} in {folder}:")
    for name in contribution.FILES:
        click.echo(f"  {name}")
    click.echo(
        "To contribute it, open a pull request that adds this folder under contributions/, with "
        f"{contribution.SUMMARY} as its text. `metalgen db verify --contribution {folder}` is the "
        "check that it must pass."
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        expected = f"a file of `metalgen verify` ({error})"
        raise ArgumentError("--verification", expected, str(path)) from None
    if not isinstance(found, dict) or "metalgen_verify" not in found:
        raise ArgumentError("--verification", "a file of `metalgen verify`", str(path))
    return found


def _verified(device: Any, quiet: bool) -> dict[str, Any]:
    from metalgen.cli.doctor import examine
    from metalgen.verification.running import verify_device

    if not quiet:
        click.echo(f"Verifying device {device.name}, which takes about a minute.", err=True)
    report = verify_device(device)
    return {"metalgen_verify": 1} | report.to_dict() | {"installation": examine()}
