"""Attention over a sequence that several processes share (context parallelism).

Each process holds its part of the queries, keys and values; `context_attention` returns its part of
the attention over the whole sequence. It stands on ``mx.distributed``.
"""

from __future__ import annotations

from metalgen.distributed.context import (
    context_attention,
    explain_context,
    sequence_positions,
    shard_sequence,
    unshard_sequence,
)
from metalgen.distributed.layouts import LAYOUTS
from metalgen.distributed.spread import spread_attention

__all__ = [
    "LAYOUTS",
    "context_attention",
    "explain_context",
    "sequence_positions",
    "shard_sequence",
    "spread_attention",
    "unshard_sequence",
]
