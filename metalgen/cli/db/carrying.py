"""``metalgen db``: carry measurements between databases and record files, and compare them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.options import (
    chip_option,
    json_option,
    milliseconds,
    print_json,
    problem_cells,
)
from metalgen.errors import ArgumentError
from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.database.exchange import Summary
    from metalgen.database.measurement import Measurement

FILE = click.Path(path_type=Path)
SHOWN = 10
"""Schedules that are printed of those that several contributors measured."""


@click.command("export", short_help="Write your rows as canonical JSON lines.")
@click.argument("file", required=False, type=FILE)
@chip_option("Only this chip's rows.")
@click.option("--measured", is_flag=True, help="Only rows measured on a device.")
@click.option("--verified", is_flag=True, help="Only rows that passed their check.")
@click.option(
    "--contribute",
    is_flag=True,
    help="FILE is a folder: add verified measured finals to its <chip>.jsonl files.",
)
@json_option
def export(
    file: Path | None,
    chip: str | None,
    measured: bool,
    verified: bool,
    contribute: bool,
    as_json: bool,
) -> None:
    """Write your rows as JSON lines, in canonical order, to FILE or standard output (or -).

    With --json, rows that go to standard output are one JSON document.
    """
    from metalgen.chips import get_chip
    from metalgen.database import exchange
    from metalgen.database.store import Store
    from metalgen.report.writing import RECORDS, check_target, write_whole

    filters: dict[str, Any] = {"chip": get_chip(chip).name if chip else None}
    if measured or contribute:
        filters["provenance"] = "measured"
    if verified or contribute:
        filters["verified"] = True
    if contribute:
        filters["phase"] = "final"
        _contribute(file or Path("tuning_db"), filters, as_json)
        return
    with Store.open(read_only=True) as store:
        lines = list(exchange.export(store, **filters))
    if file is None or str(file) == "-":
        if as_json:
            print_json({"rows": [json.loads(line) for line in lines]})
        else:
            sys.stdout.write("".join(line + "\n" for line in lines))
        return
    check_target(file, RECORDS)
    write_whole(file, "".join(line + "\n" for line in lines).encode(), RECORDS)
    if as_json:
        print_json({"file": str(file), "rows": len(lines)})
    else:
        click.echo(f"{counted(len(lines), 'row')} in {file}")


def _contribute(folder: Path, filters: dict[str, Any], as_json: bool) -> None:
    from metalgen.database import exchange
    from metalgen.database.measurement import Measurement
    from metalgen.database.records import record_file
    from metalgen.database.store import Store
    from metalgen.report.writing import RECORDS, write_whole

    if not folder.is_dir():
        raise ArgumentError("FILE", "a folder, such as tuning_db of a checkout", str(folder))
    with Store.open(read_only=True) as store:
        rows = [Measurement.from_line(line) for line in exchange.export(store, **filters)]
    if not rows and not as_json:
        click.echo(
            "No verified final measurement yet; run `metalgen tune` on this chip to make some."
        )
    written = []
    for chip in sorted({m.chip for m in rows}):
        path = record_file(chip, folder)
        merged = {exchange.identity(m): m for m in rows if m.chip == chip}
        count = len(merged)
        summary = exchange.Summary()
        for m in exchange.read(path, summary) if path.exists() else ():
            key = exchange.identity(m)
            merged[key] = exchange.join(m, merged[key]) if key in merged else m
        if summary.rejected or summary.refused:
            raise ArgumentError(str(path), "records without faults", summary.reasons[0][2])
        text = "".join(line + "\n" for line in sorted(m.to_line() for m in merged.values()))
        write_whole(path, text.encode(), RECORDS)
        written.append({"file": str(path), "yours": count, "rows": len(merged)})
        if not as_json:
            click.echo(f"{counted(count, 'row')} of yours, {len(merged)} in all, in {path}")
    if as_json:
        print_json({"files": written})


@click.command("import")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--dry-run", is_flag=True, help="Say what would change; change no row.")
@json_option
@click.pass_context
def import_(ctx: click.Context, files: tuple[Path, ...], dry_run: bool, as_json: bool) -> None:
    """Merge FILES into your database."""
    from metalgen.database.layout import user_database

    merge_into(ctx, user_database(), files, dry_run, as_json)


@click.command("merge")
@click.argument("target", type=FILE)
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--dry-run", is_flag=True, help="Say what would change; change no row.")
@json_option
@click.pass_context
def merge(
    ctx: click.Context, target: Path, files: tuple[Path, ...], dry_run: bool, as_json: bool
) -> None:
    """Merge FILES into the database TARGET, which need not exist. Any order gives the same."""
    merge_into(ctx, target, files, dry_run, as_json)


def merge_into(
    ctx: click.Context, target: Path, files: tuple[Path, ...], dry_run: bool, as_json: bool
) -> None:
    """Merge files into a database, print what that came to, and end with its exit code."""
    import tempfile

    from metalgen.database import exchange
    from metalgen.database.store import Store
    from metalgen.source.hashes import present_templates

    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / "empty.db" if dry_run and not target.exists() else target
        with Store.open(place) as store:
            summary = exchange.merge(store, files, dry_run=dry_run)
            others = store.count_of_other_templates(present_templates())
    if as_json:
        print_json({"target": str(target), "dry_run": dry_run} | _summary_fields(summary))
    else:
        verb = "Would merge" if dry_run else "Merged"
        click.echo(
            f"{verb} into {target}: {summary.new} new, {summary.pooled} pooled, "
            f"{summary.same} known, {counted(summary.conflicts, 'conflict')}, "
            f"{summary.rejected} rejected, {counted(summary.refused, 'file')} refused"
        )
        _print_reasons(summary)
        if others and not dry_run:
            click.echo(
                f"{counted(others, 'row')} in all from other template versions: "
                "see `metalgen db refresh`"
            )
    ctx.exit(1 if summary.rejected or summary.refused else 0)


def _summary_fields(summary: Summary) -> dict[str, Any]:
    names = ("new", "pooled", "same", "conflicts", "rejected", "refused")
    reasons = [{"file": f, "place": p, "reason": r} for f, p, r in summary.reasons]
    return {name: getattr(summary, name) for name in names} | {"reasons": reasons}


def _print_reasons(summary: Summary) -> None:
    for file, place, reason in summary.reasons:
        click.echo(f"  {file}: {place}: {reason}")
    if more := summary.rejected + summary.refused - len(summary.reasons):
        click.echo(f"  and {counted(more, 'more bad row')}")


@click.command("verify")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--canonical", is_flag=True, help="Record files must be sorted and without repeats.")
@click.option("--contribution", is_flag=True, help="FILES are folders that `metalgen share` made.")
@json_option
@click.pass_context
def verify(
    ctx: click.Context,
    files: tuple[Path, ...],
    canonical: bool,
    contribution: bool,
    as_json: bool,
) -> None:
    """Check every row of FILES, without a GPU. Exit code 1 if anything is wrong."""
    from metalgen.database import exchange

    if contribution:
        if canonical:
            raise ArgumentError("--canonical", "none with --contribution, which implies it", True)
        _verify_contributions(ctx, files, as_json)
        return
    summary, rows = exchange.Summary(), 0
    for path in files:
        refused_before = summary.refused
        found = [m.to_line() for m in exchange.read(path, summary)]
        rows += len(found)
        if canonical and path.is_file() and summary.refused == refused_before:
            text = "".join(line + "\n" for line in sorted(set(found)))
            if path.read_bytes() != text.encode():
                summary.reject(path, "file", "not in canonical order and form", whole=True)
    if as_json:
        print_json({"rows": rows} | _summary_fields(summary))
    else:
        refused = counted(summary.refused, "file")
        click.echo(f"{counted(rows, 'good row')}, {summary.rejected} bad, {refused} refused")
        _print_reasons(summary)
    ctx.exit(1 if summary.rejected or summary.refused else 0)


def _verify_contributions(ctx: click.Context, folders: tuple[Path, ...], as_json: bool) -> None:
    """Check contributions, and say how far several of one chip are apart."""
    from metalgen import contribution

    faults, good = {}, []
    for folder in folders:
        found, wrong = contribution.read(folder)
        if found is not None and not wrong:
            good.append(found)
        faults[str(folder)] = wrong
    apart = contribution.spread(good)
    if as_json:
        rows = [{"row": s.measurement.to_record(), "seconds": s.seconds} for s in apart]
        print_json({"rows": sum(len(c.records) for c in good), "faults": faults, "spread": rows})
    else:
        for name, wrong in faults.items():
            click.echo(f"{name}: {'sound' if not wrong else counted(len(wrong), 'fault')}")
            for fault in wrong:
                click.echo(f"  {fault}")
        if apart:
            click.echo(f"{counted(len(apart), 'schedule')} measured by several contributors:")
        for s in apart[:SHOWN]:
            click.echo(
                f"  {s.measurement.chip}  {s.measurement.problem}: median of "
                f"{len(s.seconds)} {milliseconds(s.middle)}, {100 * s.range:.1f} % apart"
            )
    ctx.exit(1 if any(faults.values()) else 0)


@click.command("diff")
@click.argument("first", type=FILE)
@click.argument("second", type=FILE)
@json_option
@click.pass_context
def diff(ctx: click.Context, first: Path, second: Path, as_json: bool) -> None:
    """Compare two databases or record files. Exit code 1 if they differ."""
    from metalgen.database import exchange

    summary = exchange.Summary()
    found = exchange.diff(first, second, summary)
    if as_json:
        print_json(
            {
                "only_first": [m.to_record() for m in found.only_first],
                "only_second": [m.to_record() for m in found.only_second],
                "changed": [[a.to_record(), b.to_record()] for a, b in found.changed],
                "same": found.same,
            }
            | {"reasons": _summary_fields(summary)["reasons"]}
        )
    else:
        for sign, rows in (("-", found.only_first), ("+", found.only_second)):
            for m in rows:
                click.echo(f"{sign} {_cells(m)}")
        for a, b in found.changed:
            click.echo(f"! {_cells(a)} -> {milliseconds(b.seconds)} {b.status}")
        click.echo(
            f"{len(found.only_first)} only in {first}, {len(found.only_second)} only in {second}, "
            f"{len(found.changed)} differ, {found.same} are the same"
        )
        _print_reasons(summary)
    differ = found.only_first or found.only_second or found.changed or summary.reasons
    ctx.exit(1 if differ else 0)


def _cells(m: Measurement) -> str:
    return "  ".join(
        (m.chip, *problem_cells(m.problem), str(m.schedule), milliseconds(m.seconds), m.status)
    )
