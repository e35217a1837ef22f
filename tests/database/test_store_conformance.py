"""The store, and the definition of one, in the suite that every store must pass."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metalgen.database.errors import MissingDatabase
from metalgen.database.exchange import Summary
from metalgen.database.lookup import Hit
from metalgen.database.protocol import TuningStore
from metalgen.database.store import Store
from metalgen.problem import Problem
from metalgen.schedule import Limits
from metalgen.testing.plain_store import Contents, PlainStore
from metalgen.testing.rows import CHIP, HASH, NEIGHBOURS, PROBLEM
from metalgen.testing.stores import StoreConformance


class TestSqlite(StoreConformance):
    def open(self, folder: Path, *, read_only: bool = False) -> TuningStore:
        return Store.open(folder / "tuning.db", read_only=read_only)


class TestDefinition(StoreConformance):
    """Which shares no code with the other, nor a file."""

    @pytest.fixture(autouse=True)
    def _forget(self) -> Iterator[None]:
        self.folders: dict[Path, Contents] = {}
        yield

    def open(self, folder: Path, *, read_only: bool = False) -> TuningStore:
        if read_only and folder not in self.folders:
            raise MissingDatabase(folder, "does not exist yet")
        return PlainStore(self.folders.setdefault(folder, Contents()), read_only=read_only)

    def look_up(
        self,
        store: Any,
        problem: Problem = PROBLEM,
        *,
        template_hash: str = HASH,
        limits: Limits | None = None,
    ) -> Hit | None:
        return store.look_up(problem, CHIP.name, limits or CHIP.limits, NEIGHBOURS, template_hash)

    def merge(self, store: Any, sources: list[Path], *, dry_run: bool = False) -> Summary:
        return store.merge(sources, dry_run=dry_run)
