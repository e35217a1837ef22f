"""Rotary embedding by tables of cosines and sines, for the queries and in a paged cache.

Other libraries precompute such tables, and some scale them (here as YaRN does, by 1.1). Keys turn
while they are appended to pages of 512 rows, queries in the attention kernel: those of a prompt by
their own positions, and three candidates for the next token all at one position.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

LENGTH, CANDIDATES, HEADS, KV_HEADS, WIDTH, PAGE = 70, 3, 8, 2, 64, 512
ANGLES = mx.arange(1024)[:, None] * 10000.0 ** -(mx.arange(0, WIDTH, 2) / WIDTH)
TABLES = (1.1 * mx.cos(ANGLES), 1.1 * mx.sin(ANGLES))


def turned(x: mx.array, positions: mx.array) -> mx.array:
    """Rows of x turned by their positions, written out."""
    cos, sin = (table[positions] for table in TABLES)
    one, other = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    both = [one * cos - other * sin, one * sin + other * cos]
    return mx.concatenate(both, axis=-1).astype(x.dtype)


def main() -> None:
    rope = metalgen.Rope(tables=TABLES)
    k, v = (normal(1, KV_HEADS, LENGTH, WIDTH, seed=seed) for seed in (1, 2))
    cache = metalgen.PagedKVCache(
        pages=3, kv_heads=KV_HEADS, head_dim=WIDTH, page_size=PAGE, rope=rope, device=DEVICE
    )
    sequence = cache.add()
    cache.append([sequence], k, v)
    table, lengths = cache.tables([sequence])
    keywords: dict[str, Any] = {"block_table": table, "kv_lens": lengths, "device": DEVICE}
    where = mx.arange(LENGTH)
    keys = turned(k, where)

    q = normal(1, HEADS, LENGTH, WIDTH, seed=3)
    out = metalgen.attention(q, cache.keys, cache.values, causal=True, rope=rope, **keywords)
    expected = mx.fast.scaled_dot_product_attention(
        turned(q, where), keys, v, scale=WIDTH**-0.5, mask="causal"
    )
    report("a prompt, by tables", out, expected)

    q = normal(1, HEADS, CANDIDATES, WIDTH, seed=4)
    here = metalgen.Rope(tables=TABLES, offset=LENGTH, one_position=True)
    out = metalgen.attention(q, cache.keys, cache.values, rope=here, **keywords)
    expected = mx.fast.scaled_dot_product_attention(
        turned(q, mx.full((CANDIDATES,), LENGTH, mx.int32)), keys, v, scale=WIDTH**-0.5
    )
    report("candidates, at one position", out, expected)


if __name__ == "__main__":
    main()
