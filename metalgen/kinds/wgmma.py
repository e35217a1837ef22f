"""``wgmma.mma_async`` of CUDA: products of warp groups, on compute capability 9.0."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metalgen.kinds.base import Kind, Require, value_parts
from metalgen.kinds.wgmma_numbers import DEPTH, GROUP_ROWS, GROUP_WARPS, REGISTERS
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Limits, Schedule

if TYPE_CHECKING:
    from metalgen.kinds.operands import Operands
    from metalgen.kinds.wgmma_plan import WgmmaPlan

WIDEST = 256
"""Columns of an accumulator: the most that one instruction multiplies."""
OTHER_REGISTERS = 30
"""Of a thread that multiplies, for everything but accumulators: what the compiler took of kernels
without features."""


class Wgmma(Kind):
    """Warp-group products of compute capability 9.0, on tiles that another warp group copies.

    Each group of four warps owns 64 rows. A last one copies the tiles of K and V into a ring in
    shared memory and owns none: copies and products wait for each other by barriers in that memory.
    """

    name = "wgmma"
    templates = "wgmma"
    language = "cuda"
    row_block = 16
    depth = DEPTH
    threads = 512
    dtypes = ("float16", "bfloat16")
    instructions = "wgmma"
    backward = False
    deciding_simdgroups = GROUP_WARPS
    copying_simdgroups = 4

    def __init__(self) -> None:
        self.knobs = self.knobs_of(("q",), ("k", "v"))

    def knobs_of(self, own: tuple[str, ...], traversed: tuple[str, ...]) -> tuple[Knob, ...]:
        return (
            Knob(
                "bq",
                range(8, 1025, 8),
                "Query rows per threadgroup.",
                cost="more rows share each K and V tile that is staged; fewer groups, longer tail",
            ),
            Knob(
                "row_blocks",
                (1,),
                "Blocks of 8 rows (mma: 16) per simdgroup.",
                1,
                tried=(1,),
            ),
            Knob("simdgroups", (4, 8, 12), "Simdgroups per threadgroup.", tried=(4, 8, 12)),
            Knob(
                "bk",
                range(16, 257, 16),
                "Keys per pass.",
                cost="larger: fewer passes, barriers and rescalings; S takes more registers",
                tried=(64, 80, 96, 112, 128, 176),
            ),
            Knob(
                "buffers",
                (2, 3, 4, 5, 6, 8),
                "Staging buffers.",
                2,
                cost="more: tiles are fetched further ahead, for shared memory",
                tried=(2, 3, 4, 5, 6, 8),
            ),
            Knob(
                "overlap",
                ("none", "softmax"),
                "What is computed while the products of P and V are on their way.",
                "none",
                cost="softmax: that of the next pass, whose scores take registers in addition to P",
                tried=("none",),  # softmax: 0.83 to 0.97 of the speed on an H200 (2026-12-01)
            ),
            value_parts(self),
        )

    def plan(self, operands: Operands, schedule: Schedule) -> WgmmaPlan:
        from metalgen.kinds.wgmma_plan import wgmma_plan

        return wgmma_plan(operands, schedule)

    def threadgroup_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        """The Q tile, the ring, and the barriers."""
        from metalgen.kinds.operands import operand
        from metalgen.kinds.wgmma_plan import barrier_bytes, tile_bytes

        q, k, v = (operand(name, config, schedule.value_parts) for name in ("q", "k", "v"))
        own, ring = tile_bytes((q,), (k, v), schedule)
        return own + int(schedule.buffers) * ring + barrier_bytes(schedule.buffers)

    def dynamic_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        return self.threadgroup_bytes(config, schedule)

    def words(self, schedule: Schedule) -> list[str]:
        s = schedule
        words = [f"{s.bq}x{s.bk}", f"sg{s.simdgroups}", f"buf{s.buffers}"]
        words += ["overlap"] if s.overlap == "softmax" else []
        for word, name in (("split", "splits"), ("parts", "value_parts")):
            value = getattr(s, name, 1)
            words += [f"{word}{value}"] if value > 1 else []
        return words

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:
        s = schedule
        require("quantized", config.kv_bits is None, f"{self.name} has no quantized keys")
        widest = self.widest_row(config, s.value_parts)
        require("width", widest <= WIDEST, f"{widest} columns of at most {WIDEST}")
        groups = s.simdgroups // GROUP_WARPS
        width = self.padded(config.v_dim // s.value_parts)
        kept = s.bk // 4 if s.overlap == "softmax" else 0  # P, as long as the next scores
        need, most = (width + s.bk) // 2 + kept + OTHER_REGISTERS, REGISTERS[groups][1]
        require("registers", need <= most, f"about {need} registers of at most {most}")

    def defaults(
        self, config: AttentionConfig, limits: Limits, *, few_rows: bool
    ) -> list[dict[str, Any]]:
        """Three groups that multiply, two where the accumulators of three do not fit; the longest
        pass and the most buffers that fit. Of few rows none: their warps would have nothing to do.
        """
        if few_rows:
            return []
        return [
            {
                "bq": GROUP_ROWS * groups,
                "bk": bk,
                "simdgroups": GROUP_WARPS * groups,
                "buffers": buffers,
                "value_parts": 1,
            }
            for groups, bk in ((3, 128), (2, 128), (2, 80), (2, 64))
            for buffers in (3, 2)
        ]

    def backward_defaults(
        self, config: AttentionConfig, *, own: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        return []


WGMMA = Wgmma()
