"""From operands and a schedule to the steps that the templates of `simdgroup` write down.

Fragments are 8x8. Of several neighbouring fragments a lane's elements are made contiguous in
memory, so that one wide load fetches them all: the contraction index of A and B in A B^T, and
the column index of B and O in O += P B, are permuted within a block of a `Run`, which changes no
result.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from metalgen.kinds.base import FRAGMENT
from metalgen.kinds.operands import Operand, Operands, Product
from metalgen.schedules import Schedule

ROW_PAD_BYTES = 16
"""Bytes added to a row in threadgroup memory, so that rows start in different banks."""

MOST_PRODUCTS_TWICE = 192
"""Products of fragments in a pass up to which it is written twice, with masks and without.

Both take about 60 bytes per product as M1 and M2 code, counted by an independent compiler; the
instruction cache of those holds 12 KB. Products of rows that are read directly count twice, since
their addresses take code and registers; those of quantized rows take too much code at any size.
"""


def padded(width: int) -> int:
    """A head dimension rounded up to whole matrices."""
    return -(-width // FRAGMENT) * FRAGMENT


@dataclass(frozen=True)
class Run:
    """Blocks of neighbouring columns, each of which a lane loads at once.

    Args:
        column: first column, in the operand's rows.
        local: first column, in the staged slice.
        count: how many blocks.
        fragments: fragments per block. A lane loads twice as many elements of a row of A or of B
            in P B, and as many elements of each of two rows of B in A B^T.
        ragged: whether a block reaches past the operand's width.
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
    """How threads copy lines of an operand into threadgroup memory, some elements each.

    Args:
        column: first column in the operand.
        vectors: moves per line.
        elements: elements per move.
        left: name of the constant that holds the operand's width.
        ragged: whether the last moves reach past it.
    """

    column: int
    vectors: int
    elements: int
    left: str
    ragged: bool


@dataclass(frozen=True)
class Share:
    """How the threads of a group share out the slices of an operand that they stage.

    A line is one row, or a pair of neighbouring rows whose elements alternate in threadgroup
    memory, so that the two elements of a lane of a fragment of B in A B^T are neighbours.

    Args:
        rows: rows of a line.
        elements: elements of each of them that a thread moves at once.
        lanes: threads side by side along a line, a power of 2.
        lines: lines that are copied at once.
        trips: how often that must be done for the lines of a pass.
        idle: whether the last time some threads have no line left.
    """

    rows: int
    elements: int
    lanes: int
    lines: int
    trips: int
    idle: bool

    @property
    def shift(self) -> int:
        """The binary logarithm of `lanes`."""
        return self.lanes.bit_length() - 1


@dataclass(frozen=True)
class Slot:
    """In which of two buffers a step's slice is staged.

    Args:
        buffer: its number; None where passes take turns, because their steps are odd in number.
        turn: then what is added to the number of the pass, of which the last bit counts.
    """

    buffer: int | None
    turn: int = 0

    def later(self, steps: int) -> Slot:
        """The buffer of the step that comes so many steps of the same pass count later."""
        return self if self.buffer is not None else Slot(None, self.turn + steps)


