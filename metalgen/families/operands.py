"""The operands and products of attention, forward and decode."""

from __future__ import annotations

import dataclasses

from metalgen.kinds.operands import Accumulator, Operands, Passes, Product, operand
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Schedule


def attention_operands(
    config: AttentionConfig, schedule: Schedule, *, head_rows: bool = False
) -> Operands:
    """S = Q K^T and O = P V: queries are owned, keys are passed over, a block of BK at a time.

    Args:
        config: what is computed.
        schedule: how.
        head_rows: whether the queries of all heads that share a KV head make the rows of a block.
    """
    q, k, v = (operand(name, config, schedule.value_parts) for name in ("q", "k", "v"))
    q = dataclasses.replace(q, head_rows=head_rows, rotated=config.rope is not None)
    # Later rows see more keys: a long block that starts late is waited for by itself.
    ordered = config.causal and not head_rows and not config.varlen
    several = getattr(schedule, "key_simdgroups", 1) > 1
    return Operands(
        own=(q,),
        traversed=(k, v),
        accumulators=(
            Accumulator("s", "K_FRAGMENTS", "k_own" if several else "k0"),
            Accumulator("o", "V_FRAGMENTS", columns="DV", shared=v.shares > 1),
        ),
        products=(Product("s", "q", "k"), Product("o", "s", "v")),
        passes=Passes(
            index="k0",
            begin="k_begin",
            end="k_end",
            block="BK",
            count="kv_len",
            own="key_first + " if several else "",
            listed=config.block_mask,
            least="kv_start" if config.kv_starts else "",
            whole=not config.array_mask
            and not config.page_size
            and (config.mask_mod is None or config.block_mask),
        ),
        own_start="q_block * BQ",
        own_count="row_count" if head_rows else "q_len",
        ordered_heads=config.heads_per_kv if ordered else 0,
    )
