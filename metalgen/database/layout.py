"""What readers and writers of a tuning database agree on; standard library only."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from metalgen.database.errors import UnreadableDatabase

APPLICATION_ID = 0x6D67656E
"""``mgen`` in SQLite's header: tells our databases from others."""

SCHEMA_VERSION = 3
"""Kept in SQLite's ``user_version``: the number of migrations that were applied."""

OLDEST_READ = 1
"""The earliest schema that is read as it is; a writer brings it up to date.

Schema 1 lacks ``source_hash``, and neither 1 nor 2 has rows that were pruned.
"""

STATUSES = ("ok", "pruned", "invalid", "compile", "runtime", "timeout", "wrong")
"""How a measurement or a check ended. Only ``ok`` rows have a time that counts; a ``pruned`` one
was ended early, because by what had been seen of it it could not win."""

PROVENANCES = ("measured", "modelled")
"""Where a time comes from: a device's clock, or the chip model. In order of rank."""

PHASES = ("final", "search")
"""A final was taken interleaved with the default and with MLX. In order of rank."""

WARM = '"cache":"warm"'
"""In the policies of rows that were measured with a warm cache: they answer where no others do."""

CHAINED = '"chained":true'
"""In the policies of rows whose launches waited for one another. Those of earlier versions did not,
which flattered schedules that leave cores idle: such rows answer where no chained ones do."""

MAX_TEXT = 1 << 16
"""Characters of the longest text that is read from a row or a record."""


def user_database() -> Path:
    """Where the user's measurements are: ``METALGEN_DB``, or the platform's data directory.

    Raises:
        UnreadableDatabase: it is in the home folder of a user who has none.
    """
    configured = os.environ.get("METALGEN_DB")
    try:
        return Path(configured).expanduser() if configured else _data_directory() / "tuning.db"
    except RuntimeError as error:
        place = configured or "~/tuning.db"
        raise UnreadableDatabase(place, "its home folder is unknown; set METALGEN_DB") from error


def _data_directory() -> Path:
    """``platformdirs.user_data_dir("metalgen", appauthor=False)``.

    Importing platformdirs takes 20 ms, ten times a look-up, so the two systems that MLX runs on
    are spelled out.
    """
    system: str = sys.platform  # a plain string, or mypy drops what it believes unreachable
    if system == "darwin":
        return Path.home() / "Library" / "Application Support" / "metalgen"
    if system == "linux":
        configured = os.environ.get("XDG_DATA_HOME", "").strip()
        return Path(configured or Path.home() / ".local" / "share") / "metalgen"
    import platformdirs

    return Path(platformdirs.user_data_dir("metalgen", appauthor=False))


def known_status(status: object) -> str:
    """A status from a database; ``"wrong"``, the gravest one, for what is none."""
    return status if isinstance(status, str) and status in STATUSES else "wrong"
