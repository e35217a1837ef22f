"""``metalgen doctor``: what runs on this machine, and what to do next."""

from __future__ import annotations

import importlib.metadata
import platform
import sqlite3
from typing import Any

import click

from metalgen.cli.options import columns, json_option, print_json
from metalgen.plurals import counted

PACKAGES = (
    "mlx",
    "mlx-metal",
    "mlx-cpu",
    "mlx-cuda-13",
    "ziglang",
    "jinja2",
    "optuna",
    "sqlite-utils",
    "numpy",
)


@click.command()
@json_option
def command(as_json: bool) -> None:
    """Say what runs on this machine, whether the database is healthy, and what to do next."""
    found = examine()
    if as_json:
        print_json(found)
        return
    click.echo(f"metalgen {found['metalgen']}, {found['python']}, {found['system']}")
    packages = ", ".join(f"{name} {v}" for name, v in found["packages"].items() if v)
    click.echo(click.wrap_text(f"packages: {packages}", 80, subsequent_indent="  "))
    click.echo(f"templates: {found['templates']}")
    click.echo(f"chip: {found['chip'] or 'no known GPU on this machine'}")
    click.echo("devices:")
    rows = [(name, reason or "available") for name, reason in found["devices"].items()]
    for line in columns(rows):
        click.echo("  " + line)
    click.echo(f"a call without device= runs on: {found['default_device']}")
    if found["toolchain"] is not None:
        click.echo(f"simulator's compiler: {found['toolchain'] or 'works (a kernel was compiled)'}")
    database = found["database"]
    click.echo(f"database: {database['path']}")
    click.echo(f"  {database['state']}")
    for kind, count in database.get("measurements", {}).items():
        click.echo(f"  {counted(count, 'row')} {kind}")
    if others := database.get("rows_of_other_templates"):
        click.echo(f"  {others} of these rows were made by other templates, and are not used")
    click.echo("next:")
    for step in found["next"]:
        click.echo(f"  - {step}")


def examine() -> dict[str, Any]:
    """Everything that `metalgen doctor` prints, as plain values; never raises for what it finds."""
    from metalgen import chips
    from metalgen._version import __version__
    from metalgen.devices import all_devices, default_device
    from metalgen.errors import MetalgenError
    from metalgen.resources import templates_dir
    from metalgen.source.hashes import named_hashes

    try:
        templates, hashes = str(templates_dir()), named_hashes()
    except MetalgenError as error:
        templates, hashes = str(error), {}
    here = chips.detect()
    devices = {device.name: device.unavailable() for device in all_devices()}
    toolchain = _toolchain() if devices["simulator"] is None else None
    database = _database({*hashes.values()})
    return {
        "metalgen": __version__,
        "python": f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "templates": templates,
        "template_hashes": hashes,
        "chip": here.name if here else None,
        "devices": devices,
        "default_device": default_device().name,
        "toolchain": toolchain,
        "database": database,
        "next": _advice(
            here.name if here else None, default_device().is_gpu, devices, database, toolchain
        ),
    }


def _toolchain() -> str:
    """Why the simulator's compiler does not work here; "" if it does, which is tried."""
    from metalgen.simulator.compiler.front import try_toolchain

    fault = try_toolchain().split("\n")[0]
    return f"BROKEN: {fault}" if fault else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _database(current: set[str]) -> dict[str, Any]:
    from metalgen.database.errors import DatabaseError, MissingDatabase
    from metalgen.database.layout import user_database
    from metalgen.database.store import Store

    path = user_database()
    found: dict[str, Any] = {"path": str(path), "usable": False, "rows": 0}
    try:
        with Store.open(path, read_only=True) as store:
            health = store.health()
            others = store.count_of_other_templates(current)
    except MissingDatabase:
        return found | {
            "usable": True,
            "state": "does not exist yet; the first tuning run creates it",
        }
    except DatabaseError as error:
        return found | {"state": f"NOT USABLE: {error.reason}"}
    bad = health["unreadable_rows"]
    sound = health["integrity"] == "ok"
    state = "sound" if sound else f"DAMAGED: {health['integrity']}"
    counts = health["rows"]
    rows = counts["measurements"]
    return found | {
        "usable": sound,
        "rows": rows,
        "state": f"{state}: {counted(rows, 'row')}, {counted(counts['checks'], 'checked kernel')}, "
        f"{counted(counts['runs'], 'run')}"
        + (f", {counted(bad, 'row')} that cannot be read" if bad else ""),
        "measurements": health["measurements"],
        "unreadable_rows": bad,
        "rows_of_other_templates": others,
    }


def _advice(
    chip: str | None,
    gpu: bool,
    devices: dict[str, str | None],
    database: dict[str, Any],
    toolchain: str | None,
) -> list[str]:
    steps = []
    if not database["usable"]:
        steps.append("move the database away, or set METALGEN_DB to another file")
    if database.get("rows_of_other_templates"):
        steps.append(
            "metalgen db refresh carries over rows of other templates whose "
            "kernel source is unchanged"
        )
    if devices["simulator"]:
        steps.append("pip install 'metalgen[simulator]' to execute Metal kernels on this CPU")
    if toolchain:
        steps.append("pip install --force-reinstall ziglang repairs the simulator's compiler")
    if chip and gpu:
        steps.append(f"metalgen tune measures on this {chip}")
    elif not database["rows"]:
        steps.append("metalgen tune --chip M3Max predicts schedules for that chip")
    else:
        steps.append("metalgen show lists the winners; metalgen explain says what a call gets")
    return steps
