"""The tuning records that metalgen ships: ``tuning_db/<chip>.jsonl``, one measurement a line."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Set
from pathlib import Path

from metalgen.database.measurement import Measurement
from metalgen.database.winners import ordered
from metalgen.errors import MetalgenError
from metalgen.families.sizes import Problem
from metalgen.resources import MissingResource, tuning_db_dir


def record_file(chip: str, folder: Path | None = None) -> Path:
    """The file that carries a chip's shipped records; it need not exist."""
    return (folder or tuning_db_dir()) / f"{chip.lower()}.jsonl"


def shipped_buckets(
    problem: Problem, chip: str, templates: Set[str], folder: Path | None = None
) -> dict[str, list[Measurement]]:
    """Verified shipped records of the problem's config and family on a chip, by problem key.

    The best first (`metalgen.database.winners`). Lines that are not records are left out. An
    unreadable file is the same as none.
    """
    try:
        path = record_file(chip, folder)
        stamp = path.stat()
        lines = _lines(path, stamp.st_mtime_ns, stamp.st_size)
    except (OSError, MissingResource):
        return {}
    # Lines are canonical, so the key occurs in them as it stands; only those are decoded.
    found: dict[str, list[Measurement]] = {}
    for line in lines:
        if problem.config.key in line and any(each in line for each in templates):
            m = _decode(line)
            if (
                m is not None
                and m.chip == chip
                and m.template_hash in templates
                and m.problem.config == problem.config
                and m.problem.family == problem.family
            ):
                found.setdefault(m.problem.key, []).append(m)
    verified = {key: [m for m in ordered(records) if m.verified] for key, records in found.items()}
    return {key: records for key, records in verified.items() if records}


def recorded(
    problem: Problem, chips: Iterable[str], folder: Path | None = None
) -> list[Measurement]:
    """All shipped records of the problem's config and family on some chips, whatever templates."""
    found = []
    for chip in chips:
        try:
            path = record_file(chip, folder)
            stamp = path.stat()
            lines = _lines(path, stamp.st_mtime_ns, stamp.st_size)
        except (OSError, MissingResource):
            continue
        near = (_decode(line) for line in lines if problem.config.key in line)
        found += [
            m
            for m in near
            if m is not None
            and m.chip == chip
            and m.problem.config == problem.config
            and m.problem.family == problem.family
        ]
    return found


def write_records(path: Path, measurements: Iterable[Measurement]) -> int:
    """Write measurements as canonical lines, sorted, without duplicates; returns how many."""
    lines = sorted({m.to_line() for m in measurements})
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


@functools.lru_cache(maxsize=32)
def _lines(path: Path, mtime: int, size: int) -> tuple[str, ...]:
    text = path.read_bytes().decode("utf-8", errors="replace")
    return tuple(text.splitlines())


@functools.lru_cache(maxsize=4096)
def _decode(line: str) -> Measurement | None:
    try:
        return Measurement.from_line(line)
    except MetalgenError:
        return None
