"""Optuna studies of tuning records, for Optuna's dashboard and whatever else reads them.

A study holds one `Result`, a trial one row. Nothing of a study is read back.
"""

from __future__ import annotations

import contextlib
import sqlite3
import warnings
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalgen.database.measurement import Measurement
from metalgen.errors import MetalgenError
from metalgen.families import ORDINARY, Space, space
from metalgen.report.results import Result, results
from metalgen.report.sources import Sources
from metalgen.report.writing import check_target, replacing

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.trial import FrozenTrial

SQLITE = (".db", ".sqlite", ".sqlite3")
"""Endings of SQLite storages; every other file is a journal."""


def write_studies(path: Path, sources: Sources) -> dict[str, Result]:
    """Write a new storage, whole or not at all: a study of each result (see `results`).

    Args:
        path: a new file: SQLite where it ends in one of `SQLITE`, else Optuna's journal, which is
            written much faster.
        sources: at least one row.

    Returns:
        The results, by the names of their studies.

    Raises:
        ArgumentError: `path` exists, or cannot be written.
    """
    check_target(path, new=True)
    found: dict[str, Result] = {}
    for result in results(sources):
        name = study_name(result)
        same = sum(known == name or known.startswith(name + " #") for known in found)
        found[f"{name} #{same + 1}" if same else name] = result
    writing = _sqlite if path.suffix.lower() in SQLITE else _journal
    with replacing(path) as part, _quiet(), writing(part) as storage:
        for name, result in found.items():
            _add(storage, name, result)
    return found


def study_name(r: Result) -> str:
    """Chip, provenance, config and sizes, such as ``H200 measured D64 float16 BH=64 1024x1024``."""
    p = r.problem
    return (
        f"{r.chip} {r.provenance} {p.config} BH={p.batch_heads} {p.q_len}x{p.kv_len}"
        + ("" if p.family == ORDINARY else f" {p.family}")
        + ("" if r.current else f" templates {r.template_hashes[0]}")
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _sqlite(path: Path) -> Iterator[BaseStorage]:
    """A storage in memory that is copied to a file at the end: one trial is many transactions."""
    from optuna.storages import RDBStorage

    storage = RDBStorage("sqlite://")
    try:
        yield storage
        with contextlib.closing(sqlite3.connect(path)) as file:
            connection = storage.engine.raw_connection()
            try:
                connection.backup(file)
            finally:
                connection.close()
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextlib.contextmanager
def _journal(path: Path) -> Iterator[BaseStorage]:
    """A storage whose log is written to a file at the end."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import BaseJournalBackend, JournalFileBackend

    logs: list[dict[str, Any]] = []

    class Memory(BaseJournalBackend):
        def append_logs(self, new: list[dict[str, Any]]) -> None:
            logs.extend(new)

        def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
            return iter(logs[log_number_from:])

    yield JournalStorage(Memory())
    JournalFileBackend(str(path)).append_logs(logs)


def _add(storage: BaseStorage, name: str, r: Result) -> None:
    import optuna

    study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
    study.set_metric_names(["milliseconds"])
    winner = r.winner
    attributes: dict[str, Any] = {
        "problem": r.problem.key,
        "chip": r.chip,
        "cores": r.cores,
        "provenance": r.provenance,
        "device": r.device,
        "template_hashes": list(r.template_hashes),
        "policy": r.policy,
        "default": str(r.default) if r.default else None,
        "default_milliseconds": _milliseconds(r.default_seconds),
        "mlx_milliseconds": _milliseconds(r.mlx_seconds),
        "winner": str(winner.schedule) if winner else None,
        "winner_milliseconds": _milliseconds(winner.seconds) if winner else None,
        "winner_verified": bool(winner and winner.verified),
        "noise_floor": r.notes.noise_floor,
    }
    for key, value in attributes.items():
        if value is not None:
            study.set_user_attr(key, value)
    study.add_trials(_trials(r.rows, _space(r)))


def _space(r: Result) -> Space | None:
    """The declared space that the rows are from; None for a chip that metalgen does not know."""
    from metalgen.chips import get_chip
    from metalgen.tuning.sessions.measured import MeasuredSession
    from metalgen.tuning.sessions.modelled import ModelledSession

    kind = MeasuredSession if r.provenance == "measured" else ModelledSession
    try:
        limits = get_chip(r.chip).limits
        return space(r.problem.config, limits, r.problem.family, math_modes=kind.math_modes)
    except MetalgenError:
        return None


def _trials(rows: Sequence[Measurement], declared: Space | None) -> Iterator[FrozenTrial]:
    from optuna.trial import TrialState, create_trial

    from metalgen.tuning.search.finite import distribution

    states = {"ok": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    choices = {p.name: p.choices for p in declared.parameters} if declared else {}
    for m in rows:
        free = declared.free(m.schedule) if declared else None
        samples = m.samples if m.status in states and m.phase == "search" else ()
        trial = create_trial(
            state=states.get(m.status, TrialState.FAIL),
            value=_milliseconds(m.seconds) if m.status == "ok" else None,
            params=free or {},
            distributions={name: distribution(choices[name]) for name in free or {}},
            user_attrs=_attributes(m) | ({"outside_space": True} if free is None else {}),
            intermediate_values={n: 1e3 * sample for n, sample in enumerate(samples)},
        )
        # Optuna's times have no zone; these are UTC, and a row knows only when it was committed.
        trial.datetime_start = trial.datetime_complete = _date(m.created)
        yield trial


def _date(created: str) -> datetime:
    try:
        return datetime.fromisoformat(created.removesuffix("Z"))
    except ValueError:  # of the right form, but no day or hour that there is
        return datetime(1970, 1, 1)


def _attributes(m: Measurement) -> dict[str, Any]:
    found: dict[str, Any] = {
        "schedule": str(m.schedule),
        "provenance": m.provenance,
        "phase": m.phase,
        "status": m.status,
        "verified": m.verified,
        "detail": m.detail,
        "spread_milliseconds": _milliseconds(m.spread),
        "samples": len(m.samples) or None,
        "error": m.error,
        "software": f"metalgen {m.metalgen_version}, MLX {m.mlx_version}, {m.os}",
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
