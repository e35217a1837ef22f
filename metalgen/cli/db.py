"""``metalgen db``: carry measurements between databases, and look after one."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from metalgen.cli.options import (
    Sizes,
    chip_option,
    columns,
    config_options,
    json_option,
    milliseconds,
    print_json,
    problem_cells,
    problem_fields,
)
from metalgen.config import AttentionConfig
from metalgen.errors import ArgumentError
from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.database.exchange import Summary
    from metalgen.database.measurement import Measurement
    from metalgen.database.refresh import Refreshed

FILE = click.Path(path_type=Path)


@click.group(name="db", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Carry measurements between databases, and look after one.

    FILE is a database or a file of records (JSON lines). What comes from elsewhere is checked
    before anything of it is used; see docs/database.md.
    """


@command.command("export", short_help="Write your rows as canonical JSON lines.")
@click.argument("file", required=False, type=FILE)
@chip_option("Only this chip's rows.")
@click.option("--measured", is_flag=True, help="Only rows that a device's clock gave.")
@click.option("--verified", is_flag=True, help="Only rows that passed their check.")
@click.option(
    "--contribute",
    is_flag=True,
    help="FILE is a folder: add verified measured finals to its <chip>.jsonl files.",
)
def export(
    file: Path | None, chip: str | None, measured: bool, verified: bool, contribute: bool
) -> None:
    """Write your rows as JSON lines, in canonical order, to FILE or standard output."""
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
        _contribute(file or Path("tuning_db"), filters)
        return
    with Store.open(read_only=True) as store:
        lines = list(exchange.export(store, **filters))
    text = "".join(line + "\n" for line in lines)
    if file is None:
        sys.stdout.write(text)
        return
    check_target(file, RECORDS)
    write_whole(file, text.encode(), RECORDS)
    click.echo(f"{counted(len(lines), 'row')} in {file}")


def _contribute(folder: Path, filters: dict[str, Any]) -> None:
    from metalgen.database import exchange
    from metalgen.database.measurement import Measurement
    from metalgen.database.records import record_file
    from metalgen.database.store import Store
    from metalgen.report.writing import RECORDS, write_whole

    if not folder.is_dir():
        raise ArgumentError("FILE", "a folder, such as tuning_db of a checkout", str(folder))
    with Store.open(read_only=True) as store:
        rows = [Measurement.from_line(line) for line in exchange.export(store, **filters)]
    if not rows:
        click.echo("No verified final measurement yet: `metalgen tune` on this chip makes some.")
        return
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
        click.echo(f"{counted(count, 'row')} of yours, {len(merged)} in all, in {path}")


@command.command("import")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--dry-run", is_flag=True, help="Say what would change; change no row.")
@json_option
@click.pass_context
def import_(ctx: click.Context, files: tuple[Path, ...], dry_run: bool, as_json: bool) -> None:
    """Merge FILES into your database."""
    from metalgen.database.layout import user_database

    _merge(ctx, user_database(), files, dry_run, as_json)


@command.command("merge")
@click.argument("target", type=FILE)
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--dry-run", is_flag=True, help="Say what would change; change no row.")
@json_option
@click.pass_context
def merge(
    ctx: click.Context, target: Path, files: tuple[Path, ...], dry_run: bool, as_json: bool
) -> None:
    """Merge FILES into the database TARGET, which need not exist. Any order gives the same."""
    _merge(ctx, target, files, dry_run, as_json)


def _merge(
    ctx: click.Context, target: Path, files: tuple[Path, ...], dry_run: bool, as_json: bool
) -> None:
    import tempfile

    from metalgen.database import exchange
    from metalgen.database.store import Store
    from metalgen.source_hash import present_templates

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
                f"{counted(others, 'row')} in all of other templates: see `metalgen db refresh`"
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


@command.command("verify")
@click.argument("files", nargs=-1, required=True, type=FILE)
@click.option("--canonical", is_flag=True, help="Record files must be sorted and without repeats.")
@json_option
@click.pass_context
def verify(ctx: click.Context, files: tuple[Path, ...], canonical: bool, as_json: bool) -> None:
    """Check every row of FILES, without a GPU. Exit code 1 if anything is wrong."""
    from metalgen.database import exchange

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


