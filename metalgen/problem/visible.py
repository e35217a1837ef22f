"""How many scores causal masks and windows keep."""

from __future__ import annotations

import numpy as np

from metalgen.problem.config import AttentionConfig


def visible(config: AttentionConfig, q_len: int, kv_len: int) -> int:
    """Pairs of a query and a key that causal masks and windows keep, of one head."""
    own = np.arange(q_len, dtype=np.int64) + (kv_len - q_len)
    right = 0 if config.causal else config.window_right
    if config.causal and config.window_right is not None:
        right = min(0, config.window_right)
    end = np.full(q_len, kv_len) if right is None else np.minimum(kv_len, own + right + 1)
    left = config.window_left
    begin = np.zeros(q_len, np.int64) if left is None else np.maximum(0, own - left)
    return int(np.maximum(0, end - begin).sum())
