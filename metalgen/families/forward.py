"""Forward: the queries of one head make the rows of a block."""

from __future__ import annotations

from metalgen.families.attention import Attend, AttentionFamily, hidden_rows
from metalgen.families.counts import CallCounts, forward_counts
from metalgen.families.launch import Launch, attention_launches
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Schedule


class Forward(AttentionFamily):
    """Attention of any number of queries."""

    name = "forward"
    usual_q_len = 1024
    deterministic_q_len = 4096
    main = Attend("forward", "forward")

    def takes(self, config: AttentionConfig, q_len: int) -> bool:
        return True

    def launches(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        shape: tuple[int, int, int],
        keys: int,
        sequences: int = 0,
        most_groups: int = (1 << 31) - 1,
    ) -> list[Launch]:
        return attention_launches(config, schedule, shape, keys, sequences, most_groups)

    def check_sizes(self, config: AttentionConfig, schedule: Schedule) -> list[tuple[int, int]]:
        """Two query blocks and three passes over the keys, neither of them whole. With a mask that
        hides later keys so many that the first block sees two whole passes, and again fewer keys
        than queries, so that some rows see nothing."""
        queries, keys = schedule.bq + 5, 2 * schedule.bk + 3
        hidden = hidden_rows(config, schedule)
        return [(queries, queries + keys if hidden else keys), *hidden]

    def counts(
        self,
        config: AttentionConfig,
        schedule: Schedule,
        *,
        batch_heads: int,
        q_len: int,
        kv_len: int,
    ) -> CallCounts:
        sizes = {"batch_heads": batch_heads, "q_len": q_len, "kv_len": kv_len}
        return CallCounts(forward_counts(config, schedule, **sizes), batch_heads, kv_len)


FORWARD = Forward()