@command.command("refresh", short_help="Keep rows whose kernel an edit of templates left the same.")
@click.argument("files", nargs=-1, type=FILE)
@click.option("--dry-run", is_flag=True, help="Say what would change; change no row.")
@json_option
def refresh(files: tuple[Path, ...], dry_run: bool, as_json: bool) -> None:
    """Keep rows of FILES, or of your database, whose kernel an edit of templates left the same.

    A row counts only under the templates that made it. One of other templates that knows its source
    hash is rendered again: where the kernel is the one that was measured, the row takes the present
    template hash. Rows of the present templates get a source hash. None is removed.
    """
    from metalgen.database.layout import user_database
    from metalgen.database.refresh import refresh_store, refreshed_records
    from metalgen.database.store import Store
    from metalgen.database.untrusted import is_database, open_untrusted
    from metalgen.report.writing import RECORDS, write_whole
    from metalgen.source_hash import Present

    present, mine = Present(), user_database()
    found: dict[Path, Refreshed] = {}
    texts: dict[Path, str] = {}
    paths = list(dict.fromkeys(files or (mine,)))
    databases = [path for path in paths if is_database(path)]
    for path in paths:  # what is refused is refused before anything is written
        if path not in databases:
            texts[path], found[path] = refreshed_records(path, present)
        elif path != mine:
            with open_untrusted(path):  # else a trigger of someone else's would see our updates
                pass
    for path in databases:
        with Store.open(path) as store:
            found[path] = refresh_store(store, present, dry_run=dry_run)
    for path, text in texts.items():
        if not dry_run and path.read_bytes() != text.encode():
            write_whole(path, text.encode(), RECORDS)
    if as_json:
        files_found = [{"file": str(path)} | found[path].to_dict() for path in paths]
        print_json({"dry_run": dry_run, "files": files_found})
        return
    for path in paths:
        click.echo(f"{path}: {_told(found[path], 'would be kept' if dry_run else 'kept')}")
    if any(r.changed or r.unknown for r in found.values()):
        click.echo("Rows that were not kept stay, and do not count: tune again.")


def _told(r: Refreshed, kept: str) -> str:
    parts = [
        (r.current, "of the present templates"),
        (r.filled, "of these without a source hash until now"),
        (r.kept, f"{kept}, whose kernel is the same"),
        (r.joined, "of these joined with a row that was there"),
        (r.changed, "whose kernel is not the same"),
        (r.unknown, "of other templates without a source hash"),
        (r.checks, f"{'check' if r.checks == 1 else 'checks'} {kept}"),
    ]
    told = (f"{count} {words}" for count, words in parts if count)
    return ", ".join((counted(r.rows, "row"), *told))


@command.command("diff")
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


@command.command("study", short_help="Write rows as studies that Optuna's dashboard opens.")
@click.argument("files", nargs=-1, type=FILE)
@click.option(
    "-o",
    "--output",
    type=FILE,
    default=Path("study.log"),
    show_default=True,
    metavar="STUDY",
    help="The file to write: SQLite for .db, .sqlite and .sqlite3, else a journal.",
)
@chip_option("Only this chip's rows.")
@json_option
@click.pass_context
def study(
    ctx: click.Context, files: tuple[Path, ...], output: Path, chip: str | None, as_json: bool
) -> None:
    """Write FILES, or your database, as studies that Optuna's dashboard opens."""
    from metalgen.chips import get_chip
    from metalgen.cli.report import say_left_out
    from metalgen.report.sources import read_sources
    from metalgen.report.study import SQLITE, write_studies
    from metalgen.report.writing import check_target

    name = get_chip(chip).name if chip else None
    check_target(output, new=True)
    sources = read_sources(files, name)
    found = write_studies(output, sources)
    left_out = sources.summary.rejected
    if as_json:
        studies = {study: len(result.rows) for study, result in found.items()}
        print_json({"file": str(output), "studies": studies, "left_out": left_out})
    else:
        trials = counted(len(sources.rows), "trial")
        url = f"sqlite:///{output}" if output.suffix.lower() in SQLITE else str(output)
        click.echo(f"{output}: {counted(len(found), 'study', 'studies')} of {trials}")
        click.echo(f"  optuna-dashboard {shlex.quote(url)}")
        say_left_out(sources.summary)
    ctx.exit(1 if left_out else 0)


