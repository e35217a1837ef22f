"""Rows whose pictures can be reckoned by hand, and pages as a parser sees them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.families import Schedule, default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.report.results import Result, results
from metalgen.report.sources import read_sources
from metalgen.source.hashes import template_hash

CONFIG = AttentionConfig(head_dim=64, causal=True, heads_per_kv=4)
PROBLEM = Problem(CONFIG, batch_heads=32, q_len=1024, kv_len=1024)
DEFAULT = default_schedule(CONFIG)
OTHER = Schedule(bq=32, bk=16, bd=64, simdgroups=4)
THIRD = Schedule(bq=32, bk=8, bd=32, simdgroups=4, buffers=2)
SOFTWARE = {"os": "macOS 26.1", "mlx_version": "0.32.4", "metalgen_version": "0.1.0"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{7919*7907}}"


def row(schedule: Schedule = DEFAULT, seconds: float | None = 1e-3, **changes: Any) -> Measurement:
    """A row of a search on M3Max, measured, unless `changes` say otherwise."""
    fields: dict[str, Any] = {
        "problem": PROBLEM,
        "template_hash": template_hash(schedule),
        "chip": "M3Max",
        "cores": 40,
        "device": "metal",
        "provenance": "measured",
        "policy": '{"repetitions":7,"timer":"wall"}',
        "created": "2026-11-21T08:00:00Z",
        **SOFTWARE,
    }
    return Measurement(schedule=schedule, seconds=seconds, **(fields | changes))


def final(schedule: Schedule, seconds: float, **changes: Any) -> Measurement:
    """A final that passed its check."""
    samples = (0.99 * seconds, seconds, 1.02 * seconds)
    fields = {"phase": "final", "verified": True, "samples": samples, "spread": 0.015 * seconds}
    return row(schedule, seconds, **(fields | changes))


def modelled(schedule: Schedule, seconds: float, **changes: Any) -> Measurement:
    """A prediction; its policy is none of the present chip model, unless `changes` say so."""
    fields = {"provenance": "modelled", "device": "model", "policy": '{"model":"00000000"}'}
    return row(schedule, seconds, **(fields | changes))


def records(path: Path, rows: Iterable[Measurement]) -> Path:
    """A file of records."""
    path.write_text("".join(sorted(m.to_line() + "\n" for m in rows)))
    return path


def database(path: Path, rows: Iterable[Measurement], notes: dict[str, Any] | None = None) -> Path:
    """A database whose rows were committed in this order, by one run with these notes."""
    with Store.open(path) as store:
        run = store.begin_run("M3Max", 0, notes)
        store.add_measurements(dataclasses.replace(m, run=run) for m in rows)
        store.end_run(run, "finished")
    return path


def results_of(*paths: Path) -> list[Result]:
    """What a report on these files is about."""
    return results(read_sources(paths))


class Page(HTMLParser):
    """The elements of a page, its texts, and what a browser might fetch or run."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []  # section, text
        self.sections = [""]
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "section":
            self.sections.append(dict(attrs)["id"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self.sections.pop()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.sections[-1], " ".join(data.split())))

    def text(self, section: str | None = None) -> str:
        """All text (of a section), without extra spaces."""
        return " ".join(t for s, t in self.texts if section in (None, s))
