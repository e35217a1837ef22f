"""Carrying measurements between databases: read, export, compare; `merge` is in `merging`.

Two rows are the same measurement when all of `IDENTITY` agrees; where both sides have it, they are
joined as `join_rows` says, which is commutative, associative and idempotent, and so is a merge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalgen.database.measurement import Measurement
from metalgen.database.merging import merge, merge_rows
from metalgen.database.protocol import TuningStore
from metalgen.database.rows import (
    IDENTITY,
    Key,
    Reader,
    check,
    join_rows,
    measurement_of_row,
    row_of_measurement,
)
from metalgen.database.summary import Summary

__all__ = [
    "IDENTITY",
    "Difference",
    "Key",
    "Summary",
    "canonical",
    "check",
    "diff",
    "export",
    "identity",
    "join",
    "merge",
    "merge_rows",
    "read",
]


def identity(m: Measurement) -> Key:
    """What makes two rows the same measurement."""
    return (
        *(m.problem.key, m.schedule.key, m.template_hash, m.chip, m.cores, m.device),
        *(m.provenance, m.policy, m.phase),
    )


def join(a: Measurement, b: Measurement) -> Measurement:
    """Both of two rows of the same measurement, as `join_rows` joins them."""
    return (
        a
        if a == b
        else measurement_of_row(join_rows([row_of_measurement(a), row_of_measurement(b)]))
    )


def canonical(m: Measurement) -> Measurement:
    """The row as it is exchanged: without its run, its samples in ascending order."""
    samples = tuple(sorted(float(x) for x in m.samples))
    if samples == m.samples and not m.run:
        return m
    return dataclasses.replace(m, samples=samples, run="")


def read(path: Path, summary: Summary) -> Iterator[Measurement]:
    """The rows of a database or record file from elsewhere; what is wrong goes to `summary`."""
    return map(measurement_of_row, Reader().read(path, summary))


def export(store: TuningStore, **filters: Any) -> Iterator[str]:
    """Canonical lines of a store's rows, sorted; `filters` as those of `measurements`."""
    rows = store.measurements(**filters)
    return iter(sorted(canonical(m).to_line() for m in rows))


@dataclass(frozen=True)
class Difference:
    """Rows of two sources: only in one, in both and equal, in both and different."""

    only_first: list[Measurement]
    only_second: list[Measurement]
    changed: list[tuple[Measurement, Measurement]]
    same: int


def diff(first: Path, second: Path, summary: Summary) -> Difference:
    """Compare two databases or record files."""
    a = {identity(m): m for m in read(first, summary)}
    b = {identity(m): m for m in read(second, summary)}
    both = sorted(a.keys() & b.keys())
    changed = [(a[key], b[key]) for key in both if a[key] != b[key]]
    return Difference(
        [a[key] for key in sorted(a.keys() - b.keys())],
        [b[key] for key in sorted(b.keys() - a.keys())],
        changed,
        len(both) - len(changed),
    )
