"""From a config and a schedule to the steps that a template writes down: all the arithmetic.

Fragments are 8x8. Of several neighbouring fragments a lane's elements are made contiguous in
memory, so that one wide load fetches them all: the contraction index of Q and K and the column
index of V and O are permuted within a `Block`, which changes no result.
"""

from __future__ import annotations

from dataclasses import dataclass

from metalgen.kinds import SIMDGROUP, value_width
from metalgen.kinds.simdgroup import FRAGMENT, ROW_PAD_BYTES
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Schedule


@dataclass(frozen=True)
class Run:
    """Blocks of neighbouring columns, each of which a lane loads at once.

    Args:
        column: first column, in the operand's rows.
        local: first column, in the staged slice.
        count: how many blocks.
        fragments: fragments a block (a lane loads twice as many elements of a row of Q and V, and
            as many elements of each of two rows of K).
        ragged: whether a block reaches past the head dimension.
    """

    column: int
    local: int
    count: int
    fragments: int
    ragged: bool

    @property
    def fragment(self) -> int:
        """Index of the first fragment."""
        return self.column // FRAGMENT


@dataclass(frozen=True)
class Copy:
    """How threads copy lines of an input into threadgroup memory, some elements each.

    Args:
        column: first column in the input.
        vectors: moves a line.
        elements: elements a move.
        left: name of the constant that holds the head dimension.
        ragged: whether the last moves reach past it.
    """

    column: int
    vectors: int
    elements: int
    left: str
    ragged: bool


@dataclass(frozen=True)
class Step:
    """One slice of K or V: staged (or read directly), then multiplied.

    Args:
        operand: ``"k"`` or ``"v"``.
        column, width: the slice's columns, padded to whole fragments.
        runs: its wide loads.
        copy: how it is staged, or None where it is read directly.
    """

    operand: str
    column: int
    width: int
    runs: tuple[Run, ...]
    copy: Copy | None

    @property
    def staged(self) -> bool:
        """Whether it goes through threadgroup memory."""
        return self.copy is not None


@dataclass(frozen=True)
class ForwardPlan:
    """Everything that the forward template substitutes.

    Args:
        steps: the slices of one pass over ``bk`` keys, in order: all of K, then all of V.
        q_runs, o_runs: wide loads of Q and wide stores of O.
        q_stride: elements between rows of the Q tile in threadgroup memory.
        slot_stride: elements between rows of a staging buffer; ``slot`` its elements.
        q_copy: how Q is staged, or None where it stays in registers.
    """

    steps: tuple[Step, ...]
    q_runs: tuple[Run, ...]
    o_runs: tuple[Run, ...]
    q_stride: int
    slot_stride: int
    slot: int
    q_copy: Copy | None

    @property
    def staged(self) -> tuple[Step, ...]:
        """The steps that go through threadgroup memory, in order."""
        return tuple(step for step in self.steps if step.staged)


def forward_plan(config: AttentionConfig, schedule: Schedule) -> ForwardPlan:
    """The plan of a valid schedule (see `metalgen.families.check_schedule`)."""
    wide = schedule.load_width // 2
    pad = ROW_PAD_BYTES // config.itemsize
    move = min(schedule.load_width, 16 // config.itemsize)
    steps: list[Step] = []
    for operand, width, source in (
        ("k", config.head_dim, schedule.k_source),
        ("v", value_width(config, schedule), schedule.v_source),
    ):
        staged = source == "threadgroup"
        size = min(schedule.bd, SIMDGROUP.padded(width)) if staged else SIMDGROUP.padded(width)
        for column in range(0, SIMDGROUP.padded(width), size):
            columns = min(size, SIMDGROUP.padded(width) - column)
            runs = _runs(column, columns, width, wide)
            copy = _copy(operand, column, columns, width, move) if staged else None
            steps.append(Step(operand, column, columns, runs, copy))
    stride = SIMDGROUP.staged_width(config, schedule) + pad
    q_staged = schedule.q_source == "threadgroup"
    return ForwardPlan(
        steps=tuple(steps),
        q_runs=tuple(run for step in steps if step.operand == "k" for run in step.runs),
        o_runs=tuple(run for step in steps if step.operand == "v" for run in step.runs),
        q_stride=SIMDGROUP.padded(config.head_dim) + pad,
        slot_stride=stride,
        slot=schedule.bk * stride,
        q_copy=_copy("q", 0, SIMDGROUP.padded(config.head_dim), config.head_dim, move)
        if q_staged
        else None,
    )


def _copy(operand: str, column: int, columns: int, width: int, move: int) -> Copy:
    left = "DV" if operand == "v" else "D"
    return Copy(column, columns // move, move, left, column + columns > width)


def _runs(start: int, width: int, head_dim: int, wide: int) -> tuple[Run, ...]:
    """Cut a slice into runs of blocks of `wide` fragments, then of half as many, and so on."""
    runs: list[Run] = []
    column = start
    while wide:
        size = FRAGMENT * wide
        count = (start + width - column) // size
        inside = min(count, max(0, head_dim - column) // size)
        for blocks, ragged in ((inside, False), (count - inside, True)):
            if blocks:
                runs.append(Run(column, column - start, blocks, wide, ragged))
                column += blocks * size
        wide //= 2
    return tuple(runs)
