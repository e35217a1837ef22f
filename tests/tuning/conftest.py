"""Lets these tests import the modules beside them, and starts a server for those that need one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server that these tests started."""
    import postgresql_server

    pytest.importorskip("psycopg", reason="needs psycopg (metalgen[distributed])")
    try:
        with postgresql_server.server() as url:
            yield url
    except postgresql_server.NoServer as reason:
        pytest.skip(f"needs a PostgreSQL server: {reason}")
