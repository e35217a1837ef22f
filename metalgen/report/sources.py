"""The rows that a report is about, and what their databases say of the runs that took them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metalgen.database import exchange
from metalgen.database.layout import user_database
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.database.untrusted import is_database, open_untrusted, parse_object
from metalgen.errors import ArgumentError

ORDERLESS = ("", "merged")
"""Runs of rows whose order says nothing about when they were taken."""


SHORTEST, LONGEST = 1e-12, 1e8
"""Seconds that a time may have to be drawn: from a picosecond to three years."""


@dataclass(frozen=True)
class Notes:
    """What a run's record says of one problem.

    Args:
        noise_floor: relative difference of two medians of the default schedule, or None.
        drift: relative changes of the best schedule's time, as they were seen.
        outliers: samples beyond three interquartile ranges.
    """

    noise_floor: float | None = None
    drift: tuple[float, ...] = ()
    outliers: int = 0


@dataclass
class Sources:
    """Rows of several files together.

    Args:
        names: of the files, as they were given.
        rows: each measurement once, in the order in which it was first met; ``run`` is kept where
            it tells that the order is that of the measurements.
        notes: by run and problem key.
        summary: what was left out, and why.
    """

    names: list[str] = field(default_factory=list)
    rows: list[Measurement] = field(default_factory=list)
    notes: dict[tuple[str, str], Notes] = field(default_factory=dict)
    summary: exchange.Summary = field(default_factory=exchange.Summary)


def read_sources(paths: Sequence[Path], chip: str | None = None) -> Sources:
    """The rows of databases and record files; with no path, those of the user's database.

    Files that are named are taken as coming from elsewhere: see `metalgen.database.untrusted`.

    Args:
        paths: databases or files of records.
        chip: only this chip's rows.

    Raises:
        ArgumentError: a file that is neither, or no row (of `chip`).
        DatabaseError: the user's database cannot be read.
    """
    sources = Sources()
    rows: dict[exchange.Key, Measurement] = {}
    for path in paths or (user_database(),):
        for m in _own(sources) if _is_own(path) else _other(path, sources):
            if not _drawable(m):
                sources.summary.reject(path, "row", f"a time beyond {SHORTEST:g} to {LONGEST:g} s")
                continue
            key = exchange.identity(m)
            rows[key] = _joined(rows[key], m) if key in rows else m
    chips = sorted({m.chip for m in rows.values()})
    sources.rows = [m for m in rows.values() if chip in (None, m.chip)]
    names = ", ".join(sources.names)
    if not chips:
        raise ArgumentError(
            "FILE", "at least one row; `metalgen tune` makes some", f"{names} with none"
        )
    if not sources.rows:
        raise ArgumentError("--chip", f"a chip with rows in {names}: {', '.join(chips)}", chip)
    return sources


def _drawable(m: Measurement) -> bool:
    known = (m.seconds, m.default_seconds, m.mlx_seconds, m.spread, *m.samples)
    times = [t for t in known if t]
    return all(SHORTEST <= t <= LONGEST for t in times)


def _joined(a: Measurement, b: Measurement) -> Measurement:
    return dataclasses.replace(
        exchange.join(dataclasses.replace(a, run=""), dataclasses.replace(b, run="")),
        run=a.run if a.run not in ORDERLESS else b.run,
    )


def _is_own(path: Path) -> bool:
    return path.absolute() == user_database().absolute()


def _own(sources: Sources) -> Iterable[Measurement]:
    with Store.open(read_only=True) as store:
        sources.names.append(str(store.path))
        for run in store.runs():
            sources.notes |= _notes(run.id, run.notes)
        return store.measurements()


def _other(path: Path, sources: Sources) -> Iterable[Measurement]:
    sources.names.append(str(path))
    part = exchange.Summary()
    rows = list(exchange.read(path, part))
    if part.refused:
        raise ArgumentError("FILE", "a tuning database or a file of records", _why(part))
    if part.rejected and not rows:
        raise ArgumentError("FILE", "a tuning database or a file of records", _why(part))
    sources.summary.rejected += part.rejected
    sources.summary.reasons += part.reasons
    if not rows or not is_database(path):
        return rows
    runs: dict[exchange.Key, str] = {}
    with open_untrusted(path) as connection:
        for run, notes in connection.execute("SELECT id, notes FROM runs"):
            sources.notes |= _notes(run, notes)
        identities = connection.execute(
            "SELECT p.key, s.key, m.template_hash, m.chip, m.cores, m.device, m.provenance, "
            "m.policy, m.phase, m.run FROM measurements m JOIN problems p ON p.id = m.problem "
            "JOIN schedules s ON s.id = m.schedule"
        )
        for *identity, run in identities:
            runs[tuple(identity)] = run
    return [dataclasses.replace(m, run=str(runs.get(exchange.identity(m), ""))) for m in rows]


def _why(summary: exchange.Summary) -> str:
    file, place, reason = summary.reasons[0]
    return f"{file} ({place}: {reason})"


def _notes(run: object, text: object) -> dict[tuple[str, str], Notes]:
    """What a run's record says of each problem; whatever is not as it should be is left out."""
    if not isinstance(run, str) or not isinstance(text, str):
        return {}
    try:
        document = parse_object(text)
    except ValueError:
        return {}
    return {
        (run, key): Notes(
            _fraction(value.get("noise_floor")),
            tuple(_list(value.get("drift"))),
            value["outliers"] if type(value.get("outliers")) is int else 0,
        )
        for key, value in document.items()
        if isinstance(value, dict)
    }


def _fraction(value: object) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _list(value: object) -> list[float]:
    if not isinstance(value, list):
        return []
    return [x for x in value if isinstance(x, float) and math.isfinite(x)]


MOST_FIELDS = 24
"""Fields of a policy that are told."""


def policy_words(policy: str) -> list[tuple[str, str]]:
    """The fields of a policy as names and values; the text itself where it has none."""
    try:
        document: Any = json.loads(policy)
        if isinstance(document, dict) and 0 < len(document) <= MOST_FIELDS:
            return [
                (
                    str(name).replace("_", " "),
                    value if isinstance(value, str) else json.dumps(value),
                )
                for name, value in sorted(document.items())
            ]
    except (ValueError, RecursionError):
        pass
    return [("text", policy)]
