"""The page: everything that it says, put into words and places, and one file written whole.

The page needs no network and no script, and forbids itself both by a content security policy.
Whatever comes from a row is text: Jinja escapes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalgen._version import __version__
from metalgen.database.measurement import now
from metalgen.families import Schedule
from metalgen.plurals import counted
from metalgen.report import charts
from metalgen.report.overview import (
    Roof,
    by_model,
    bytes_of,
    operations,
    roofs,
    score_bytes,
)
from metalgen.report.results import (
    HeatMap,
    Result,
    drawn,
    heat_maps,
    importances,
    milestones,
    results,
    steps,
)
from metalgen.report.sources import Sources, policy_words
from metalgen.report.writing import check_target, write_whole
from metalgen.schedules import all_knobs

OPEN = 3
"""Up to so many results of a kind are unfolded from the start."""
KNOBS = all_knobs()
SELDOM = tuple(KNOBS)[tuple(KNOBS).index("fragment") + 1 :]
"""Fields of a schedule that nearly always have their defaults."""
MOST_RESULTS = 400
"""Results of one page, in their order; the rest is counted."""
MOST_MODELS = 60
"""Models of a page's table, those with the greatest gains."""
RANKS = (1, 10, 100, 1000)
"""Ranks for which a page tells the predicted time."""
MOST_FINALS = 40
"""Finalists of a result that are shown, the quickest first."""
MIB = 1 << 20
MOST_CHARACTERS = 1000
"""Of one text from a row."""


def write_report(
    path: Path, sources: Sources, tick: Callable[[int, int], None] | None = None
) -> list[Result]:
    """Write the page about some rows, whole or not at all; returns what it is about.

    Args:
        path: the file; an earlier page is replaced, any other file is not.
        sources: at least one row.
        tick: called with the number of results drawn and of all.

    Raises:
        ArgumentError: `path` cannot be written, or is something else than a page.
    """
    check_target(path)
    found = results(sources)
    # The name of a file need not be text.
    write_whole(path, render(sources, found, tick).encode("utf-8", "replace"))
    return found


def render(
    sources: Sources, found: Sequence[Result], tick: Callable[[int, int], None] | None = None
) -> str:
    """The HTML of the page."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "ms": milliseconds,
        "number": number,
        "times": times,
        "percent": percent,
        "short": short,
        "file_name": file_name,
    }
    environment.globals |= {"charts": charts, "counted": counted}
    kinds = []
    place = 0
    shown = found[:MOST_RESULTS]
    alike = Counter(map(_looks, shown))
    for name in ("measured", "modelled"):
        mine = [r for r in shown if r.provenance == name]
        axis = charts.speed_axis(
            v for r in mine for v in (r.gain, _mlx_speed(r)) if v and v <= 2 * charts.FAR
        )
        views = []
        for r in mine:
            place += 1
            views.append(_view(r, place, axis, alike[_looks(r)] > 1))
            if tick:
                tick(place, len(shown))
        kinds.append(
            {
                "name": name,
                "views": views,
                "axis": axis,
                "unfold": len(mine) <= OPEN,
                "models": by_model(mine)[:MOST_MODELS],
                "roofs": [_roof(roof) for roof in roofs(mine)],
            }
        )
    return environment.get_template("page.html.jinja").render(
        kinds=kinds,
        sources=sources,
        made=now(),
        version=__version__,
        counts=_counts(found),
        hidden=len(found) - len(shown),
    )


@dataclass(frozen=True)
class View:
    """What the page says of one result; the template adds the words around it."""

    id: str
    result: Result
    title: str
    sizes: str
    family: str
    made: str
    state: str
    fields: list[tuple[str, str, str]]
    speed: float | None
    mlx_speed: float | None
    finals: dict[str, Any] | None
    progress: dict[str, Any] | None
    importances: list[tuple[str, float]]
    maps: list[dict[str, Any]]
    facts: list[tuple[str, str]]


def _roof(roof: Roof) -> dict[str, Any]:
    points = [(p.intensity, p.rate) for p in roof.points]
    others = [(p.intensity, p.mlx) for p in roof.points if p.mlx]
    best = max(rate for _, rate in points)
    return {
        "chip": roof.chip,
        "chart": charts.roofline(points, others, roof.operations, roof.bytes),
        "results": len(points),
        "best": best / 1e12,
        "share": best / roof.operations if roof.operations else None,
        "operations": roof.operations and roof.operations / 1e12,
        "bytes": roof.bytes and roof.bytes / 1e9,
        "with_mlx": bool(others),
    }


def _looks(r: Result) -> tuple[object, ...]:
    """What a summary says of a result, apart from what came out."""
    return r.problem, r.chip, r.provenance


def _view(r: Result, place: int, axis: charts.Axis, dated: bool) -> View:
    """A result; `dated` where another one looks the same, but for its policy or templates."""
    p = r.problem
    newest = max(m.created for m in r.rows)
    queries = counted(p.q_len, "query", "queries")
    return View(
        id=f"result-{place}",
        result=r,
        title=str(p.config),
        sizes=f"{p.batch_heads} batch x heads, {queries}, {counted(p.kv_len, 'key')}",
        family=p.family,
        made=newest.replace("T", " ")[:16] if dated else "",
        state=_state(r),
        fields=_fields(r),
        speed=axis(r.gain) if r.gain else None,
        mlx_speed=axis(speed) if (speed := _mlx_speed(r)) else None,
        finals=_finals(r),
        progress=_progress(r),
        importances=importances(_searched_times(r)),
        maps=[_map(r, m) for m in heat_maps(r)],
        facts=_facts(r),
    )


def _mlx_speed(r: Result) -> float | None:
    """MLX's speed as a multiple of the default schedule's."""
    return r.default_seconds / r.mlx_seconds if r.default_seconds and r.mlx_seconds else None


def _searched_times(r: Result) -> dict[Schedule, float]:
    """Times of one kind, of which importance is reckoned: the search's, or the whole space."""
    if r.whole:
        return r.landscape
    if r.provenance == "modelled":
        return {}  # only the best of the predictions are kept: they say nothing of the rest
    return {m.schedule: m.seconds for m in r.searched if m.status == "ok" and m.seconds}


