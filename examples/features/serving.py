"""Two prompts in one packed prefill, then decoding steps in a batch, all over one paged cache.

This is how a server runs attention: `PagedKVCache` keeps lengths and block tables, keys and queries
get their rotary embedding on the way, and no sequence is padded to the length of another.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

PROMPTS, STEPS = (23, 9), 3
HEADS, KV_HEADS, WIDTH = 8, 2, 64
ROPE = metalgen.Rope(base=10000.0)


def alone(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """One whole sequence, by MLX's own operations."""
    q, k = (
        mx.fast.rope(x, WIDTH, traditional=False, base=10000.0, scale=1.0, offset=0) for x in (q, k)
    )
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5, mask="causal")


def main() -> None:
    whole = []  # queries, keys and values of each sequence, prompt and answer
    for n, length in enumerate(PROMPTS):
        shapes = [(1, heads, length + STEPS, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        whole.append([normal(*shape, seed=10 * n + part) for part, shape in enumerate(shapes)])
    cache = metalgen.PagedKVCache(
        pages=8, kv_heads=KV_HEADS, head_dim=WIDTH, page_size=16, rope=ROPE, device=DEVICE
    )
    numbers = [cache.add() for _ in PROMPTS]

    # The prompts, one after the other.
    q, k, v = (
        mx.concatenate([own[part][:, :, :n] for own, n in zip(whole, PROMPTS, strict=True)], axis=2)
        for part in range(3)
    )
    cache.append(numbers, k, v, counts=list(PROMPTS))
    table, lengths = cache.tables(numbers)
    starts = mx.array([0, PROMPTS[0], sum(PROMPTS)])
    out = metalgen.attention(
        q,
        cache.keys,
        cache.values,
        causal=True,
        cu_seqlens_q=starts,
        block_table=table,
        kv_lens=lengths,
        rope=ROPE,
        device=DEVICE,
    )
    expected = [alone(*own) for own in whole]
    prompts = [x[:, :, :n] for x, n in zip(expected, PROMPTS, strict=True)]
    report("packed prefill, against each prompt alone", out, mx.concatenate(prompts, axis=2))

    for step in range(STEPS):
        at = [n + step for n in PROMPTS]
        q, k, v = (
            mx.concatenate([own[part][:, :, i : i + 1] for own, i in zip(whole, at, strict=True)])
            for part in range(3)
        )
        cache.append(numbers, k, v)
        table, lengths = cache.tables(numbers)
        out = metalgen.attention(
            q,
            cache.keys,
            cache.values,
            causal=True,
            block_table=table,
            kv_lens=lengths,
            rope=ROPE,
            device=DEVICE,
        )
        rows = [x[:, :, i : i + 1] for x, i in zip(expected, at, strict=True)]
        report(f"step {step + 1}", out, mx.concatenate(rows))


if __name__ == "__main__":
    main()
