"""Recorded spaces: every valid point with its measured time, searched again without a device.

Two kinds of file are read. Ours (``.jsonl``): lines of `Measurement.to_line`, as `metalgen db
export` writes them; each problem, chip and template hash makes one space. Kernel Tuner's
(``.json``, ``.json.gz``): its cache files, of which public collections exist. Both hold data only;
nothing in them is executed.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metalgen.database.measurement import Measurement
from metalgen.errors import ArgumentError, MetalgenError
from metalgen.families import Parameter
from metalgen.tuning.search.finite import FiniteSpace

MAX_BYTES = 1 << 28
"""Bytes of the largest recording that is read, unpacked."""

Entry = tuple[Any, ...]
"""One value a parameter."""


@dataclass(frozen=True)
class Recording:
    """A space whose every point was measured.

    Args:
        group: recordings of one group are the same space on several devices.
        device: what measured it.
        parameters: with the values that occur.
        times: seconds of every valid entry; None where it did not run.
        start: the entry that a search tries first.
        family: recordings of one family and device are of one kernel on several problems; empty
            where nothing is known of that.
    """

    group: str
    device: str
    parameters: tuple[Parameter, ...]
    times: Mapping[Entry, float | None]
    start: Entry
    family: str = ""

    @property
    def best(self) -> float:
        """Seconds of the optimum."""
        return min(t for t in self.times.values() if t is not None)

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All entries; the points of `finite` are in the same order."""
        return tuple(self.times)

    @functools.cached_property
    def finite(self) -> FiniteSpace:
        """The space as samplers see it."""
        free = {p.name: p.choices for p in self.parameters if len(p.choices) > 1}
        return FiniteSpace(free, map(self.point, self.entries))

    def point(self, entry: Entry) -> dict[str, Any]:
        """The values of an entry that have a choice."""
        pairs = zip(self.parameters, entry, strict=True)
        return {p.name: value for p, value in pairs if len(p.choices) > 1}


def read_recordings(folder: Path) -> list[Recording]:
    """Every recording under a folder, in the order of their files; a subfolder makes a group.

    Raises:
        ArgumentError: a file that is no recording, or none at all.
    """
    found: list[Recording] = []
    for path in sorted(folder.rglob("*")):
        if path.name.endswith((".json", ".json.gz")):
            found.append(_kernel_tuner(path, path.parent.name))
        elif path.name.endswith((".jsonl", ".jsonl.gz")):
            found += _ours(path)
    if not found:
        raise ArgumentError("spaces", "a folder of recordings (.jsonl, .json, .json.gz)", folder)
    return found


def _text(path: Path) -> str:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ArgumentError("spaces", f"recordings of at most {MAX_BYTES} bytes", str(path))
    return data.decode("utf-8", errors="replace")


def _ours(path: Path) -> list[Recording]:
    from metalgen.chips import get_chip
    from metalgen.families import default_schedule

    groups: dict[tuple[str, str, str, str], dict[Entry, float | None]] = {}
    starts: dict[tuple[str, str, str, str], Entry] = {}
    names: dict[tuple[str, str, str, str], list[str]] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        try:
            m = Measurement.from_line(line)
        except MetalgenError as error:
            raise ArgumentError("spaces", f"records in {path.name}:{number}", str(error)) from error
        if (
            m.phase != "search"
            or m.provenance != "measured"
            or getattr(m.schedule, "math_mode", "safe") != "safe"
        ):
            continue
        key = (str(m.problem), m.chip, m.problem.family, m.template_hash)
        own = names.setdefault(
            key, [name for name in m.schedule.knobs if name not in ("bq", "math_mode")]
        )
        entry = tuple(getattr(m.schedule, name) for name in own)
        groups.setdefault(key, {})[entry] = m.seconds if m.status == "ok" else None
        if key not in starts:
            problem, limits = m.problem, get_chip(m.chip).limits
            default = default_schedule(problem.config, limits, problem.family)
            if default.kind != m.schedule.kind:  # recorded before the chip's present matrix kind
                limits = replace(limits, instructions=())
                default = default_schedule(problem.config, limits, problem.family)
            starts[key] = tuple(getattr(default, name) for name in own)
    return [
        _recording(key[0], key[1], names[key], times, starts.get(key), key[2])
        for key, times in groups.items()
    ]


def _kernel_tuner(path: Path, group: str) -> Recording:
    try:
        document = json.loads(_text(path))
        names = [str(name) for name in document["tune_params_keys"]]
        times: dict[Entry, float | None] = {}
        for row in document["cache"].values():
            time = row["time"]
            ran = isinstance(time, int | float) and 0 < time < math.inf
            times[tuple(_scalar(row[name]) for name in names)] = time / 1e3 if ran else None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArgumentError("spaces", "a cache file of Kernel Tuner", str(path)) from error
    return _recording(group, path.name.partition(".")[0], names, times, None)


def _scalar(value: object) -> int | float | str:
    if not isinstance(value, int | float | str):
        raise TypeError("not a plain value")
    return value


def _recording(
    group: str,
    device: str,
    names: list[str],
    times: dict[Entry, float | None],
    start: Entry | None,
    family: str = "",
) -> Recording:
    if not any(t is not None for t in times.values()):
        raise ArgumentError("spaces", "a recording with at least one time", f"{group} {device}")
    parameters = []
    for n, name in enumerate(names):
        values = {entry[n] for entry in times}
        parameters.append(Parameter(name, tuple(sorted(values, key=lambda v: (str(type(v)), v)))))
    ranks = [{value: rank for rank, value in enumerate(p.choices)} for p in parameters]
    # A recording without a default: its middle entry, in the order of the parameters.
    ordered = sorted(times, key=lambda e: [r[v] for r, v in zip(ranks, e, strict=True)])
    start = start if start in times else ordered[len(ordered) // 2]
    assert start is not None
    return Recording(group, device, tuple(parameters), times, start, family)