def _state(r: Result) -> str:
    if r.winner is None:
        return "nothing ran"
    words = ["checked" if r.winner.verified else "not checked"]
    if r.provenance == "measured":
        words.insert(0, "final" if r.winner.phase == "final" else "search only")
    if not r.current:
        words.append("earlier templates")
    return ", ".join(words)


def _fields(r: Result) -> list[tuple[str, str, str]]:
    """Each field of the winner and of the default schedule."""
    if r.winner is None:
        return []
    mine, default = r.winner.schedule, r.default
    both = [s for s in (mine, default) if s]
    absent = "–" if default else "unknown"  # which a default of another matrix kind lacks
    return [
        (name, str(getattr(mine, name)), str(getattr(default, name, absent)))
        for name, knob in mine.knobs.items()
        # What is seldom chosen is told only where it was.
        if name not in SELDOM or any(getattr(s, name, knob.default) != knob.default for s in both)
    ]


def _finals(r: Result) -> dict[str, Any] | None:
    rows = [m for m in r.finals if m.seconds]
    if r.provenance != "measured" or not rows:
        return None
    marks = [t for t in (r.default_seconds, r.mlx_seconds) if t]
    found, places, ends = charts.strips([(m.samples, m.seconds or 0.0) for m in rows], marks)
    names = [n for n, t in (("default", r.default_seconds), ("mlx", r.mlx_seconds)) if t]
    return {
        "rows": list(zip(rows, found, strict=True))[:MOST_FINALS],
        "hidden": max(0, len(rows) - MOST_FINALS),
        "marks": dict(zip(names, places, strict=True)),
        "ends": ends,
    }


def _progress(r: Result) -> dict[str, Any] | None:
    """The search's picture: its own course, what drawing would find, or predictions by rank."""
    if r.provenance == "modelled":
        return _ranking(r)
    marks: dict[str, Any] = {"default": r.default_seconds, "mlx": r.mlx_seconds}
    taken = steps(r)
    if taken and taken[-1].best is not None:
        line: list[tuple[float, float]] = []
        for s in taken:
            if s.best is not None and (not line or s.best < line[-1][1]):
                line.append((s.number, s.best))
        return {
            "kind": "course",
            "lines": ["best, ms"],
            "total": len(taken),
            "table": [(n, taken[n - 1].best) for n in milestones(len(taken))],
            "chart": charts.chart(
                [*line, (float(len(taken)), line[-1][1])],
                step=True,
                end=len(taken),
                dots=[(s.number, s.seconds) for s in taken if s.seconds],
                failed=[s.number for s in taken if s.seconds is None],
                **marks,
            ),
        }
    rows = r.searched
    if len(rows) < 2 or not any(m.status == "ok" for m in rows):
        return None
    times = [m.seconds if m.status == "ok" else None for m in rows]
    numbers = _spaced(len(rows))
    draws = drawn(times, numbers)
    known = [d for d in draws if d.middle is not None and d.high is not None]
    return {
        "kind": "drawn",
        "lines": ["lucky 10 %, ms", "median, ms", "unlucky 10 %, ms"],
        "total": len(rows),
        "table": [(d.number, d.low, d.middle, d.high) for d in drawn(times, milestones(len(rows)))],
        "chart": charts.chart(
            [(d.number, d.middle) for d in known if d.middle],
            log=True,
            end=len(rows),
            band=[(d.number, d.low or 0.0, d.high or 0.0) for d in known],
            **marks,
        ),
    }


def _ranking(r: Result) -> dict[str, Any] | None:
    ranked = sorted(r.landscape.values())
    if len(ranked) < 2:
        return None
    return {
        "kind": "ranking",
        "lines": ["predicted, ms"],
        "total": len(ranked),
        "table": [(n, ranked[n - 1]) for n in milestones(len(ranked), RANKS)],
        "chart": charts.chart(
            [(n, ranked[n - 1]) for n in _spaced(len(ranked))],
            log=len(ranked) > 100,
            end=len(ranked),
            default=r.default_seconds,
            far=1.5,
        ),
    }


