"""Contributions: what one machine measured, as a folder that others can check and take over.

A contribution holds exactly `FILES`: the records, the machine, the proof of its installation, and
a summary for a pull request that follows from the other three. Whoever receives one treats it as
hostile until `faults` finds nothing.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalgen.chips import Chip
from metalgen.database import exchange
from metalgen.database.errors import DatabaseError, printable
from metalgen.database.measurement import Measurement, host
from metalgen.database.protocol import TuningStore
from metalgen.database.untrusted import parse_object
from metalgen.errors import ArgumentError, MetalgenError
from metalgen.plurals import counted
from metalgen.source.hashes import present_templates

RECORDS, ABOUT, PROOF, SUMMARY = "records.jsonl", "about.json", "verification.json", "SUMMARY.md"
FILES = (ABOUT, RECORDS, SUMMARY, PROOF)
FORMAT = 1
MOST_BYTES = 1 << 25
"""Bytes of a file of a contribution other than its records."""
WORTH = 1.02
"""Times as fast as the default schedule from which a summary names a problem."""


ABOUT_FIELDS: dict[str, type] = {
    **dict.fromkeys(("metalgen_contribution", "cores", "records"), int),
    **dict.fromkeys(("chip", "device", "records_sha256"), str),
    **dict.fromkeys(("os", "mlx_version", "metalgen_version"), str),
}
"""Of `ABOUT`."""


class ContributionError(MetalgenError):
    """A contribution that cannot be written or read."""


@dataclass(frozen=True)
class Contribution:
    """What a folder holds.

    Args:
        about: chip, cores, versions, and the digest of the records.
        records: measured and verified finals.
        verification: what `metalgen verify` found on the machine.
    """

    about: dict[str, Any]
    records: tuple[Measurement, ...]
    verification: dict[str, Any]


def collect(store: TuningStore, chip: Chip, verification: dict[str, Any]) -> Contribution:
    """A machine's contribution: its measured, verified finals under the present templates.

    Args:
        store: the user's database.
        chip: this machine's.
        verification: the document that `metalgen verify` writes.

    Raises:
        ContributionError: there is nothing to contribute, or the verification found faults.
    """
    rows = store.measurements(chip=chip.name, provenance="measured", verified=True, phase="final")
    current = present_templates()
    kept = [exchange.canonical(m) for m in rows if m.template_hash in current]
    if not kept:
        raise ContributionError(
            f"no measured and verified final of {chip.name} under the present templates: "
            "`metalgen tune` on this machine makes some"
        )
    if verification.get("faults") != 0 or verification.get("interrupted"):
        raise ContributionError("the verification found faults or was interrupted: see its file")
    records = tuple(sorted(kept, key=Measurement.to_line))
    about = {
        "metalgen_contribution": FORMAT,
        "chip": chip.name,
        "cores": chip.cores,
        "device": verification.get("device"),
        "records": len(records),
        "records_sha256": hashlib.sha256(_lines(records)).hexdigest(),
        **host(),
    }
    return Contribution(about, records, verification)


def write(contribution: Contribution, folder: Path) -> None:
    """Write a new folder, whole or not at all.

    Raises:
        ArgumentError: it exists, or cannot be written.
    """
    if folder.exists():
        raise ArgumentError("--output", "a folder that does not exist", str(folder))
    part = folder.with_name(f".{folder.name}.part")
    contents = {
        RECORDS: _lines(contribution.records),
        ABOUT: _json(contribution.about),
        PROOF: _json(contribution.verification),
        SUMMARY: summary(contribution).encode(),
    }
    try:
        part.mkdir(parents=True)
        for name, data in contents.items():
            (part / name).write_bytes(data)
        part.rename(folder)
    except OSError as error:
        for name in FILES:
            (part / name).unlink(missing_ok=True)
        if part.is_dir():
            part.rmdir()
        expected = f"a folder to write ({error.strerror})"
        raise ArgumentError("--output", expected, str(folder)) from error


def _lines(records: Iterable[Measurement]) -> bytes:
    return "".join(m.to_line() + "\n" for m in records).encode()


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, sort_keys=True, indent=1).encode() + b"\n"


def read(folder: Path) -> tuple[Contribution | None, list[str]]:
    """A contribution from elsewhere, and everything that is wrong with it.

    Nothing of it is executed, and no file other than `FILES` is opened.
    """
    found: list[str] = []
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if set(names) != set(FILES) or any((folder / name).is_symlink() for name in FILES):
        some = ", ".join(printable(name, 40) for name in names[:8]) or "nothing"
        return None, [f"expected a folder with {', '.join(FILES)}, but got {some}"]
    about, verification = (_object(folder / name, found) for name in (ABOUT, PROOF))
    outcome = exchange.Summary()
    records = tuple(exchange.read(folder / RECORDS, outcome))
    found += [f"{RECORDS}, {place}: {reason}" for _, place, reason in outcome.reasons]
    if outcome.rejected + outcome.refused > len(outcome.reasons):
        found.append(f"{RECORDS}: {outcome.rejected} bad rows in all")
    if found or about is None or verification is None:
        return None, found
    contribution = Contribution(about, records, verification)
    return contribution, _faults(folder, contribution)


def _plain(text: Any) -> bool:
    """Whether a text may stand in a summary: short, and without marks of Markdown."""
    return len(text) <= 100 and all(c.isalnum() or c in " .,_-+/()" for c in text)


def _object(path: Path, found: list[str]) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        return parse_object(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, DatabaseError) as error:
        found.append(f"{path.name}: {printable(str(error), 120)}")
        return None


def _faults(folder: Path, c: Contribution) -> list[str]:
    """What of a contribution that can be read does not fit together."""
    found = []
    if c.about.get("metalgen_contribution") != FORMAT:
        return [f"{ABOUT}: expected format {FORMAT}"]
    for name, kind in ABOUT_FIELDS.items():
        value = c.about.get(name)
        if type(value) is not kind or (kind is str and not _plain(value)):
            return [f"{ABOUT}: expected {name} to be {'text' if kind is str else 'an integer'}"]
    if extra := c.about.keys() - ABOUT_FIELDS.keys():
        return [f"{ABOUT}: an unknown field {printable(min(extra), 40)}"]
    data = (folder / RECORDS).read_bytes()
    if data != _lines(sorted(set(c.records), key=Measurement.to_line)):
        found.append(f"{RECORDS}: not in canonical order and form (see `metalgen db export`)")
    if hashlib.sha256(data).hexdigest() != c.about.get("records_sha256"):
        found.append(f"{ABOUT}: records_sha256 is not that of {RECORDS}")
    if not c.records:
        found.append(f"{RECORDS}: no rows")
    own = {"chip": c.about.get("chip"), "cores": c.about.get("cores")}
    for number, m in enumerate(c.records, 1):
        if {"chip": m.chip, "cores": m.cores} != own:
            found.append(f"{RECORDS}, row {number}: of {m.chip} with {m.cores} cores, not of {own}")
        if (m.provenance, m.phase, m.status, m.verified) != ("measured", "final", "ok", True):
            found.append(f"{RECORDS}, row {number}: not a measured and verified final")
        if m.device != c.about.get("device"):
            found.append(f"{RECORDS}, row {number}: measured on {m.device}, another device")
    proof = c.verification
    outcomes = proof.get("outcomes")
    complete = isinstance(outcomes, list) and len(outcomes) == proof.get("total") and outcomes
    if not complete or proof.get("interrupted") or proof.get("faults") != 0:
        found.append(f"{PROOF}: not a complete verification without faults")
    elif any(not isinstance(o, dict) or o.get("status") != "ok" for o in outcomes or ()):
        found.append(f"{PROOF}: it counts no faults and lists some")
    if proof.get("device") != c.about.get("device"):
        found.append(f"{PROOF}: of another device than {ABOUT} names")
    if not found and (folder / SUMMARY).read_bytes() != summary(c).encode():
        found.append(f"{SUMMARY}: not the summary of the other files")
    return found[:40]


def summary(c: Contribution) -> str:
    """What a pull request says of a contribution, in Markdown."""
    rows = sorted(c.records, key=lambda m: (m.problem.key, m.seconds or 0.0))
    best: dict[str, Measurement] = {}
    for m in rows:
        best.setdefault(m.problem.key, m)
    lines = [
        f"# Tuning records of {c.about['chip']} ({c.about['cores']} GPU cores)",
        "",
        f"{counted(len(rows), 'measured and verified final')} of "
        f"{counted(len(best), 'problem')}, measured on device `{c.about['device']}` with "
        f"{c.about['os']}, MLX {c.about['mlx_version']}, metalgen {c.about['metalgen_version']}. "
        f"Verification: {counted(len(c.verification['outcomes']), 'kernel')} right.",
        "",
        "| problem | best schedule | milliseconds | over the default | over MLX |",
        "| --- | --- | --- | --- | --- |",
    ]
    for m in best.values():
        assert m.seconds is not None
        gain, mlx = (
            f"{seconds / m.seconds:.2f}x" if seconds else "-"
            for seconds in (m.default_seconds, m.mlx_seconds)
        )
        lines.append(f"| {m.problem} | `{m.schedule}` | {m.seconds * 1e3:.4g} | {gain} | {mlx} |")
    faster = sum(
        m.default_seconds > WORTH * m.seconds
        for m in best.values()
        if m.default_seconds and m.seconds
    )
    lines += [
        "",
        f"{faster} of {counted(len(best), 'problem')} are at least {100 * (WORTH - 1):.0f} % "
        "faster than with the default schedule.",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Spread:
    """One schedule of one problem as several contributors measured it.

    Args:
        measurement: the first contributor's.
        seconds: each contributor's median.
    """

    measurement: Measurement
    seconds: tuple[float, ...]

    @property
    def middle(self) -> float:
        """The median of the contributors."""
        return statistics.median(self.seconds)

    @property
    def range(self) -> float:
        """The slowest contributor's time over the quickest's, less 1."""
        return max(self.seconds) / min(self.seconds) - 1.0


def spread(contributions: Sequence[Contribution]) -> list[Spread]:
    """Schedules that more than one contributor measured, the greatest spread first.

    Rows count as the same where problem, schedule, templates, chip and device are; machines'
    systems and versions, which policies name, may differ.
    """
    groups: dict[tuple[str, ...], list[Measurement]] = {}
    for c in contributions:
        for m in c.records:
            key = (m.problem.key, m.schedule.key, m.template_hash, m.chip, m.device)
            groups.setdefault(key, []).append(m)
    found = [
        Spread(rows[0], tuple(m.seconds for m in rows if m.seconds))
        for rows in groups.values()
        if len(rows) > 1
    ]
    return sorted(found, key=lambda s: (-s.range, s.measurement.to_line()))
