"""What a kernel family is: what is tuned, and everything that depends on which one it is."""

from __future__ import annotations

import abc
import dataclasses
from dataclasses import dataclass

from metalgen.families.launch import Launch
from metalgen.kinds import Kind
from metalgen.kinds.base import Require
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Schedule


@dataclass(frozen=True)
class Step:
    """One rendered kernel of a family.

    Args:
        name: as in the kernel's name and in digests of sources.
        template: the file in ``templates/families/`` without its suffix.
        merges: whether it merges the partial outputs of the step before.
    """

    name: str
    template: str
    merges: bool = False


class Family(abc.ABC):
    """A kernel that is tuned: its steps, knobs, rules, launches and checks.

    Attributes:
        name: as in stored problems.
        few_rows: whether its calls have few query rows: the rows of all heads that share a KV
            head make one block, and the keys of a row are shared out.
        main: its main step.
    """

    name: str
    few_rows: bool = False
    main: Step

    def knobs(self, kind: Kind) -> tuple[Knob, ...]:
        """What its schedules with a kind choose, in the order in which a search enumerates them."""
        return kind.knobs

    def steps(self, schedule: Schedule) -> tuple[Step, ...]:
        """The kernels that a call runs, in order."""
        return (self.main,)

    @abc.abstractmethod
    def takes(self, config: AttentionConfig, q_len: int) -> bool:
        """Whether calls of a config with so many queries belong to this family."""

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:  # noqa: B027
        """The family's own rules for schedules."""

    @abc.abstractmethod
    def launches(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        shape: tuple[int, int, int],
        keys: int,
        sequences: int = 0,
        most_groups: int = (1 << 31) - 1,
    ) -> list[Launch]:
        """The dispatches of a call, in the order of the rows that they compute.

        Args:
            shape: ``(B, H, Lq)`` of the queries.
            keys: how many keys a sequence has at most.
            sequences: how many packed sequences there are.
            most_groups: threadgroups of a dispatch along y and along z.
        """

    @abc.abstractmethod
    def check_sizes(self, config: AttentionConfig, schedule: Schedule) -> list[tuple[int, int]]:
        """Numbers of queries and keys of the calls by which a kernel is checked."""


def at_most(knobs: tuple[Knob, ...], most: dict[str, int]) -> tuple[Knob, ...]:
    """Knobs of which a search tries only values up to a bound, by name."""

    def bounded(knob: Knob) -> Knob:
        if knob.name not in most or not isinstance(knob.tried, tuple):
            return knob
        tried = tuple(value for value in knob.tried if value <= most[knob.name])
        return dataclasses.replace(knob, tried=tried)

    return tuple(bounded(knob) for knob in knobs)
