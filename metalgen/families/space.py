"""The declared space of schedules: which values each knob may take, and when.

Knobs are conditional: one whose condition does not hold has a single value, so no two points are
the same schedule. What the declarations cannot say (threadgroup memory, threads) is left to
`metalgen.families.check_schedule`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from metalgen.families.registry import get_family
from metalgen.families.rules import default_schedule, device_kinds, is_valid
from metalgen.kinds import Kind, get_kind
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import APPLE, Knob, Limits, Point, Schedule, always, schedule_type


@dataclass(frozen=True)
class Parameter:
    """One dimension of a space.

    Args:
        name: of the schedule's knob, or ``"kind"``.
        choices: the values, in ascending order.
        active: whether the parameter is free, given those declared before it.
        inactive: its value when it is not.
    """

    name: str
    choices: tuple[Any, ...]
    active: Callable[[Point], bool] = always
    inactive: Any = None

    def values(self, point: Point) -> tuple[Any, ...]:
        """The values it may take next to those of `point`."""
        return self.choices if self.active(point) else (self.inactive,)


@dataclass(frozen=True)
class Space:
    """The schedules of one config within some limits.

    Args:
        config: what to compute.
        limits: what a threadgroup may use.
        family: name of the kernel family.
        kinds: names of the matrix kinds; where there are several, the first parameter names one.
        parameters: in the order in which their conditions refer to each other.
    """

    config: AttentionConfig
    limits: Limits
    family: str
    kinds: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    def schedule(self, point: Point) -> Schedule:
        """The schedule of a point; ``bq`` follows from the rows that the simdgroups own."""
        kind = get_kind(point.get("kind", self.kinds[0]))
        made = schedule_type(self.family, kind.name)
        values = {name: value for name, value in point.items() if name in made.knobs}
        return made(bq=kind.rows(values), **values)

    @property
    def default(self) -> Schedule:
        """The default schedule, which is in every space."""
        return default_schedule(self.config, self.limits, self.family)

    def point(self, schedule: Schedule) -> dict[str, Any] | None:
        """The values of the parameters that give a schedule, or None if no point does."""
        point: dict[str, Any] = {}
        for parameter in self.parameters:
            value = getattr(schedule, parameter.name, None)  # None: its kind has no such knob
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
        return is_valid(self.config, schedule, self.limits)

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point, valid or not, in the order of the declared choices."""

        point: dict[str, Any] = {}
        last = len(self.parameters) - 1

        def extend(depth: int) -> Iterator[dict[str, Any]]:
            parameter = self.parameters[depth]
            for value in parameter.values(point):
                point[parameter.name] = value
                if depth == last:
                    yield point.copy()
                else:
                    yield from extend(depth + 1)
            point.pop(parameter.name, None)

        return extend(0) if self.parameters else iter([{}])


def space(
    config: AttentionConfig,
    limits: Limits = APPLE,
    family: str = "forward",
    *,
    math_modes: tuple[str, ...] = ("safe",),
) -> Space:
    """The space of a family, over all kinds that it has kernels for within the limits.

    Args:
        config: what to compute.
        limits: what a threadgroup may use, and the language.
        family: name of the kernel family.
        math_modes: Metal's math modes to try; others than ``"safe"`` change nothing that the chip
            model sees, so they are worth trying only where a device measures.
    """
    kinds = device_kinds(limits, family)
    own = {kind.name: _parameters(config, limits, family, kind, math_modes) for kind in kinds}
    first = kinds[0].name
    parameters = own[first] if len(kinds) == 1 else _union(own)
    return Space(config, limits, family, tuple(own), tuple(parameters.values()))


def _parameters(
    config: AttentionConfig,
    limits: Limits,
    family: str,
    kind: Kind,
    math_modes: tuple[str, ...],
) -> dict[str, Parameter]:
    def bound(knob: Knob) -> Parameter:
        tried = math_modes if knob.name == "math_mode" else knob.candidates(config, limits)
        inactive = knob.inactive(config) if callable(knob.inactive) else knob.inactive
        return Parameter(knob.name, tried, knob.active, inactive)

    knobs = get_family(family).knobs(kind)
    return {knob.name: bound(knob) for knob in knobs if knob.tried is not None}


def _union(own: dict[str, dict[str, Parameter]]) -> dict[str, Parameter]:
    """One space of several kinds: the kind, then all knobs, each free where its kind has it."""

    def merged(name: str) -> Parameter:
        having = {kind: own[kind][name] for kind in own if name in own[kind]}
        choices = dict.fromkeys(value for p in having.values() for value in p.choices)

        class Merged(Parameter):
            def values(self, point: Point) -> tuple[Any, ...]:
                parameter = having.get(point["kind"])
                return parameter.values(point) if parameter else (None,)

        return Merged(name, tuple(choices))

    names = dict.fromkeys(name for parameters in own.values() for name in parameters)
    return {"kind": Parameter("kind", tuple(own))} | {name: merged(name) for name in names}


def enumerate_valid(
    config: AttentionConfig,
    limits: Limits = APPLE,
    family: str = "forward",
    math_modes: tuple[str, ...] = ("safe",),
) -> tuple[Schedule, ...]:
    """Every valid schedule of the space, the default one first, each once."""
    types = tuple(schedule_type(family, kind.name) for kind in device_kinds(limits, family))
    return _enumerated(config, limits, family, math_modes, types)


@functools.lru_cache(maxsize=64)
def _enumerated(
    config: AttentionConfig,
    limits: Limits,
    family: str,
    math_modes: tuple[str, ...],
    types: tuple[type[Schedule], ...],
) -> tuple[Schedule, ...]:
    """The same for the types of schedules that are registered."""
    declared = space(config, limits, family, math_modes=math_modes)
    found = [default_schedule(config, limits, family)]
    schedules = map(declared.schedule, declared.points())
    found += [s for s in schedules if s != found[0] and declared.valid(s)]
    return tuple(found)
