"""The store, and the definition of one, in the suite that every store must pass."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from metalgen.database.errors import MissingDatabase
from metalgen.database.exchange import Summary
from metalgen.database.hit import Hit
from metalgen.database.protocol import TuningStore
from metalgen.database.store import Store
from metalgen.devices import get_device
from metalgen.errors import ArgumentError
from metalgen.families import Limits
from metalgen.families.sizes import Problem
from metalgen.testing.plain_store import Contents, PlainStore
from metalgen.testing.rows import CHIP, HASH, NEIGHBOURS, PROBLEM
from metalgen.testing.stores import StoreConformance
from metalgen.tuning.runner import tune

ROOT = Path(__file__).parents[2]


class TestSqlite(StoreConformance):
    def open(self, folder: Path, *, read_only: bool = False) -> TuningStore:
        return Store.open(folder / "tuning.db", read_only=read_only)

    @pytest.mark.slow
    @pytest.mark.parametrize("seed", range(4, 204))
    def test_many_calls_do_what_they_do_to_the_definition(self, seed: int, tmp_path: Path) -> None:
        self.test_any_calls_do_what_they_do_to_the_definition(seed, tmp_path)


class TestDefinition(StoreConformance):
    """Which has no SQL, nor a file; of the database's code it calls what joins two rows."""

    test_any_calls_do_what_they_do_to_the_definition = None  # type: ignore[assignment]

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


def test_the_store_of_the_page_on_testing_passes(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(# test_my_store.py\n.*?)^```$", page, re.M | re.S)
    (tmp_path / "test_my_store.py").write_text(block)
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
        cwd=tmp_path,
        check=False,
    )
    assert re.search(r"^[0-9]+ passed in ", done.stdout, re.MULTILINE), done.stdout


def test_a_store_of_another_kind_cannot_be_tuned_into_by_several_workers() -> None:
    problem, device = [PROBLEM], get_device("reference")
    share: Any = object()
    with pytest.raises(ArgumentError, match="store: expected an SQLite database"):
        tune(problem, CHIP, PlainStore(Contents()), device=device, share=share)