@dataclass(frozen=True)
class Step:
    """One slice of a traversed operand: staged (or read directly), then multiplied.

    Args:
        product: what it is a part of.
        operand: of the product's right side.
        column, width: the slice's columns, padded to whole fragments.
        runs: its wide loads.
        copy: how it is staged, or None where it is read directly.
        slot: which buffer it is staged in, where there are two.
        next: with two buffers, the step of the same pass that is staged while this one is used;
            None if that is the first one of the next pass.
        again: whether its slice is that of the step before, which is still there.
        share: how its slice is copied, where it is staged.
        last: whether it is the last step of a pass for which its operand is copied.
    """

    product: Product
    operand: Operand
    column: int
    width: int
    runs: tuple[Run, ...]
    copy: Copy | None
    slot: Slot | None = None
    next: Step | None = None
    again: bool = False
    share: Share | None = None
    last: bool = False

    @property
    def paired(self) -> bool:
        """Whether pairs of rows alternate in its tile."""
        return self.share is not None and self.share.rows == 2

    def tile_lane(self, fragments: int) -> str:
        """The name of the place in a tile where a lane begins to read blocks of a width."""
        return f"{self.product.into}_{self.operand.name}_{fragments}"

    @property
    def column_trips(self) -> int:
        """How often the threads of a line move elements until they have copied it."""
        assert self.copy is not None
        assert self.share is not None
        return -(-self.copy.vectors // self.share.lanes)

    @property
    def staged(self) -> bool:
        """Whether it goes through threadgroup memory."""
        return self.copy is not None


@dataclass(frozen=True)
class SimdgroupPlan:
    """Everything that the templates substitute.

    Args:
        operands: what was planned.
        columns, rows: the steps of one pass, in order: those of products that contract columns,
            then those of products that contract the pass's rows.
        own_runs: wide loads of each owned operand, by its name.
        out_runs: wide stores of each output, by its accumulator's name.
        own_copy: how an owned operand is staged, by its name; none where it stays in registers.
        own_stride: elements between rows of that tile, by the operand's name.
        slot_stride: elements between rows of a staging buffer; ``slot`` its elements.
        buffers: staging buffers.
        lines: rows of a pass.
        products: products of fragments in a pass, of a simdgroup.
    """

    operands: Operands
    columns: tuple[Step, ...]
    rows: tuple[Step, ...]
    own_runs: dict[str, tuple[Run, ...]]
    out_runs: dict[str, tuple[Run, ...]]
    own_copy: dict[str, Copy]
    own_stride: dict[str, int]
    slot_stride: int
    slot: int
    buffers: int
    lines: int
    products: int

    @property
    def constants(self) -> dict[str, int]:
        """Named numbers of the kernel's text."""
        found = {}
        for each in self.operands.own:
            found[f"{each.columns}_FRAGMENTS"] = padded(each.width) // FRAGMENT
        if self.staged:
            found |= {"KV_STRIDE": self.slot_stride, "KV_SLOT": self.slot}
        for name in self.own_copy:
            found[f"{name.upper()}_STRIDE"] = self.own_stride[name]
        return found

    @property
    def whole_passes(self) -> bool:
        """Whether passes in which nothing is masked have a text of their own: where both fit the
        instruction cache."""
        if not self.operands.passes.whole or any(each.bits for each in self.operands.traversed):
            return False
        direct = sum(step.width for step in self.steps if not step.staged)
        width = sum(step.width for step in self.steps)
        return self.products * (width + direct) <= MOST_PRODUCTS_TWICE * width

    @property
    def ahead(self) -> int:
        """How many passes behind the current one tiles are fetched for."""
        return int(bool(self.staged) and self.buffers == 2 and not self.operands.passes.listed)

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps of a pass."""
        return self.columns + self.rows

    @property
    def staged(self) -> tuple[Step, ...]:
        """The steps whose slices are copied into threadgroup memory, in order."""
        return tuple(step for step in self.steps if step.staged and not step.again)

    def scattered(self, operand: Operand) -> bool:
        """Whether the rows of a pass may lie in several pages."""
        return operand.page is not None and operand.page % self.lines > 0

    @property
    def shares(self) -> tuple[Step, ...]:
        """One staged step of each operand that has any."""
        return tuple(step for step in self.steps if step.last)

    @property
    def tile_lanes(self) -> dict[str, tuple[Step, int]]:
        """Where a lane begins to read tiles, by name: for which steps and widths of blocks."""
        return {
            step.tile_lane(run.fragments): (step, run.fragments)
            for step in self.steps[::-1]
            for run in step.runs
            if step.staged
        }


def simdgroup_plan(operands: Operands, schedule: Schedule) -> SimdgroupPlan:
    """The plan of a valid schedule, which says a source ``NAME_source`` of each operand."""
    steps = _staged_steps(
        _shared(_slices(operands, schedule), operands, schedule), schedule.buffers
    )
    staged = [step for step in steps if step.staged]
    columns = tuple(step for step in steps if operands.contracts_columns(step.product))
    itemsize = operands.own[0].itemsize
    pad = ROW_PAD_BYTES // itemsize
    stride = max((step.width for step in staged), default=0) + pad
    own_copy = {
        each.name: _copy(each, 0, padded(each.width), _move(each, schedule.load_width))
        for each in operands.own
        if getattr(schedule, f"{each.name}_source") == "threadgroup"
    }
    runs: dict[str, tuple[Run, ...]] = {}
    for step in steps:
        product = step.product
        side = product.left if step in columns else product.into
        runs[side] = runs.get(side, ()) + step.runs
    own = {each.name for each in operands.own}
    return SimdgroupPlan(
        operands=operands,
        columns=columns,
        rows=tuple(step for step in steps if step not in columns),
        own_runs={name: found for name, found in runs.items() if name in own},
        out_runs={name: found for name, found in runs.items() if name not in own},
        own_copy=own_copy,
        own_stride={each.name: padded(each.width) + pad for each in operands.own},
        slot_stride=stride,
        slot=schedule.bk * stride,
        buffers=schedule.buffers,
        lines=schedule.bk,
        products=sum(step.width for step in steps) * schedule.bk * schedule.row_blocks // 64,
    )


def _slices(operands: Operands, schedule: Schedule) -> list[Step]:
    """The steps of a pass, not yet in buffers."""
    wide = schedule.load_width // 2
    steps = []
    for product in operands.products:
        operand = operands.operand(product.right)
        staged = getattr(schedule, f"{operand.name}_source") == "threadgroup"
        whole = padded(operand.width)
        size = min(schedule.bd, whole) if staged else whole
        for column in range(0, whole, size):
            width = min(size, whole - column)
            runs = _runs(column, width, operand.width, wide)
            move = _move(operand, schedule.load_width)
            copy = _copy(operand, column, width, move) if staged else None
            steps.append(Step(product, operand, column, width, runs, copy))
    return steps


def _shared(steps: list[Step], operands: Operands, schedule: Schedule) -> list[Step]:
    """The same steps, with how threads copy them: alike for all slices of an operand.

    Pairs of rows alternate where all products that read an operand contract its columns.
    """
    found = list(steps)
    for operand in operands.traversed:
        mine = [n for n, step in enumerate(steps) if step.operand == operand and step.staged]
        if not mine:
            continue
        paired = all(operands.contracts_columns(steps[n].product) for n in mine)
        move = _move(operand, schedule.load_width) // (2 if paired else 1)
        copies = {n: _copy(operand, steps[n].column, steps[n].width, move) for n in mine}
        share = _share(
            max(copy.vectors for copy in copies.values()),
            schedule.bk // (2 if paired else 1),
            schedule.threads,
            2 if paired else 1,
            move,
        )
        for n in mine:
            found[n] = dataclasses.replace(steps[n], copy=copies[n], share=share)
    return found


def _share(vectors: int, lines: int, threads: int, rows: int, elements: int) -> Share:
    """The fewest moves of a thread; of equal ones the longest stretches of memory."""
    lanes = [1 << n for n in range(6) if 1 << n < 2 * vectors and 1 << n <= threads]

    def moves(count: int) -> int:
        return -(-vectors // count) * -(-lines // (threads // count))

    best = min(reversed(lanes), key=moves)
    at_once = threads // best
    return Share(rows, elements, best, at_once, -(-lines // at_once), lines % at_once > 0)


def _staged_steps(steps: list[Step], buffers: int) -> list[Step]:
    """The same steps with the buffers that they are staged in."""
    steps = [
        dataclasses.replace(step, again=n > 0 and step.staged and _same(step, steps[n - 1]))
        for n, step in enumerate(steps)
    ]
    copied = {s.operand.name: n for n, s in enumerate(steps) if s.staged and not s.again}
    steps = [
        dataclasses.replace(step, last=copied.get(step.operand.name) == n)
        for n, step in enumerate(steps)
    ]
    count = sum(step.staged and not step.again for step in steps)
    found: list[Step] = []
    turn = count
    later: Step | None = None
    for step in reversed(steps):  # for each holds the next one
        if step.staged and step.again:
            slot = Slot((turn - 1) % 2) if count % 2 == 0 else Slot(None, turn - 1)
            step = dataclasses.replace(step, slot=slot if buffers == 2 else None)
        elif step.staged:
            turn -= 1
            slot = Slot(turn % 2) if count % 2 == 0 else Slot(None, turn)
            step = dataclasses.replace(step, slot=slot if buffers == 2 else None, next=later)
            later = step
        found.append(step)
    return found[::-1]


def _same(step: Step, before: Step) -> bool:
    """Whether two steps read the same slice."""
    own, other = ((each.operand.name, each.column, each.width) for each in (step, before))
    return own == other


def _move(operand: Operand, load_width: int) -> int:
    """Elements of one move into threadgroup memory: 16 bytes at most."""
    return min(load_width, 16 // operand.itemsize)


def _copy(operand: Operand, column: int, columns: int, move: int) -> Copy:
    return Copy(column, columns // move, move, operand.columns, column + columns > operand.width)


def _runs(start: int, width: int, whole: int, wide: int) -> tuple[Run, ...]:
    """Cut a slice into runs of blocks of `wide` fragments, then of half as many, and so on."""
    runs: list[Run] = []
    column = start
    while wide:
        size = FRAGMENT * wide
        count = (start + width - column) // size
        inside = min(count, max(0, whole - column) // size)
        for blocks, ragged in ((inside, False), (count - inside, True)):
            if blocks:
                runs.append(Run(column, column - start, blocks, wide, ragged))
                column += blocks * size
        wide //= 2
    return tuple(runs)
