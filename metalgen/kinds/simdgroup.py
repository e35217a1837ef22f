"""8x8 simdgroup matrices of Metal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metalgen.kinds.base import (
    FRAGMENT,
    LABELS,
    Kind,
    Require,
    own_source,
    value_parts,
    value_width,
)
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Limits, Point, Schedule

if TYPE_CHECKING:
    from metalgen.kinds.operands import Operands
    from metalgen.kinds.simdgroup_plan import SimdgroupPlan

REGISTERS = 250
"""Estimated 16-bit registers per thread up to which a kernel is likely not to spill (of 256)."""


class Simdgroup(Kind):
    """``simdgroup_matrix<T, 8, 8>``; K and V are staged in threadgroup memory or read directly."""

    name = "simdgroup"
    templates = "simdgroup"
    counted = True
    language = "metal"
    row_block = 8
    depth = 8
    threads = 1024
    most_registers = REGISTERS

    def __init__(self) -> None:
        self.knobs = self.knobs_of(("q",), ("k", "v"))

    def knobs_of(self, own: tuple[str, ...], traversed: tuple[str, ...]) -> tuple[Knob, ...]:
        def is_staged(point: Point) -> bool:
            return any(point[f"{name}_source"] == "threadgroup" for name in traversed)

        return (
            Knob(
                "bq",
                range(8, 1025, 8),
                "Query rows per threadgroup.",
                cost="more rows share each K and V tile that is staged; fewer groups, longer tail",
            ),
            Knob(
                "row_blocks",
                range(1, 9),
                "Blocks of 8 rows (mma: 16) per simdgroup.",
                1,
                cost="each K or V fragment loaded serves that many products; O, S and Q grow",
                tried=(1, 2, 4),
            ),
            Knob("simdgroups", range(1, 33), "Simdgroups per threadgroup.", tried=(1, 2, 4, 8, 16)),
            Knob(
                "bk",
                range(8, 257, 8),
                "Keys per pass.",
                cost="larger: fewer passes, barriers and rescalings; S takes more registers",
                tried=(8, 16, 32, 64),
            ),
            *(own_source(name) for name in own),
            *(
                Knob(
                    f"{name}_source",
                    ("threadgroup", "device"),
                    f"Where {LABELS[name]} is read from.",
                    "threadgroup",
                    cost="threadgroup: read from memory once per group, for barriers; device: once "
                    "per simdgroup"
                    if name == traversed[0]
                    else f"as {traversed[0]}_source",
                    tried=("threadgroup", "device"),
                )
                for name in traversed
            ),
            Knob(
                "bd",
                range(8, 577, 8),
                "Columns of K or V staged at once.",
                cost="narrower: less threadgroup memory, more barriers",
                tried=self._slices,
                active=is_staged,
                inactive=lambda config: self.widest_row(config, self.default_value_parts(config)),
            ),
            Knob(
                "buffers",
                (1, 2),
                "Staging buffers.",
                1,
                cost="2: the next tile is fetched while one is used, half of the barriers",
                tried=(1, 2),
                active=is_staged,
                inactive=1,
            ),
            Knob(
                "load_width",
                (2, 4, 8),
                "Elements per vector load.",
                8,
                cost="narrower: more loads",
                tried=(2, 4, 8),
            ),
            Knob(
                "fragment",
                ("input", "float32"),
                "Type of matrix fragments.",
                "input",
                cost="float32: elements are widened when they are loaded",
                tried=lambda config, limits: (
                    ("input", "float32") if config.dtype == "bfloat16" else ("input",)
                ),
            ),
            Knob(
                "math_mode",
                ("safe", "relaxed", "fast"),
                "Metal's math mode.",
                "safe",
                cost="special values and last bits, for speed",
                tried=("safe",),
            ),
            value_parts(self),
        )

    def _slices(self, config: AttentionConfig, limits: Limits) -> tuple[int, ...]:
        """Widths of staged slices; those of the default schedules are among them."""
        widest = self.widest_row(config, self.default_value_parts(config))
        return tuple(sorted({w for w in (32, 64, 128) if w <= widest} | {widest}))

    def plan(self, operands: Operands, schedule: Schedule) -> SimdgroupPlan:
        from metalgen.kinds.simdgroup_plan import simdgroup_plan

        return simdgroup_plan(operands, schedule)

    def row_bytes(self, width: int, itemsize: int) -> int:
        """Bytes from one row to the next of a tile in threadgroup memory."""
        from metalgen.kinds.simdgroup_plan import ROW_PAD_BYTES

        return self.padded(width) * itemsize + ROW_PAD_BYTES

    def staged(self, schedule: Schedule) -> tuple[str, ...]:
        """Which of the operands that are passed over go through threadgroup memory."""
        sources = {name: getattr(schedule, f"{name}_source") for name in schedule.traversed}
        return tuple(name for name, source in sources.items() if source == "threadgroup")

    def staged_width(self, config: AttentionConfig, schedule: Schedule) -> int:
        """Columns of the widest slice that is staged at once; 0 when none is."""
        from metalgen.kinds.operands import operand

        widths = (
            self.padded(operand(name, config, schedule.value_parts).width)
            for name in self.staged(schedule)
        )
        return max((min(int(schedule.bd), width) for width in widths), default=0)

    def threadgroup_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        """The tiles of owned operands that are staged, and the staging buffers."""
        from metalgen.kinds.operands import operand

        total = 0
        for name in schedule.own:
            if getattr(schedule, f"{name}_source") == "threadgroup":
                own = operand(name, config, schedule.value_parts)
                total += schedule.bq * self.row_bytes(own.width, config.itemsize)
        width = self.staged_width(config, schedule)
        if width:
            row = self.row_bytes(width, config.itemsize)
            total += schedule.buffers * schedule.bk * row
        return total

    def registers(self, config: AttentionConfig, schedule: Schedule) -> int:
        """O, S and Q of a thread's rows, and 85 for everything else, of 256.

        From a static study of one kernel compiled with Mesa's compiler, not Apple's; it ranks
        schedules and refuses none.
        """
        rows = FRAGMENT * schedule.row_blocks
        out = rows * self.padded(value_width(config, schedule)) // 16
        scores = rows * schedule.bk // 16
        wide = 4 if schedule.fragment == "float32" else config.itemsize
        queries = rows * self.padded(config.head_dim) * wide // 64
        return int(out + scores + (queries if schedule.q_source == "registers" else 0) + 85)

    def words(self, schedule: Schedule) -> list[str]:
        s = schedule
        short = {"registers": "reg", "threadgroup": "tg", "device": "dev"}
        words = [
            f"{s.bq}x{s.bk}x{s.bd}",
            f"sg{s.simdgroups}x{s.row_blocks}",
            *(f"{name}:{short[getattr(s, f'{name}_source')]}" for name in s.own + s.traversed),
            f"buf{s.buffers}",
            f"w{s.load_width}",
        ]
        splits = getattr(s, "splits", 1)
        words += [f"split{splits}"] if splits > 1 else []
        words += [f"parts{s.value_parts}"] if s.value_parts > 1 else []
        words += [w for w, d in ((s.fragment, "input"), (s.math_mode, "safe")) if w != d]
        return words

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:
        s = schedule
        widest = self.widest_row(config, s.value_parts)
        require("bd", s.bd <= widest, f"bd={s.bd} is wider than the padded head dimension {widest}")
        if not self.staged(s):
            require("bd", s.bd == widest, f"nothing is staged: bd must be {widest}, not {s.bd}")
            require("buffers", s.buffers == 1, "nothing is staged: buffers must be 1")
        require(
            "fragment",
            s.fragment == "input" or config.dtype != "float32",
            "float32 inputs need no widening: fragment must be 'input'",
        )

    def defaults(
        self, config: AttentionConfig, limits: Limits, *, few_rows: bool
    ) -> list[dict[str, Any]]:
        """Four simdgroups, or fewer where their rows do not fit; two row blocks each where the
        accumulator leaves room, else one; K and V staged; the longest pass and the widest slice
        that fit; Q in registers. For few rows one simdgroup of one row block, which reads K and V
        directly, and eight splits. For rows wider than 128 passes of 16 keys, slices of 64 columns
        and Q in threadgroup memory: an independent compiler counts fewer spills so. Those that are
        likely to spill come last.
        """
        parts = self.default_value_parts(config)
        widest = self.widest_row(config, parts)
        roomy = config.v_dim // parts <= 64 and not few_rows
        direct = {"k_source": "device", "v_source": "device"} if few_rows else {}
        wide = widest > 128 and not few_rows
        narrow = ((16, min(widest, 64)), (8, min(widest, 32)))
        slices = narrow if wide else ((32, widest), (16, widest), *narrow)
        return [
            {
                "bq": self.row_block * row_blocks * simdgroups,
                "bk": bk,
                "bd": bd,
                "simdgroups": simdgroups,
                "row_blocks": row_blocks,
                "q_source": source,
                "splits": 8 if few_rows else 1,
                "value_parts": parts,
                **direct,
            }
            for simdgroups in ((1,) if few_rows else (4, 2, 1))
            for row_blocks in ((2, 1) if roomy else (1,))
            for bk, bd in (slices if not direct else ((32, widest), (16, widest), (8, widest)))
            for source in (("threadgroup", "registers") if wide else ("registers", "threadgroup"))
        ]

    def backward_defaults(
        self, config: AttentionConfig, *, own: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """Four simdgroups of one row block, or fewer; K and V, or Q and dO, staged; owned rows in
        registers up to 64 columns, else read again; dK and dV apart beyond these. Passes of 32
        rows and the widest loads, but 16 rows and loads half as wide where dK and dV come together:
        so nothing spilled at 64 and 128 columns in float16, as counted by an independent
        compiler."""
        widest = self.widest_row(config, 1)
        both = "k" in own and widest <= 64
        longest = 16 if both else 32
        return [
            {
                "bq": self.row_block * simdgroups,
                "bk": bk,
                "bd": bd,
                "simdgroups": simdgroups,
                "load_width": 4 if both else 8,
                "apart": int(widest > 64),
                "value_parts": 1,
                **{f"{name}_source": source for name in own},
            }
            for source in (("registers", "threadgroup") if widest <= 64 else ("threadgroup",))
            for simdgroups in (4, 2, 1)
            for bk, bd in ((32, widest), (16, widest), (16, min(widest, 64)), (8, min(widest, 32)))
            if bk <= longest
        ]

    def follow(
        self, config: AttentionConfig, schedule: Schedule, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Also: without anything staged there is one buffer, and slices of the whole width."""
        changes = super().follow(config, schedule, given)
        widest = self.widest_row(config, schedule.value_parts)
        changes["bd"] = min(schedule.bd, widest)
        if not self.staged(schedule):
            changes |= {"bd": widest, "buffers": 1}
        return changes


SIMDGROUP = Simdgroup()
