"""What the tests of stores share: how one is opened, and what it is filled with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metalgen.database import exchange
from metalgen.database.exchange import Summary
from metalgen.database.hit import Hit
from metalgen.database.lookup import lookup
from metalgen.database.measurement import Measurement
from metalgen.database.protocol import TuningStore
from metalgen.families import Limits, Schedule
from metalgen.families.sizes import Problem
from metalgen.testing.rows import CHIP, CONFIG, HASH, NEIGHBOURS, PROBLEM, SECOND

NEAR = replace(PROBLEM, kv_len=2048)
LONGER = replace(PROBLEM, q_len=4096, kv_len=4096)
LONGEST = replace(PROBLEM, q_len=16384, kv_len=16384)
DECODE = Problem(CONFIG, 32, 1, 4096)
SPLIT = Schedule(bq=8, bk=SECOND.bk, bd=SECOND.bd, simdgroups=1, splits=4, family="decode")
CHAINED_POLICY = '{"cache":"cold","chained":true}'
WARM_POLICY = '{"cache":"warm","repetitions":7}'


def put(store: TuningStore, *rows: Measurement) -> list[Measurement]:
    """Commit rows under a run of their own; returns them with it."""
    run = store.begin_run("M3Max", 0)
    mine = [replace(m, run=run) for m in rows]
    assert store.add_measurements(mine) == len(mine)
    return mine


class OnStore:
    """Tests of one kind of store; `open` is all that a subclass must have.

    A store that is not an SQLite file of ours brings a `look_up` and a `merge` of its own.
    """

    def open(self, folder: Path, *, read_only: bool = False) -> TuningStore:
        """The store that is kept in a folder; made, with its folder, unless `read_only`.

        Raises:
            DatabaseError: there is none, and it may not be made.
        """
        raise NotImplementedError("say how a store is opened")

    def look_up(
        self,
        store: Any,
        problem: Problem = PROBLEM,
        *,
        template_hash: str = HASH,
        limits: Limits | None = None,
    ) -> Hit | None:
        """What an open store answers on the chip of `metalgen.testing.rows`, without records."""
        return lookup(
            problem,
            CHIP,
            {template_hash},
            database=store.path,
            shipped=store.path.parent / "none",
            neighbours=NEIGHBOURS,
            limits=limits,
        )

    def merge(self, store: Any, sources: list[Path], *, dry_run: bool = False) -> Summary:
        """Merge record files into an open store."""
        return exchange.merge(store, sources, dry_run=dry_run)

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """Where the store of a test is; not there at first."""
        return tmp_path / "some where" / "deep"

    @pytest.fixture
    def store(self, folder: Path) -> Iterator[TuningStore]:
        """A new store."""
        with self.open(folder) as store:
            yield store
