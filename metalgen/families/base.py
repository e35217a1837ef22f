"""What a kernel family is: its steps, and everything that depends on which one it is."""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

from metalgen.features.base import Site
from metalgen.kinds import Kind
from metalgen.kinds.base import Require
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Limits, Schedule

if TYPE_CHECKING:
    from metalgen.kinds.operands import Operands


class Output(NamedTuple):
    """An array that a kernel makes: its name, its shape, and its type by MLX's name."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Dispatch(NamedTuple):
    """One launch of a step: threadgroups along x, y and z, and the arrays that it makes.

    `zeroed`: whether these begin with zeros, because the kernel adds to them.
    """

    groups: tuple[int, int, int]
    outputs: tuple[Output, ...]
    zeroed: bool = False


class Step(abc.ABC):
    """One rendered kernel of a family.

    Attributes:
        name: as in the kernel's name and in digests of sources.
        template: the file in ``templates/families/`` without its suffix.
    """

    name: str
    template: str

    @abc.abstractmethod
    def inputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        """Names of the arrays that the kernel reads, in order.

        Those of a step that follows another are that one's outputs.
        """

    @abc.abstractmethod
    def outputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        """Names of the arrays that it makes, in order."""

    @abc.abstractmethod
    def threads(self, schedule: Schedule) -> int:
        """Threads per threadgroup."""

    @abc.abstractmethod
    def rows(self, config: AttentionConfig, schedule: Schedule) -> int:
        """Rows per threadgroup."""

    @abc.abstractmethod
    def variables(self, config: AttentionConfig, schedule: Schedule) -> dict[str, Any]:
        """What the template substitutes, in addition to what a language, a kind and features give.

        ``constants`` are named numbers of the kernel's text; those of a kind's plan and of features
        follow them.
        """

    def operands(self, config: AttentionConfig, schedule: Schedule) -> Operands | None:
        """What its main loop multiplies; None where it makes no products."""
        return None

    def site(self, config: AttentionConfig, schedule: Schedule) -> Site | None:
        """Where features find themselves; None where the template has no hooks for them."""
        return None

    @property
    def has_hooks(self) -> bool:
        """Whether features may add code to its template."""
        return type(self).site is not Step.site

    def math_mode(self, schedule: Schedule) -> str:
        """Metal's math mode."""
        return "safe"

    def dynamic_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        """Bytes of dynamic shared memory that a launch asks for."""
        return 0


class Family(abc.ABC):
    """Kernels for one purpose: steps, knobs and rules of schedules.

    Families whose calls compute attention are `metalgen.families.attention.AttentionFamily`.

    Attributes:
        name: as in schedules, and in stored problems.
        main: its main step.
        own, traversed: names of the operands whose rows a threadgroup owns, and of those that it
            passes over; none in a family without matrix products.
        together: whether the rows of a pass are fetched together, of all operands, because several
            products read the same ones.
        adds: whether a product contracts owned rows, and adds to rows in memory.
    """

    name: str
    main: Step
    own: tuple[str, ...] = ()
    traversed: tuple[str, ...] = ()
    together: bool = False
    adds: bool = False

    def knobs(self, kind: Kind | None) -> tuple[Knob, ...]:
        """What its schedules choose, in the order in which a search enumerates them.

        Args:
            kind: of the schedules; None: in a language, without matrix products.
        """
        return kind.knobs_of(self.own, self.traversed) if kind else ()

    def defaults(self, kind: Kind, config: AttentionConfig, limits: Limits) -> list[dict[str, Any]]:
        """Its schedules with a kind before anything was tuned, the best first, as values of knobs;
        those that break a rule or do not fit are left out by the caller."""
        return []

    def registers(self, kind: Kind, config: AttentionConfig, schedule: Schedule) -> int | None:
        """Estimated 16-bit registers per thread; None where there is no estimate."""
        return None

    def words(self, schedule: Schedule) -> list[str]:
        """The words of ``str(schedule)`` for schedules without a kind."""
        return [f"{name}{getattr(schedule, name)}" for name in schedule.knobs]

    def steps(self, schedule: Schedule) -> tuple[Step, ...]:
        """The kernels that a call runs, in order."""
        return (self.main,)

    @property
    def possible_steps(self) -> tuple[Step, ...]:
        """All kernels that a call may run, whatever its schedule."""
        return (self.main,)

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:  # noqa: B027
        """The family's own rules for schedules."""


class TunedFamily(Family):
    """A family whose kernels are tuned: rows are about problems of it.

    Attributes:
        deterministic_q_len: number of queries of the problem that stands for all deterministic
            calls of a config.
    """

    deterministic_q_len: int

    def bytes_read(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        *,
        batch_heads: int,
        q_len: int,
        kv_len: int,
    ) -> int:
        """Bytes of Q, K and V that a call reads, where that tells schedules apart; else 0.

        Args:
            batch_heads: batch entries times query heads.
            q_len, kv_len: number of queries and of keys, from 1.

        Raises:
            InvalidSchedule: a schedule with a kind that is not counted.
        """
        return 0


def at_most(knobs: tuple[Knob, ...], most: dict[str, int]) -> tuple[Knob, ...]:
    """Knobs of which a search tries only values up to a bound, by name."""

    def bounded(knob: Knob) -> Knob:
        if knob.name not in most or not isinstance(knob.tried, tuple):
            return knob
        tried = tuple(value for value in knob.tried if value <= most[knob.name])
        return dataclasses.replace(knob, tried=tried)

    return tuple(bounded(knob) for knob in knobs)
