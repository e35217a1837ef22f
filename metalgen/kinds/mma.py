"""``mma.sync`` of CUDA: 16x8x16 matrices in 16-bit types, 16x8x8 in tf32."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from metalgen.kinds.base import Kind, Require, own_source, value_parts
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Limits, Point, Schedule

if TYPE_CHECKING:
    from metalgen.kinds.mma_plan import MmaPlan
    from metalgen.kinds.mma_tiles import MmaTiles
    from metalgen.kinds.operands import Operands


def _several(point: Point) -> bool:
    return bool(point["simdgroups"] > 1)


class Mma(Kind):
    """Warp-level products of compute capability 8.0 and later.

    Whole rows of K and V go through a ring of tiles in shared memory. An NVIDIA GPU has 65,536
    registers for a block: from 257 threads on a kernel may need more, and then it is not launched.
    """

    name = "mma"
    templates = "mma"
    language = "cuda"
    row_block = 16
    depth = 16
    threads = 256
    adds = True

    def __init__(self) -> None:
        self.knobs = self.knobs_of(("q",), ("k", "v"))
        # Few rows do not keep several warps busy, unless these share out the keys.
        self.few_row_knobs = (
            Knob(
                "key_simdgroups",
                (1, 2, 4, 8),
                "Simdgroups that share the rows, and share out the keys of each pass.",
                1,
                cost="each leaves an output of its own, as splits do",
                tried=(1, 2, 4),
                active=_several,
                inactive=1,
            ),
        )

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
                tried=(16, 32, 48, 64, 96, 128),
            ),
            *(own_source(name) for name in own),
            Knob(
                "bd",
                range(8, 577, 8),
                "Columns of K or V staged at once.",
                cost="always whole rows",
                tried=lambda config, limits: (
                    self.widest_row(config, self.default_value_parts(config)),
                ),
            ),
            Knob(
                "buffers",
                (1, 2, 3, 4),
                "Staging buffers.",
                1,
                cost="more: tiles are fetched further ahead, for shared memory",
                tried=(1, 2, 3, 4),
            ),
            value_parts(self),
        )

    def plan(self, operands: Operands, schedule: Schedule) -> MmaPlan:
        from metalgen.kinds.mma_plan import mma_plan

        return mma_plan(operands, schedule)

    def tiles(self, config: AttentionConfig, schedule: Schedule) -> MmaTiles:
        """The tiles of a schedule in shared memory."""
        from metalgen.kinds.mma_tiles import mma_tiles
        from metalgen.kinds.operands import operand

        s = schedule
        own, traversed = (
            [operand(name, config, s.value_parts) for name in names]
            for names in (s.own, s.traversed)
        )
        sharing = s.simdgroups // getattr(s, "key_simdgroups", 1)
        sizes = {"bq": s.bq, "bk": s.bk, "sharing": sharing}
        return mma_tiles(own, traversed, **sizes, together=s.together, adds=s.adds)

    def threadgroup_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        """The Q tile, one that quantized tiles may be dequantized into, and the ring."""
        tiles = self.tiles(config, schedule)
        return int(tiles.own + tiles.work + schedule.buffers * tiles.ring + tiles.added)

    def dynamic_bytes(self, config: AttentionConfig, schedule: Schedule) -> int:
        return self.threadgroup_bytes(config, schedule)

    def words(self, schedule: Schedule) -> list[str]:
        s = schedule
        words = [
            f"{s.bq}x{s.bk}x{s.bd}",
            f"sg{s.simdgroups}x{s.row_blocks}",
            *(
                f"{name}:{'reg' if getattr(s, f'{name}_source') == 'registers' else 'tg'}"
                for name in s.own
            ),
            f"buf{s.buffers}",
        ]
        for word, name in (
            ("split", "splits"),
            ("parts", "value_parts"),
            ("keys", "key_simdgroups"),
        ):
            value = getattr(s, name, 1)
            words += [f"{word}{value}"] if value > 1 else []
        return words

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:
        widest = self.widest_row(config, schedule.value_parts)
        found = schedule.bd
        require(
            "bd",
            found == widest,
            f"{self.name} stages whole rows: bd must be {widest}, not {found}",
        )
        whole = not schedule.together or config.kv_bits is None
        require("quantized", whole, f"{self.name} has no quantized rows that come together")
        require("dtype", not schedule.adds or config.itemsize == 2, "of 16-bit types only")

    def defaults(
        self, config: AttentionConfig, limits: Limits, *, few_rows: bool
    ) -> list[dict[str, Any]]:
        """Four warps, or fewer where their rows do not fit; two row blocks each where the
        accumulator leaves room, else one; two buffers, or one; the longest pass that fits; Q read
        again. For few rows: `_few_rows`.
        """
        parts = self.default_value_parts(config)
        widest = self.widest_row(config, parts)
        if few_rows:
            return self._few_rows(config, parts, widest)
        roomy = config.v_dim // parts <= 256 // config.itemsize
        return [
            {
                "bq": self.row_block * row_blocks * simdgroups,
                "bk": bk,
                "bd": widest,
                "simdgroups": simdgroups,
                "row_blocks": row_blocks,
                "q_source": "threadgroup",
                "buffers": buffers,
                "value_parts": parts,
            }
            for buffers in (2, 1)
            for simdgroups in (4, 2, 1)
            for row_blocks in ((2, 1) if roomy else (1,))
            for bk in (64, 32, 16)
            if bk * config.itemsize <= 128
        ]

    def backward_defaults(
        self, config: AttentionConfig, *, own: tuple[str, ...]
    ) -> list[dict[str, Any]]:
        """Four warps, or fewer; of two row blocks where they need no more than the 255 registers of
        a thread (as nvcc 13 counts them at 64 and 128 columns in 16 bits); two buffers, or one; 32
        rows a pass, or 16; owned rows read again from shared memory."""
        widest = self.widest_row(config, 1)
        roomy = widest * config.itemsize <= (256 if "q" in own else 128)
        return [
            {
                "bq": self.row_block * row_blocks * simdgroups,
                "bk": bk,
                "bd": widest,
                "simdgroups": simdgroups,
                "row_blocks": row_blocks,
                "buffers": buffers,
                "apart": int(widest > 128),
                "value_parts": 1,
                **{f"{name}_source": "threadgroup" for name in own},
            }
            for simdgroups in (4, 2, 1)
            for row_blocks in ((2, 1) if roomy else (1,))
            for buffers in (2, 1)
            for bk in (32, 16)
        ]

    def _few_rows(self, config: AttentionConfig, parts: int, widest: int) -> list[dict[str, Any]]:
        """Sixteen splits keep a GPU of a hundred cores busy with one token of few heads. Two pairs
        of warps have 32 rows, more than most calls have, and share out the keys of a tile; a ring
        of four tiles covers the way to memory. Of quantized keys 32 splits, of one warp each.
        """
        if config.kv_bits is not None:
            sizes, splits = [(1, 1, bk, n) for bk in (64, 32, 16) for n in (2, 1)], 32
        else:
            most = min(256 // config.itemsize, 128 if config.page_size is None else 64)
            lengths = [bk for bk in (128, 64, 32) if bk <= (most if widest <= 256 else 32)]
            rings = (4, 3, 2) if widest <= 256 else (2, 1)
            sizes = [(4, 2, bk, n) for bk in lengths for n in rings]
            sizes += [(2, 2, 32, 2), (2, 2, 32, 1), (1, 1, 16, 2), (1, 1, 16, 1)]
            splits = 16
        kept = config.kv_bits is None and config.head_dim * config.itemsize <= 256
        return [
            {
                "bq": self.row_block * warps // sharing,
                "bk": bk,
                "bd": widest,
                "simdgroups": warps,
                "key_simdgroups": sharing,
                "q_source": "registers" if kept else "threadgroup",
                "buffers": buffers,
                "splits": splits,
                "value_parts": parts,
            }
            for warps, sharing, bk, buffers in sizes
        ]

    def follow(
        self, config: AttentionConfig, schedule: Schedule, given: dict[str, Any]
    ) -> dict[str, Any]:
        """Also: slices are whole rows."""
        widest = self.widest_row(config, schedule.value_parts)
        return super().follow(config, schedule, given) | {"bd": widest}


MMA = Mma()
