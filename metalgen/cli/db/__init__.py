"""``metalgen db``: carry measurements between databases, and look after one."""

from __future__ import annotations

import click

from metalgen.cli.db.carrying import diff, export, import_, merge, verify
from metalgen.cli.db.problems import pin, show, unpin
from metalgen.cli.db.updating import update
from metalgen.cli.db.upkeep import prune, refresh, stats, study


@click.group(name="db", context_settings={"help_option_names": ["-h", "--help"]})
def command() -> None:
    """Carry measurements between databases, and look after one.

    FILE is a database or a file of records (JSON lines). What comes from elsewhere is checked
    before anything of it is used; see docs/database.md.
    """


for _each in (
    export,
    import_,
    update,
    merge,
    verify,
    refresh,
    diff,
    study,
    stats,
    prune,
    show,
    pin,
    unpin,
):
    command.add_command(_each)
