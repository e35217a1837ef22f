"""What a matrix kind is: the instructions that make products, and what they fix for schedules."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Limits, Schedule

if TYPE_CHECKING:
    from metalgen.kinds.operands import Operands, Plan

FRAGMENT = 8
"""Rows and columns of the smallest matrix by which work is counted."""

Require = Callable[[str, bool, str], None]
"""``require(rule, holds, detail)`` raises `InvalidSchedule` where a rule does not hold."""


class Kind(abc.ABC):
    """How matrix products are made, and how operands reach them.

    Attributes:
        name: as in stored keys.
        language: name of the language that it is written in.
        templates: its folder in ``templates/kinds/``.
        row_block: query rows of one block of matrices.
        depth: keys, and columns, that one instruction contracts; lengths are padded to it.
        threads: most threads per threadgroup.
        dtypes: the types that it has kernels for.
        knobs: what its schedules choose, in the order in which a search enumerates them.
        few_row_knobs: more knobs of families whose calls have few rows.
        most_registers: a default schedule whose estimate is above comes after those below.
        counted: whether the counts of `metalgen.families.counts` hold for its kernels.
        instructions: what a chip's limits must name for it to be used; empty: every chip of the
            language has it. Where it is there, it comes before the kinds that need nothing.
        backward: whether the backward families have kernels of it.
        adds: whether it has products that contract owned rows (`metalgen.kinds.operands.Added`).
        deciding_simdgroups: that decide together whether their rows see the keys of a pass.
        copying_simdgroups: simdgroups of a threadgroup that own no rows and copy for the others.
    """

    name: str
    language: str
    templates: str
    row_block: int
    depth: int
    threads: int
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    knobs: tuple[Knob, ...]
    few_row_knobs: tuple[Knob, ...] = ()
    most_registers: int = 0
    counted: bool = False
    instructions: str = ""
    backward: bool = True
    adds: bool = False
    deciding_simdgroups: int = 1
    copying_simdgroups: int = 0

    @abc.abstractmethod
    def knobs_of(self, own: tuple[str, ...], traversed: tuple[str, ...]) -> tuple[Knob, ...]:
        """The knobs of schedules that own rows of some operands and pass over those of others."""

    def padded(self, width: int) -> int:
        """A head dimension rounded up to whole matrices."""
        return -(-width // self.depth) * self.depth

    def widest_row(self, config: AttentionConfig, value_parts: int) -> int:
        """The wider of a row of K and a threadgroup's share of a row of V, padded."""
        return max(self.padded(config.head_dim), self.padded(config.v_dim // value_parts))

    def default_value_parts(self, config: AttentionConfig) -> int:
        """Shares of the values of which one fits the registers: of 256 columns at most."""
        group = max(self.depth, 1 if config.kv_bits is None else config.v_group)
        parts = [n for n in (1, 2, 4) if config.v_dim % (n * group) == 0]
        return next((n for n in parts if config.v_dim // n <= 256), 1)

    def rows(self, values: dict[str, Any]) -> int:
        """Query rows per threadgroup (``bq``), which follow from the other knobs."""
        sharing: int = values.get("key_simdgroups", 1)
        rows: int = self.row_block * values["row_blocks"] * values["simdgroups"]
        return rows // sharing

    def registers(self, config: AttentionConfig, schedule: Schedule) -> int | None:
        """Estimated 16-bit registers per thread; None where there is no estimate."""
        return None

    @abc.abstractmethod
    def plan(self, operands: Operands, schedule: Schedule) -> Plan:
        """What the kind's templates substitute, for any family's operands."""

    @abc.abstractmethod
    def threadgroup_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        """Bytes of threadgroup memory that a kernel takes."""

    def dynamic_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        """Bytes of dynamic shared memory that a launch asks for; 0 where kernels declare theirs."""
        return 0

    @abc.abstractmethod
    def words(self, schedule: Schedule) -> list[str]:
        """The words of ``str(schedule)``."""

    @abc.abstractmethod
    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:
        """The kind's own rules; those that all kinds share are checked elsewhere."""

    @abc.abstractmethod
    def defaults(
        self, config: AttentionConfig, limits: Limits, *, few_rows: bool
    ) -> list[dict[str, Any]]:
        """Schedules before anything was tuned, the best first, as values of knobs.

        Those that break a rule, or do not fit `limits`, are left out by the caller, and so are
        values of knobs that the family does not have.

        Args:
            config: what to compute.
            limits: of the chip.
            few_rows: for calls of few query rows, which share out the keys.
        """

    @abc.abstractmethod
    def backward_defaults(
        self, config: AttentionConfig, *, own: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """The same for the backward families.

        Args:
            config: what to compute.
            own: names of the operands whose rows are owned.
        """

    def follow(
        self, config: AttentionConfig, schedule: Schedule, given: dict[str, Any]
    ) -> dict[str, Any]:
        """What has to change in a schedule of which some knobs were set by hand.

        ``bq`` follows from the rows that the simdgroups own, or their number from ``bq`` where only
        that is given.

        Args:
            config: what to compute.
            schedule: as it is with those values set.
            given: the values set by hand, which do not follow from others.
        """
        rows, sharing = self.row_block * schedule.row_blocks, 1
        shared = getattr(schedule, "key_simdgroups", 1)
        if schedule.simdgroups % shared == 0:  # else it is complained about by its own name
            sharing = shared
        if "bq" not in given:
            return {"bq": rows * schedule.simdgroups // sharing}
        if schedule.bq % rows == 0:
            return {"simdgroups": schedule.bq // rows * sharing}
        if "row_blocks" not in given and schedule.bq % self.row_block == 0:
            return {"simdgroups": schedule.bq // self.row_block * sharing, "row_blocks": 1}
        return {}


def value_width(config: AttentionConfig, schedule: Schedule) -> int:
    """Columns of the values that one threadgroup computes with."""
    return int(config.v_dim // schedule.value_parts)


def own_source(name: str) -> Knob:
    """The knob of where the owned rows of an operand stay."""
    return Knob(
        f"{name}_source",
        ("registers", "threadgroup"),
        f"Where {LABELS[name]} is kept.",
        "registers",
        cost="registers: nothing is read again; threadgroup: staged once, read in each pass",
        tried=("registers", "threadgroup"),
    )


LABELS = {"q": "Q", "k": "K", "v": "V", "dout": "dO"}
"""What texts call operands."""


def value_parts(kind: Kind) -> Knob:
    """The knob of how many threadgroups share out the columns of the values."""

    def tried(config: AttentionConfig, limits: Limits) -> tuple[int, ...]:
        own = kind.default_value_parts(config)
        return (own, 2 * own) if 1 < own < 4 else (own,)

    return Knob(
        "value_parts",
        (1, 2, 4),
        "Threadgroups that share the columns of the values.",
        1,
        cost="narrower outputs, each with scores of its own: for rows too wide for the registers",
        tried=tried,
    )
