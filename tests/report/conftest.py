"""Lets these tests import `report_samples`, whatever pytest is started from."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def no_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the user's database would be; there is none yet."""
    path = tmp_path / "mine.db"
    monkeypatch.setenv("METALGEN_DB", str(path))
    return path
