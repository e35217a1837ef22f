"""Two conversations in one paged cache: prompts of several lengths, then a few steps of each.

Keys turn on their way into the cache, queries in the attention kernel; both in one call each.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

HEADS, KV_HEADS, WIDTH, STEPS = 8, 2, 64, 3
PROMPTS = (21, 5)


def main() -> None:
    rope = metalgen.Rope(base=10000.0)
    cache = metalgen.PagedKVCache(
        pages=8, kv_heads=KV_HEADS, head_dim=WIDTH, page_size=16, rope=rope, device=DEVICE
    )
    chats = [cache.add() for _ in PROMPTS]
    rows = [
        [normal(1, KV_HEADS, length + STEPS, WIDTH, seed=10 * n + x) for x in (1, 2)]
        for n, length in enumerate(PROMPTS)
    ]

    # The prompts, packed one after the other.
    packed = [
        mx.concatenate([own[x][:, :, :t] for own, t in zip(rows, PROMPTS, strict=True)], axis=2)
        for x in (0, 1)
    ]
    cache.append(chats, packed[0], packed[1], counts=PROMPTS)

    for step in range(STEPS):  # one token of each
        k, v = (
            mx.concatenate(
                [own[x][:, :, t + step, None] for own, t in zip(rows, PROMPTS, strict=True)]
            )
            for x in (0, 1)
        )
        cache.append(chats, k, v)
        table, lengths = cache.tables(chats)
        q = normal(len(chats), HEADS, 1, WIDTH, seed=100 + step)
        out = metalgen.attention(
            q,
            cache.keys,
            cache.values,
            block_table=table,
            kv_lens=lengths,
            causal=True,
            rope=rope,
            device=DEVICE,
        )
        expected = []
        for n, length in enumerate(PROMPTS):
            now = length + step
            keys, values = (x[:, :, : now + 1] for x in rows[n])
            expected.append(
                mx.fast.scaled_dot_product_attention(
                    _turned(q[n : n + 1], now), _turned(keys, 0), values, scale=WIDTH**-0.5
                )
            )
        report(f"step {step}, against whole sequences", out, mx.concatenate(expected))


def _turned(x: mx.array, offset: int) -> mx.array:
    return mx.fast.rope(x, WIDTH, traditional=False, base=10000.0, scale=1.0, offset=offset)


if __name__ == "__main__":
    main()
