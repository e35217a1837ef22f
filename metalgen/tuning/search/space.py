"""The declared space of schedules: which values each parameter may take, and when.

Parameters are conditional: one whose condition does not hold has a single value, so no two points
are the same schedule. What the declaration cannot say (threadgroup memory, threads) is left to
`metalgen.schedule.check_schedule`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from metalgen.config import AttentionConfig
from metalgen.errors import InvalidSchedule
from metalgen.schedule import (
    APPLE,
    Limits,
    Schedule,
    check_schedule,
    default_schedule,
    default_value_parts,
    widest_row,
)
from metalgen.targets import TARGETS
from metalgen.tuning.search.finite import FiniteSpace

Point = Mapping[str, Any]
"""Values of the parameters declared so far, by name."""


def always(point: Point) -> bool:
    """The condition of a parameter that is free everywhere."""
    return True


@dataclass(frozen=True)
class Parameter:
    """One dimension of a space.

    Args:
        name: of the field of `Schedule`.
        choices: the values, in ascending order.
        active: whether the parameter is free, given those declared before it.
        inactive: its value when it is not.
    """

    name: str
    choices: tuple[Any, ...]
    active: Callable[[Point], bool] = always
    inactive: Any = None

    def values(self, point: Point) -> tuple[Any, ...]:
        """The values it may take beside those of `point`."""
        return self.choices if self.active(point) else (self.inactive,)


@dataclass(frozen=True)
class Space:
    """The schedules of one config within some limits.

    Args:
        config: what to compute.
        limits: what a threadgroup may use.
        parameters: in the order in which their conditions refer to each other.
    """

    config: AttentionConfig
    limits: Limits
    family: str
    parameters: tuple[Parameter, ...]

    def schedule(self, point: Point) -> Schedule:
        """The schedule of a point; ``bq`` follows from the rows that the simdgroups own."""
        rows = TARGETS[self.limits.target].row_block * point["row_blocks"]
        sharing = point.get("key_simdgroups", 1)
        return Schedule(bq=rows * point["simdgroups"] // sharing, **point)

    @property
    def default(self) -> Schedule:
        """The default schedule, which is in every space."""
        return default_schedule(self.config, self.limits, self.family)

    def point(self, schedule: Schedule) -> dict[str, Any] | None:
        """The values of the parameters that give a schedule, or None if no point does."""
        point: dict[str, Any] = {}
        for parameter in self.parameters:
            value = getattr(schedule, parameter.name)
            if value not in parameter.values(point):
                return None
            point[parameter.name] = value
        return point if self.schedule(point) == schedule else None

    def free(self, schedule: Schedule) -> dict[str, Any] | None:
        """The values of the parameters that have a choice in a schedule; None as of `point`."""
        point = self.point(schedule)
        if point is None:
            return None
        return {p.name: point[p.name] for p in self.parameters if len(p.values(point)) > 1}

    def valid(self, schedule: Schedule) -> bool:
        """Whether a schedule keeps every rule."""
        try:
            check_schedule(self.config, schedule, self.limits, self.family)
        except InvalidSchedule:
            return False
        return True

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point, valid or not, in the order of the declared choices."""

        def extend(point: dict[str, Any], depth: int) -> Iterator[dict[str, Any]]:
            if depth == len(self.parameters):
                yield point
                return
            parameter = self.parameters[depth]
            for value in parameter.values(point):
                yield from extend(point | {parameter.name: value}, depth + 1)

        return extend({}, 0)


def space(
    config: AttentionConfig,
    limits: Limits = APPLE,
    family: str = "forward",
    *,
    math_modes: tuple[str, ...] = ("safe",),
) -> Space:
    """The space of a family.

    Args:
        config: what to compute.
        limits: what a threadgroup may use, and the target.
        family: ``"forward"`` or ``"decode"``.
        math_modes: Metal's math modes to try; others than ``"safe"`` change nothing that the chip
            model sees, so they are worth trying only where a device measures.
    """
    target = TARGETS[limits.target]
    only = dict(target.choices)
    own_parts = default_value_parts(config, target)
    widest = widest_row(config, own_parts, target)
    # The default schedule's slice is among the choices, so that it is a point of every space.
    slices = {w for w in (32, 64, 128, default_schedule(config, limits, family).bd) if w <= widest}
    if target.name == "cuda":  # stages whole rows
        slices = {widest}
    staging = ("threadgroup", "device")
    fragments = ("input", "float32") if config.dtype == "bfloat16" else ("input",)

    def staged(point: Point) -> bool:
        return "threadgroup" in (point["k_source"], point["v_source"])

    def several(point: Point) -> bool:
        return bool(point["simdgroups"] > 1)

    # Few rows do not keep several warps busy, unless these share out the keys.
    sharing = (Parameter("key_simdgroups", (1, 2, 4), several, 1),)
    return Space(
        config,
        limits,
        family,
        (
            Parameter("splits", (1, 2, 4, 8, 16, 32, 64) if family == "decode" else (1,)),
            Parameter("row_blocks", (1, 2) if family == "decode" else (1, 2, 4)),
            Parameter("simdgroups", (1, 2, 4) if family == "decode" else (1, 2, 4, 8, 16)),
            Parameter(
                "bk", (16, 32, 48, 64, 96, 128) if target.name == "cuda" else (8, 16, 32, 64)
            ),
            Parameter("q_source", ("registers", "threadgroup")),
            Parameter("k_source", only.get("k_source", staging)),
            Parameter("v_source", only.get("v_source", staging)),
            Parameter("bd", tuple(sorted(slices | {widest})), staged, widest),
            Parameter("buffers", tuple(range(1, target.buffers + 1)), staged, 1),
            Parameter("load_width", only.get("load_width", (2, 4, 8))),
            Parameter("fragment", only.get("fragment", fragments)),
            Parameter("math_mode", only.get("math_mode", math_modes)),
            Parameter(
                "value_parts", (own_parts, 2 * own_parts) if 1 < own_parts < 4 else (own_parts,)
            ),
            *(sharing if (target.name, family) == ("cuda", "decode") else ()),
        ),
    )


@functools.lru_cache(maxsize=64)
def enumerate_valid(
    config: AttentionConfig,
    limits: Limits = APPLE,
    family: str = "forward",
    math_modes: tuple[str, ...] = ("safe",),
) -> tuple[Schedule, ...]:
    """Every valid schedule of the space, the default one first, each once."""
    declared = space(config, limits, family, math_modes=math_modes)
    found = [default_schedule(config, limits, family)]
    schedules = map(declared.schedule, declared.points())
    found += [s for s in schedules if s != found[0] and declared.valid(s)]
    return tuple(found)


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
    """Every valid schedule of a space (see `space`), and its points."""
    declared = space(config, limits, family, math_modes=math_modes)
    valid = enumerate_valid(config, limits, family, math_modes)
    points = [declared.free(schedule) or {} for schedule in valid]
    choices = {p.name: p.choices for p in declared.parameters if len(p.choices) > 1}
    inactive = {p.name: p.inactive for p in declared.parameters}
    return Candidates(valid, FiniteSpace(choices, points, inactive))
