"""``metalgen db``: look after a database: keep, count, remove and draw its rows."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from metalgen.cli.options import chip_option, columns, json_option, print_json
from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.database.refresh import Refreshed

FILE = click.Path(path_type=Path)


@click.command(
    "refresh", short_help="Carry over rows whose kernel an edit of the templates left unchanged."
)
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
    from metalgen.source.digests import Present

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
        click.echo("Rows that were not kept stay in the database but are not used: tune again.")


def _told(r: Refreshed, kept: str) -> str:
    parts = [
        (r.current, "of the present templates"),
        (r.filled, "of these without a source hash until now"),
        (r.kept, f"{kept}, whose kernel is the same"),
        (r.joined, "of these merged with an existing row"),
        (r.changed, "whose kernel is not the same"),
        (r.unknown, "of other templates without a source hash"),
        (r.checks, f"{'check' if r.checks == 1 else 'checks'} {kept}"),
    ]
    told = (f"{count} {words}" for count, words in parts if count)
    return ", ".join((counted(r.rows, "row"), *told))


@click.command("study", short_help="Write rows as studies that Optuna's dashboard opens.")
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


@click.command("stats", short_help="Count your rows by table, kind and chip, and check the file.")
@json_option
def stats(as_json: bool) -> None:
    """Say what your database holds, by table, kind and chip, and whether it is whole."""
    from metalgen.database.store import Store

    with Store.open(read_only=True) as store:
        health = store.health()
        document = {
            "database": str(store.path),
            "bytes": store.path.stat().st_size,
            **health,
        }
    if as_json:
        print_json(document)
        return
    click.echo(f"{document['database']}: {document['bytes']} bytes, {health['integrity']}")
    lines = [(f"table {name}", str(count)) for name, count in health["rows"].items()]
    lines += [(kind, str(count)) for kind, count in health["measurements"].items()]
    lines += [(f"chip {name}", str(count)) for name, count in health["chips"].items()]
    lines.append(("unreadable rows", str(health["unreadable_rows"])))
    for line in columns(lines):
        click.echo("  " + line)


@click.command("prune")
@click.option("--other-templates", is_flag=True, help="Remove rows that earlier templates made.")
@click.option("--modelled", is_flag=True, help="Remove rows that the chip model predicted.")
@chip_option("Only this chip's rows.")
@click.option("--dry-run", is_flag=True, help="Say what would be removed; remove nothing.")
@json_option
def prune(
    other_templates: bool, modelled: bool, chip: str | None, dry_run: bool, as_json: bool
) -> None:
    """Remove rows from your database, of the kinds that you name."""
    from metalgen.chips import get_chip
    from metalgen.database.store import Store
    from metalgen.source.hashes import present_templates

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
