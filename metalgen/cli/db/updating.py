"""``metalgen db update``: take shared records over, from a file, a contribution or a URL."""

from __future__ import annotations

import contextlib
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import click

from metalgen.cli.db.carrying import merge_into
from metalgen.cli.options import json_option
from metalgen.errors import ArgumentError

SCHEMES = ("https", "http")
SECONDS = 60.0
"""What one answer of a server may take."""
CHUNK = 1 << 16


@click.command("update")
@click.argument("source", metavar="FILE_OR_URL")
@click.option("--dry-run", is_flag=True, help="Say what would change; change no row.")
@json_option
@click.pass_context
def update(ctx: click.Context, source: str, dry_run: bool, as_json: bool) -> None:
    """Take shared records over, without an upgrade of metalgen.

    FILE_OR_URL is a file of records, a database, a folder that `metalgen share` made, or a URL of a
    file of records. Only a URL makes metalgen use the network. What comes is checked like
    everything from elsewhere, and measured rows of your own stay as they are or are pooled.
    """
    from metalgen.database.layout import user_database

    with _local(source) as path:
        merge_into(ctx, user_database(), (path,), dry_run, as_json)


@contextlib.contextmanager
def _local(source: str) -> Iterator[Path]:
    """A file on this machine that holds what a source does."""
    from metalgen import contribution

    if "://" in source:
        with tempfile.TemporaryDirectory(prefix="metalgen-") as folder:
            yield download(source, Path(folder))
        return
    path = Path(source)
    if not path.is_dir():
        yield path
        return
    found, faults = contribution.read(path)
    if found is None or faults:
        raise ArgumentError("FILE_OR_URL", f"a sound contribution ({faults[0]})", source)
    yield path / contribution.RECORDS


def download(url: str, folder: Path) -> Path:
    """Fetch a file of records into a folder.

    Raises:
        ArgumentError: another scheme than `SCHEMES`, a server that does not answer or says no, or
            more bytes than a file of records may have.
    """
    from metalgen.database.untrusted import MAX_RECORDS_BYTES

    parts = urlsplit(url)
    if parts.scheme not in SCHEMES or not parts.hostname:
        expected = f"a file, a folder or a URL of {' or '.join(SCHEMES)}"
        raise ArgumentError("FILE_OR_URL", expected, url)
    path = folder / "records.jsonl"
    request = urllib.request.Request(url, headers={"User-Agent": "metalgen"})
    try:
        with (
            urllib.request.urlopen(request, timeout=SECONDS) as answer,
            path.open("wb") as file,
        ):
            if urlsplit(answer.geturl()).scheme not in SCHEMES:
                raise ArgumentError("FILE_OR_URL", "no redirection elsewhere", answer.geturl())
            while chunk := answer.read(CHUNK):
                if file.tell() + len(chunk) > MAX_RECORDS_BYTES:
                    expected = f"at most {MAX_RECORDS_BYTES} bytes of records"
                    raise ArgumentError("FILE_OR_URL", expected, url)
                file.write(chunk)
    except (urllib.error.URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ArgumentError("FILE_OR_URL", f"a URL that answers ({reason})", url) from error
    return path
