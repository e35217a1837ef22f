"""The valid schedules of a space, and the same as points for a sampler."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from metalgen.families import APPLE, Limits, Schedule, enumerate_valid, space
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.search.finite import FiniteSpace


@dataclass(frozen=True)
class Candidates:
    """The valid schedules of a space, and the same as points for a sampler.

    This is all that a search knows of a space: named parameters with their choices, and every
    valid point.

    Args:
        schedules: all of them, the default one first.
        finite: their points, in the same order.
    """

    schedules: tuple[Schedule, ...]
    finite: FiniteSpace

    @property
    def default(self) -> Schedule:
        """The schedule that is tried first, and that every other one must beat."""
        return self.schedules[0]

    @functools.cached_property
    def index(self) -> dict[Schedule, int]:
        """The number of each schedule."""
        return {schedule: n for n, schedule in enumerate(self.schedules)}


@functools.lru_cache(maxsize=16)
def candidates(
    config: AttentionConfig,
    limits: Limits = APPLE,
    family: str = "forward",
    math_modes: tuple[str, ...] = ("safe",),
) -> Candidates:
    """Every valid schedule of a space (see `metalgen.families.space`), and its points."""
    declared = space(config, limits, family, math_modes=math_modes)
    valid = enumerate_valid(config, limits, family, math_modes)
    points = [declared.free(schedule) or {} for schedule in valid]
    choices = {p.name: p.choices for p in declared.parameters if len(p.choices) > 1}
    inactive = {p.name: p.inactive for p in declared.parameters}
    return Candidates(valid, FiniteSpace(choices, points, inactive))