@command.command("stats", short_help="Count your rows by table, kind and chip, and check the file.")
@json_option
def stats(as_json: bool) -> None:
    """Say what your database holds, by table, kind and chip, and whether it is whole."""
    from metalgen.database.store import Store

    with Store.open(read_only=True) as store:
        health = store.health()
        chips = store.db.execute(
            "SELECT chip, count(*) FROM measurements GROUP BY 1 ORDER BY 1"
        ).fetchall()
        document = {
            "database": str(store.path),
            "bytes": store.path.stat().st_size,
            **health,
            "chips": dict(chips),
        }
    if as_json:
        print_json(document)
        return
    click.echo(f"{document['database']}: {document['bytes']} bytes, {health['integrity']}")
    lines = [(f"table {name}", str(count)) for name, count in health["rows"].items()]
    lines += [(kind, str(count)) for kind, count in health["measurements"].items()]
    lines += [(f"chip {name}", str(count)) for name, count in chips]
    lines.append(("unreadable rows", str(health["unreadable_rows"])))
    for line in columns(lines):
        click.echo("  " + line)


@command.command("prune")
@click.option("--other-templates", is_flag=True, help="Rows that earlier templates made.")
@click.option("--modelled", is_flag=True, help="Rows that the chip model predicted.")
@chip_option("Only this chip's rows.")
@click.option("--dry-run", is_flag=True, help="Say what would go; remove nothing.")
@json_option
def prune(
    other_templates: bool, modelled: bool, chip: str | None, dry_run: bool, as_json: bool
) -> None:
    """Remove rows from your database, of the kinds that you name."""
    from metalgen.chips import get_chip
    from metalgen.database.store import Store
    from metalgen.source_hash import present_templates

    if not other_templates and not modelled:
        raise click.UsageError("expected --other-templates, --modelled or both, but got neither")
    current = present_templates()
    with Store.open() as store:
        count = store.prune(
            keep_templates=current if other_templates else None,
            provenance="modelled" if modelled else None,
            chip=get_chip(chip).name if chip else None,
            dry_run=dry_run,
        )
        path = str(store.path)
    if as_json:
        print_json({"database": path, "dry_run": dry_run, "rows": count})
    else:
        click.echo(f"{'Would remove' if dry_run else 'Removed'} {counted(count, 'row')} of {path}")


@command.command("show")
@config_options
@chip_option("Only this chip's rows.")
@json_option
def show(config: AttentionConfig, sizes: Sizes, chip: str | None, as_json: bool) -> None:
    """List your rows of one problem, the best first."""
    from metalgen.chips import get_chip
    from metalgen.database.store import Store
    from metalgen.database.winners import ordered
    from metalgen.source_hash import present_templates

    problem = sizes.problem(config)
    with Store.open(read_only=True) as store:
        rows = store.measurements(problem, chip=get_chip(chip).name if chip else None)
    current = present_templates()
    rows = sorted(ordered(rows), key=lambda m: (m.template_hash not in current, not m.verified))
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


@command.command("pin")
@config_options
@chip_option("Whose limits the schedule must keep. Default: an Apple GPU's.")
@click.option("--schedule", "text", required=True, metavar="JSON", help="As --json shows them.")
@click.option("--note", default="", help="Why.")
def pin(config: AttentionConfig, sizes: Sizes, chip: str | None, text: str, note: str) -> None:
    """Make look-ups of a problem answer with a schedule, for A/B tests."""
    from metalgen.chips import get_chip
    from metalgen.database.store import Store
    from metalgen.schedule import APPLE, Schedule, check_schedule

    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArgumentError("--schedule", "a JSON object", text[:80]) from error
    problem = sizes.problem(config)
    schedule = Schedule.from_dict(fields)
    limits = get_chip(chip).limits if chip else APPLE
    check_schedule(config, schedule, limits, problem.family)
    with Store.open() as store:
        store.pin(problem, schedule, note)
    click.echo(f"Pinned {problem} to {schedule}; `metalgen db unpin` undoes it.")


@command.command("unpin")
@config_options
def unpin(config: AttentionConfig, sizes: Sizes) -> None:
    """Undo `metalgen db pin`."""
    from metalgen.database.store import Store

    problem = sizes.problem(config)
    with Store.open() as store:
        store.unpin(problem)
    click.echo(f"{problem} is not pinned.")
