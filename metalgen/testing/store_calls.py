"""Changes of a store, made up at random, to be applied to several that must come to the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from metalgen.database import exchange
from metalgen.database.exchange import Summary
from metalgen.database.measurement import Measurement
from metalgen.database.protocol import TuningStore
from metalgen.testing.plain_store import PlainStore
from metalgen.testing.rows import CONFIG, FIRST, HASH, OTHER_HASH, PROBLEM, SECOND, THIRD, row
from metalgen.testing.store_base import CHAINED_POLICY, LONGER, NEAR, WARM_POLICY

Call = Callable[[Any, Callable[..., Summary]], object]
"""Takes a store and its merge."""


def records(path: Path, *rows: Measurement) -> Path:
    """A file with the records of some rows."""
    path.write_text("".join(m.to_line() + "\n" for m in rows), encoding="utf-8")
    return path


def plain_merge(store: PlainStore, sources: list[Path], *, dry_run: bool = False) -> Summary:
    """The definition's merge, with the arguments of the others."""
    return store.merge(sources, dry_run=dry_run)


def some_rows(draw: random.Random, count: int) -> dict[exchange.Key, Measurement]:
    """Rows that meet often: few identities, many outcomes."""
    rows = {}
    for _ in range(count):
        samples = tuple(draw.choice((1e-3, 2e-3, 3e-3, 5e-3)) for _ in range(draw.randint(1, 3)))
        status = draw.choice(("ok", "ok", "ok", "wrong", "runtime"))
        guessed = draw.random() < 0.3
        model = json.dumps({"model": draw.choice("ab")})
        kind: dict[str, Any] = {
            "provenance": "modelled",
            "device": "model",
            "policy": model,
            "phase": "search",
        }
        m = row(
            draw.choice((FIRST, SECOND, THIRD)),
            sorted(samples)[len(samples) // 2],
            samples=samples,
            problem=draw.choice((PROBLEM, PROBLEM, NEAR, LONGER)),
            chip=draw.choice(("M3Max", "M3Max", "M3Max-30", "M3", "M1")),
            status=status,
            verified=status == "ok" and draw.random() < 0.3,
            error=draw.choice((None, 1e-4)) if status == "ok" else None,
            mlx_seconds=draw.choice((None, 1e-3, 2e-3)),
            detail=draw.choice(("", "", "a", "b")),
            source_hash=draw.choice(("", "0" * 16)),
            template_hash=draw.choice((HASH, HASH, HASH, OTHER_HASH)),
            created=f"2026-11-{draw.randint(10, 21)}T08:00:00Z",
        )
        m = replace(
            m,
            phase=draw.choice(("search", "final")),
            policy=draw.choice((m.policy, m.policy, CHAINED_POLICY, WARM_POLICY)),
            mlx_version=draw.choice((m.mlx_version, m.mlx_version, "0.1.0")),
        )
        if guessed:
            m = replace(m, **kind)
        rows[exchange.identity(m)] = m
    return rows


def some_call(draw: random.Random, path: Path) -> Call:
    """One of the changes of a store, with arguments; to be applied to several."""
    rows = list(some_rows(draw, draw.randint(1, 4)).values())
    schedule = draw.choice((FIRST, SECOND, THIRD))
    kind = draw.choice(("add", "add", "add", "merge", "check", "check", "pin", "unpin", "prune"))
    if kind == "add":
        again = draw.random() < 0.5

        def add(store: TuningStore, merge: object) -> object:
            run = store.begin_run("M3Max", 1)
            mine = [replace(m, run=run) for m in rows]
            return store.add_measurements(mine, replace_predictions={HASH} if again else ())

        return add
    if kind == "merge":
        records(path, *rows)
        return lambda store, merge: merge(store, [path], dry_run=False)
    if kind == "check":
        device = draw.choice(("metal", "simulator"))
        status = draw.choice(("ok", "ok", "wrong", "timeout"))
        error = draw.choice((None, 1e-4, 0.5, float("inf")))
        detail = "" if status == "ok" else "a reason"
        kernel = (CONFIG, schedule, HASH, device, status)
        return lambda store, merge: store.record_check(*kernel, error=error, detail=detail)
    problem = draw.choice((PROBLEM, NEAR))
    if kind == "pin":
        return lambda store, merge: store.pin(problem, schedule)
    if kind == "unpin":
        return lambda store, merge: store.unpin(problem)
    chip, keep = draw.choice(("M3Max", "M1", "M3")), draw.choice((None, {HASH}))
    provenance, dry = draw.choice((None, "modelled")), draw.random() < 0.5
    return lambda store, merge: store.prune(
        keep_templates=keep, provenance=provenance, chip=chip, dry_run=dry
    )
