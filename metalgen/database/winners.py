"""Which row wins: the one rule that tuning, look-ups, commands and reports share.

Rows of one problem on one chip have an order (`ranks`), and the first one that passed its check
wins. Checks have no part in the order. Tuning checks kernels in this order until one passes, so
every row before the winner has failed then, and a check made later for another chip, another size
or a pin cannot put another row first.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from metalgen.database.layout import CHAINED, PHASES, PROVENANCES, WARM
from metalgen.database.measurement import Measurement, host
from metalgen.errors import MetalgenError
from metalgen.families import decode_schedule, get_tuned
from metalgen.families.sizes import Problem

GRAIN = 1.01
"""The chip model cannot tell predictions apart that differ by up to this factor."""

Rank = tuple[Any, ...]
"""The least is the best."""


class Standing(NamedTuple):
    """What of a row decides where it stands; the fields are those of a `Measurement`.

    ``schedule`` is the key of one.
    """

    provenance: str
    policy: str
    phase: str
    detail: str
    seconds: float | None
    default_seconds: float | None
    schedule: str
    mlx_version: str
    os: str

    @classmethod
    def of(cls, m: Measurement) -> Standing:
        """The standing of a measurement."""
        return cls(
            *(m.provenance, m.policy, m.phase, m.detail, m.seconds, m.default_seconds),
            *(m.schedule.key, m.mlx_version, m.os),
        )

    @property
    def stale(self) -> bool:
        """Whether it was measured with another MLX, or another major version of the system."""
        measured = self.provenance == "measured"
        return measured and (self.mlx_version, _major(self.os)) != _software()

    @property
    def warm(self) -> bool:
        """Whether it was measured with a warm cache."""
        return WARM in self.policy


def ranks(problem: Problem, rows: Sequence[Standing], least: float | None = None) -> list[Rank]:
    """The rank of each of several rows of one problem and chip, and of the same templates.

    Measured rows come before modelled ones; then those by the present software, with a cold cache,
    by launches that waited for one another, of the finals, without a reservation; then the quicker
    ones. Predictions within `GRAIN` of the least one are equal, unless they are slower than the
    default schedule's: of these the ones that read fewer bytes come first, which is less heat and
    contention. Ties are decided by the schedules' keys.

    Args:
        problem: what the rows are about.
        rows: all of them, or some.
        least: the least prediction in seconds; None: that of these rows.
    """
    predictions = [row.seconds for row in rows if row.provenance == "modelled" and row.seconds]
    grain = GRAIN * (least or min(predictions, default=0.0))

    def rank(row: Standing) -> Rank:
        seconds = math.inf if row.seconds is None else row.seconds
        modelled = row.provenance == "modelled"
        near = modelled and seconds <= grain and seconds <= (row.default_seconds or math.inf)
        return (
            _place(row.provenance, PROVENANCES),
            row.stale,
            row.warm,
            CHAINED not in row.policy,
            _place(row.phase, PHASES),
            bool(row.detail),
            modelled and not near,
            bytes_read(problem, row.schedule) if near else 0,
            seconds,
            row.schedule,
        )

    return [rank(row) for row in rows]


def ordered(rows: Iterable[Measurement]) -> list[Measurement]:
    """Rows of any problems and chips, the best first; whether they passed a check plays no part.

    All are of the present templates, or none.
    """
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in rows:
        groups.setdefault((m.problem.key, m.chip), []).append(m)
    ranked: list[tuple[Rank, int, Measurement]] = []
    for group in groups.values():
        found = ranks(group[0].problem, [Standing.of(m) for m in group])
        ranked += [(rank, len(ranked) + n, group[n]) for n, rank in enumerate(found)]
    return [m for _, _, m in sorted(ranked, key=lambda each: each[:2])]


def winner(rows: Iterable[Measurement]) -> Measurement | None:
    """The row that wins among rows of one problem and chip; None if none passed its check.

    A row whose measurement did not end, such as a pruned one, never wins.
    """
    return next((m for m in ordered(rows) if m.verified and m.status == "ok"), None)


def winners(rows: Iterable[Measurement]) -> list[Measurement]:
    """The winner of each chip and problem, in the order of their names and keys."""
    groups: dict[tuple[str, str], list[Measurement]] = {}
    for m in rows:
        groups.setdefault((m.chip, m.problem.key), []).append(m)
    found = (winner(groups[place]) for place in sorted(groups))
    return [m for m in found if m is not None]


@functools.lru_cache(maxsize=4096)
def bytes_read(problem: Problem, schedule: str) -> float:
    """Bytes of Q, K and V that a call reads, if that tells schedules of its family apart.

    Infinite where they are not counted.
    """
    sizes = {"batch_heads": problem.batch_heads, "q_len": problem.q_len, "kv_len": problem.kv_len}
    try:
        found = decode_schedule(json.loads(schedule), problem.family)
        return get_tuned(problem.family).bytes_read(problem.config, found, **sizes)
    except (MetalgenError, ValueError, ArithmeticError, RecursionError):
        return math.inf


def _place(name: str, names: tuple[str, ...]) -> int:
    return names.index(name) if name in names else len(names)


def _software() -> tuple[str, str]:
    """This MLX, and the major version of this operating system."""
    here = host()
    return here["mlx_version"], _major(here["os"])


def _major(system: str) -> str:
    return system.partition(".")[0]
