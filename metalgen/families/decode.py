"""Decode: few queries, so the rows of all heads that share a KV head make a block."""

from __future__ import annotations

from metalgen.families.attention import Attend, AttentionFamily, AttentionStep, Combine, hidden_rows
from metalgen.families.base import at_most
from metalgen.families.counts import CallCounts, combine_counts, decode_counts
from metalgen.families.launch import Launch, attention_launches
from metalgen.kinds import Kind
from metalgen.kinds.base import Require
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Schedule

DECODE_QUERIES = 64
"""Most queries of a call that belongs to the family."""

SPLITS = Knob(
    "splits",
    (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "Number of threadgroups that share the keys of a row.",
    1,
    cost="more threadgroups for few rows; each writes, and the combine step reads, float outputs",
    tried=(1, 2, 4, 8, 16, 32, 64),
)
COMBINE = Combine("combine", "combine", head_rows=True)


class Decode(AttentionFamily):
    """Attention of few queries: K and V are read once for all heads that share them, and the keys
    of a row are shared out among threadgroups, whose outputs a combine step merges."""

    name = "decode"
    head_rows = True
    usual_q_len = 1
    deterministic_q_len = 1
    main = Attend("decode", "forward", head_rows=True)

    def knobs(self, kind: Kind | None) -> tuple[Knob, ...]:
        assert kind is not None
        few = at_most(super().knobs(kind), {"row_blocks": 2, "simdgroups": 4})
        return (SPLITS, *few, *kind.few_row_knobs)

    def steps(self, schedule: Schedule) -> tuple[AttentionStep, ...]:
        return (self.main, COMBINE) if schedule.partials > 1 else (self.main,)

    @property
    def possible_steps(self) -> tuple[AttentionStep, ...]:
        return (self.main, COMBINE)

    def takes(self, config: AttentionConfig, q_len: int) -> bool:
        return q_len <= DECODE_QUERIES and not config.one_head

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:
        require("family", not config.one_head, "decode takes no block mask")

    def launches(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        shape: tuple[int, int, int],
        keys: int,
        sequences: int = 0,
        most_groups: int = (1 << 31) - 1,
    ) -> list[Launch]:
        return attention_launches(
            config, schedule, shape, keys, sequences, most_groups, head_rows=self.head_rows
        )

    def check_sizes(self, config: AttentionConfig, schedule: Schedule) -> list[tuple[int, int]]:
        """Several queries, and one; a share of the keys for each split, and one that is short."""
        return [
            (3, (2 * schedule.splits + 1) * schedule.bk + 3),
            (1, schedule.bk + 1),
            *hidden_rows(config, schedule),
        ]

    def counts(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        *,
        batch_heads: int,
        q_len: int,
        kv_len: int,
    ) -> CallCounts:
        """Each share of the keys is a head of its own; heads are rounded down to whole KV heads."""
        ratio, shares = config.heads_per_kv, schedule.partials
        batch_heads = ratio * max(1, batch_heads // ratio)
        sizes = {"batch_heads": batch_heads, "q_len": q_len}
        left = config.window_left
        keys = kv_len if left is None else min(kv_len, left + q_len)
        return CallCounts(
            decode_counts(config, schedule, kv_len=kv_len, **sizes),
            heads=batch_heads * shares,
            kv_len=-(-keys // shares),
            head_rows=True,
            combine=combine_counts(config, schedule, **sizes) if shares > 1 else None,
        )

    def bytes_read(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        *,
        batch_heads: int,
        q_len: int,
        kv_len: int,
    ) -> int:
        """0: all schedules read K and V once for all heads that share them."""
        return 0


DECODE = Decode()
