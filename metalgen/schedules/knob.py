"""The declaration of one parameter of a schedule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError

if TYPE_CHECKING:
    from metalgen.problem.config import AttentionConfig
    from metalgen.schedules.limits import Limits

Point = Mapping[str, Any]
"""Values of the knobs declared so far, by name."""

REQUIRED = object()
"""The default of a knob that every schedule states."""


def always(point: Point) -> bool:
    """The condition of a knob that is free everywhere."""
    return True


@dataclass(frozen=True)
class Knob:
    """One parameter of a schedule; everything that is known about it is declared here.

    Schedule types, the range check of stored and given values, the search space, the command
    line's options and the legend in the documentation come from these declarations.

    Args:
        name: the schedule's attribute, and the name in stored keys.
        choices: every value that it may take, whatever the config; in ascending order.
        help: what it is, as ``--help`` prints it.
        default: its value where a schedule does not state it, left out of stored keys; `REQUIRED`
            where every schedule states it.
        cost: what other values change and cost, for the documentation.
        tried: the values that a search tries: a tuple, or a function of the config and the limits;
            None where the knob follows from others.
        active: whether a search is free to choose, given the knobs declared before it.
        inactive: its value where it is not free: a value, or a function of the config.
    """

    name: str
    choices: tuple[Any, ...] | range
    help: str
    default: Any = REQUIRED
    cost: str = ""
    tried: tuple[Any, ...] | Callable[[AttentionConfig, Limits], tuple[Any, ...]] | None = None
    active: Callable[[Point], bool] = always
    inactive: Any = None

    @property
    def is_integer(self) -> bool:
        """Whether its values are integers; otherwise they are words."""
        return type(self.choices[0]) is int

    @property
    def is_required(self) -> bool:
        """Whether every schedule states it."""
        return self.default is REQUIRED

    def candidates(self, config: AttentionConfig, limits: Limits) -> tuple[Any, ...]:
        """The values that a search tries for a config; empty where the knob follows from others."""
        if self.tried is None:
            return ()
        return self.tried(config, limits) if callable(self.tried) else self.tried

    def check(self, value: object) -> None:
        """Whether it may take a value.

        Raises:
            ArgumentError: another type, or a value that is not among the choices.
        """
        choices = self.choices
        if type(value) is not type(choices[0]) or value not in choices:
            raise ArgumentError(self.name, self._expected(), value)

    def canonical(self, value: object) -> object:
        """A value with integers of other libraries as Python's; unchecked."""
        if self.is_integer and type(value) is not int:
            number = as_integer(value)
            return value if number is None else number
        return value

    def _expected(self) -> str:
        choices = self.choices
        if isinstance(choices, range):
            return (
                f"an integer of {choices.start}, {choices.start + choices.step}, ... {choices[-1]}"
            )
        return "one of " + ", ".join(map(repr, choices))