def _spaced(total: int, most: int = 80) -> list[int]:
    """Whole numbers from 1 to `total`, at about equal factors."""
    if total <= most:
        return list(range(1, total + 1))
    return sorted({round(total ** (n / (most - 1))) for n in range(most)})


def _map(r: Result, m: HeatMap) -> dict[str, Any]:
    best = min((c.seconds for c in m.cells.values() if c.seconds), default=None)
    won = r.winner.schedule if r.winner else None
    cells = {
        place: (c, charts.shade(c.seconds / best) if c.seconds and best else None)
        for place, c in m.cells.items()
    }
    place = (getattr(won, m.row), won.bk) if won else None
    return {"map": m, "cells": cells, "best": best, "winner": place}


def _facts(r: Result) -> list[tuple[str, str]]:
    """Where the rows come from, in pairs of name and value."""
    dates = sorted(m.created for m in r.rows)
    samples = [len(m.samples) for m in r.finals if m.samples]
    facts = [
        ("provenance", r.provenance),
        ("chip", f"{r.chip}, {r.cores} GPU cores"),
        ("executed by", r.device if r.provenance == "measured" else "nothing: the chip model"),
        ("system", _all(m.os for m in r.rows)),
        ("MLX", _all(m.mlx_version for m in r.rows)),
        ("metalgen", _all(m.metalgen_version for m in r.rows)),
        (
            "templates",
            ", ".join(r.template_hashes) + ("" if r.current else " (not the present ones)"),
        ),
        ("dates", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"),
        (
            "rows",
            f"{len(r.rows)}: {len(r.searched)} of the search, {counted(len(r.finals), 'final')}",
        ),
        ("operations", f"{operations(r) / 1e9:.4g} billion, of the scores that masks keep"),
        ("arrays", f"{bytes_of(r) / MIB:.4g} MiB of queries, keys, values and outputs"),
        (
            "never stored",
            f"{score_bytes(r) / MIB:.4g} MiB of scores, which unfused attention keeps",
        ),
        ("failed", ", ".join(f"{n} {s}" for s, n in r.failed.items()) or "none"),
    ]
    if r.provenance == "measured":
        floor = r.notes.noise_floor
        facts += [
            ("noise floor", "not in these sources" if floor is None else percent(floor, 2)),
            (
                "drift seen",
                ", ".join(f"{100 * x:+.2f} %" for x in r.notes.drift) or "none on record",
            ),
            ("outliers", str(r.notes.outliers) if r.notes.drift or floor else "none on record"),
            ("samples of a final", _range(samples)),
        ]
    facts += [(f"policy: {name}", value) for name, value in policy_words(r.policy)]
    facts.append(("config", r.problem.config.key))
    return facts


def _range(counts: Sequence[int]) -> str:
    ends = dict.fromkeys((min(counts, default=0), max(counts, default=0)))
    return " to ".join(map(str, ends))


def _all(values: Any) -> str:
    known = sorted({v for v in values if v})
    return ", ".join(known[:5] + [f"and {len(known) - 5} more"] * (len(known) > 5)) or "unknown"


def _counts(found: Sequence[Result]) -> dict[str, Any]:
    return {
        name: {
            "results": len(mine),
            "rows": sum(len(r.rows) for r in mine),
            "chips": ", ".join(sorted({r.chip for r in mine})),
        }
        for name in ("measured", "modelled")
        if (mine := [r for r in found if r.provenance == name]) or True
    }


def milliseconds(seconds: float | None) -> str:
    """A time with four digits that count, such as ``0.3616 ms`` or ``12.40 ms``."""
    return number(seconds) + ("" if seconds is None else " ms")


def number(seconds: float | None) -> str:
    """The same without its unit; a dash for none."""
    if seconds is None:
        return "–"
    ms = seconds * 1e3
    if ms >= 1e6:
        return f"{ms:.3e}"
    for decimals, least in ((0, 1000.0), (1, 100.0), (2, 10.0), (3, 1.0), (4, 0.1)):
        if ms >= least:
            return f"{ms:.{decimals}f}"
    return f"{ms:#.4g}"


def times(ratio: float | None) -> str:
    """A ratio such as ``1.12×``; a dash for none."""
    if ratio is None:
        return "–"
    return f"{ratio:.2f}×" if ratio >= 0.1 else f"{ratio:.1g}×"


def percent(share: float | None, digits: int = 1) -> str:
    """A share such as ``1.2 %``; a dash for none."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def file_name(path: str) -> str:
    """The name of a file without its folders, which are nothing that a page has to tell."""
    return Path(path).name


def short(text: object) -> str:
    """A text of which no more than `MOST_CHARACTERS` are left."""
    whole = str(text)
    return whole if len(whole) <= MOST_CHARACTERS else whole[: MOST_CHARACTERS - 1] + "…"
