"""Schedules by the chip model, where it is the clock."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from metalgen.families import Schedule
from metalgen.families.sizes import Problem

if TYPE_CHECKING:
    from metalgen.chips import Chip


def rank(
    problem: Problem,
    schedules: Iterable[Schedule],
    chip: Chip,
    tick: Callable[[int, float, Schedule], None] | None = None,
) -> list[tuple[float, Schedule]]:
    """Predicted seconds of schedules on a chip, the quickest first; ties by their keys.

    Args:
        problem: what to run.
        schedules: valid ones.
        chip: whose model to ask.
        tick: called now and then with how many were ranked, and the best so far.

    Raises:
        IncompleteChip: the chip lacks figures that the model needs.
    """
    from metalgen.chips.model import predict

    ranked = []
    best, best_seconds = None, math.inf
    for n, schedule in enumerate(schedules, 1):
        seconds = predict(problem, schedule, chip).seconds
        ranked.append((seconds, schedule))
        if seconds < best_seconds:
            best, best_seconds = schedule, seconds
        if tick and best and n % 512 == 0:
            tick(n, best_seconds, best)
    ranked.sort(key=lambda pair: (pair[0], pair[1].key))
    return ranked
