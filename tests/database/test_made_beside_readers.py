"""Look-ups beside the making of a database."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest

from metalgen.database.connect import open_for_reading
from metalgen.database.errors import DatabaseError, MissingDatabase
from metalgen.database.store import Store

ROUNDS = 8


def look(path: Path, stop: Any, complaints: Any) -> None:
    while not stop.is_set():
        try:
            open_for_reading(path, timeout=1.0).close()
        except MissingDatabase:
            continue
        except DatabaseError as error:
            complaints.put(str(error))
            return


def test_a_database_that_is_being_made_is_never_taken_for_another_programs(tmp_path: Path) -> None:
    """It was, in 25 of 60 rounds, when a reader looked twice at a file that came between."""
    context = multiprocessing.get_context("spawn")
    complaints = context.SimpleQueue()
    paths = [tmp_path / f"{number}.db" for number in range(ROUNDS)]
    stops = [context.Event() for _ in paths]
    for path, stop in zip(paths, stops, strict=True):
        readers = [
            context.Process(target=look, args=(path, stop, complaints), daemon=True)
            for _ in range(2)
        ]
        for reader in readers:
            reader.start()
        time.sleep(0.3)
        Store.open(path).close()
        time.sleep(0.02)
        stop.set()
        for reader in readers:
            reader.join(timeout=30)
            assert reader.exitcode == 0
    assert complaints.empty(), complaints.get()


def test_a_log_that_goes_between_two_looks_is_no_fault_of_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that closes removes its log: it was there, and then had no size."""
    path = tmp_path / "tuning.db"
    Store.open(path).close()
    monkeypatch.setattr(Path, "exists", lambda self, **_: True)
    open_for_reading(path).close()
