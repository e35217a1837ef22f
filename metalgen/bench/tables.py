"""A benchmark in words: lines for a terminal, a table for spreadsheets, a document for programs."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from metalgen.bench.measuring import Peaks, Ratio, Result, Row, of_rows
from metalgen.bench.unmeasured import CountedRow, ModelledRow
from metalgen.bench.work import Work

MIB = 1 << 20
COLUMNS = (
    *("label", "config", "kind", "train", "batch", "heads", "q_len", "kv_len", "capacity"),
    *("page_size", "entry", "status", "milliseconds", "spread_milliseconds", "tflops", "gbs"),
    *("tokens_per_second", "ratio", "ratio_low", "ratio_high", "peak_mib", "cache_mib", "detail"),
)
"""Of the CSV table."""


def rate(work: Work, seconds: float, unit: str, live_bytes: float = 0.0) -> float:
    """What a call does in a second, in a preset's unit; `live_bytes` of a layout of its own."""
    if unit == "tokens/s":
        return work.tokens / seconds
    if unit == "GB/s":
        return (live_bytes or work.kv_bytes) / seconds / 1e9
    return work.operations / seconds / 1e12


def unit_of(work: Work, unit: str) -> str:
    """The unit of a row: few queries are bound by the bytes of keys and values."""
    return "GB/s" if unit == "TFLOP/s" and work.bound == "memory" else unit


def share(
    work: Work, seconds: float, unit: str, peaks: Peaks | None, live_bytes: float = 0.0
) -> float | None:
    """The part of this device's measured peak that a rate is; None where that means nothing."""
    if peaks is None or unit == "tokens/s":
        return None
    if unit == "GB/s":
        return (live_bytes or work.kv_bytes) / seconds / peaks.bytes
    return work.operations / seconds / peaks.operations


def ratio_words(ratio: Ratio | None) -> str:
    """How many times the baseline's time an entry takes, with its interval."""
    if ratio is None:
        return "1"
    words = f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]"
    return words if ratio.separable else f"{words} not separable"


def row_lines(row: Row, unit: str, peaks: Peaks | None) -> list[tuple[str, ...]]:
    """The cells of a row: a line an entry."""
    own = unit_of(row.work, unit)
    found: list[tuple[str, ...]] = []
    for r in row.results:
        if r.seconds is None or r.spread is None:
            found.append((r.name, "-", r.status, "-", "-", "-", r.detail))
            continue
        part = share(row.work, r.seconds, own, peaks, r.live_bytes)
        words = f"{rate(row.work, r.seconds, own, r.live_bytes):.4g} {own}"
        memory = f"{r.peak_bytes / MIB:.1f} MiB"
        if r.cache_bytes:
            memory = f"cache {r.cache_bytes / MIB:.2f} MiB"
        found.append(
            (
                r.name,
                f"{r.seconds * 1e3:.3f} ms",
                f"± {100 * r.spread / r.seconds:.1f} %",
                words + (f" = {100 * part:.0f} % of peak" if part is not None else ""),
                ratio_words(r.ratio),
                memory,
                r.note,
            )
        )
    return found


HEADER = ("", "median", "IQR", "rate", "time over the baseline's", "memory", "")


def modelled_lines(row: ModelledRow) -> list[tuple[str, ...]]:
    """The cells of a predicted row."""
    return [
        (r.name, "-" if r.seconds is None else f"{r.seconds * 1e3:.3f} ms modelled", r.detail)
        for r in row.results
    ]


def counted_lines(row: CountedRow) -> list[tuple[str, ...]]:
    """The cells of a counted row."""
    c = row.counts
    if not c.products:
        return [("-", c.detail)]
    return [
        ("8x8 products", f"{c.products:,}"),
        ("device bytes", f"{c.device_bytes:,}"),
        ("threadgroup bytes", f"{c.threadgroup_bytes:,}"),
        ("exponentials", f"{c.exponentials:,}"),
        ("findings", str(c.findings)),
        ("schedule", c.detail),
    ]


def summary(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """Each entry over all rows: geometric mean and extremes of its time over the baseline's."""
    lines: list[tuple[str, ...]] = []
    for name, ratios in of_rows(rows).items():
        values = [ratio.value for ratio in ratios]
        apart = sum(not ratio.separable for ratio in ratios)
        lines.append(
            (
                name,
                f"{statistics.geometric_mean(values):.2f}",
                f"{min(values):.2f} to {max(values):.2f}",
                f"{len(values)} rows, {apart} not separable",
            )
        )
    return lines


def by_size(rows: Sequence[Row], name: str) -> list[tuple[str, ...]]:
    """An entry's mean and largest time over the baseline's, by length, head dimension and batch."""
    keys: dict[str, Callable[[Work], int]] = {
        "L": lambda work: work.q_len,
        "D": lambda work: work.config.head_dim,
        "B": lambda work: work.batch,
    }
    lines: list[tuple[str, ...]] = []
    for letter, key in keys.items():
        groups: dict[int, list[float]] = {}
        for row in rows:
            for r in row.results:
                if r.name == name and r.ratio is not None:
                    groups.setdefault(key(row.work), []).append(r.ratio.value)
        for size, values in sorted(groups.items()):
            mean = statistics.geometric_mean(values)
            lines.append((f"{letter}={size}", f"{mean:.2f}", f"{max(values):.2f}"))
    return lines


def csv_text(rows: Iterable[Row]) -> str:
    """A table with a line for each entry of each row, by `COLUMNS`."""
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerows(_record(row.work, result) for result in row.results)
    return file.getvalue()


def _record(work: Work, r: Result) -> dict[str, Any]:
    sizes = {name: getattr(work, name) for name in COLUMNS[3:10] if hasattr(work, name)}
    found: dict[str, Any] = {
        **sizes,
        "label": work.label,
        "config": str(work.config),
        "kind": work.kind,
        "entry": r.name,
        "status": r.status,
        "detail": r.note or r.detail,
    }
    if r.seconds is not None and r.spread is not None:
        found |= {
            "milliseconds": f"{1e3 * r.seconds:.6g}",
            "spread_milliseconds": f"{1e3 * r.spread:.6g}",
            "tflops": f"{rate(work, r.seconds, 'TFLOP/s'):.6g}",
            "gbs": f"{rate(work, r.seconds, 'GB/s', r.live_bytes):.6g}",
            "tokens_per_second": f"{rate(work, r.seconds, 'tokens/s'):.6g}",
            "peak_mib": f"{r.peak_bytes / MIB:.3f}",
            "cache_mib": f"{r.cache_bytes / MIB:.3f}" if r.cache_bytes else "",
        }
    if r.ratio is not None and math.isfinite(r.ratio.value):
        names = ("ratio", "ratio_low", "ratio_high")
        values = (r.ratio.value, r.ratio.low, r.ratio.high)
        found |= {name: f"{value:.4f}" for name, value in zip(names, values, strict=True)}
    return found
