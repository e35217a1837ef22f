"""ALiBi with slopes of each sequence, and pages of 1,024 keys, which a kernel reads in halves.

Two adapters of one model, each with slopes of its own, answer in one batch.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

HEADS, KV_HEADS, WIDTH, PAGE = 8, 2, 64, 1024
LENGTHS = (70, 1100)


def main() -> None:
    base = 2.0 ** -mx.arange(1, HEADS + 1).astype(mx.float32)
    slopes = mx.stack([base, 0.5 * base])  # (2, H)
    k, v = (normal(3, KV_HEADS, PAGE, WIDTH, seed=seed) for seed in (1, 2))
    table = mx.array([[2, -1], [0, 1]])
    q = normal(2, HEADS, 1, WIDTH, seed=3)
    out = metalgen.attention(
        *(q, k, v),
        alibi_slopes=slopes,
        block_table=table,
        kv_lens=mx.array(LENGTHS),
        device=DEVICE,
    )
    expected = []
    for n, (length, pages) in enumerate(zip(LENGTHS, ([2], [0, 1]), strict=True)):
        keys, values = (
            mx.concatenate([x[page] for page in pages], axis=1)[None, :, :length] for x in (k, v)
        )
        distance = mx.arange(length) - (length - 1)  # of each key from the query
        bias = slopes[n][None, :, None, None] * distance
        expected.append(
            mx.fast.scaled_dot_product_attention(
                q[n : n + 1], keys, values, scale=WIDTH**-0.5, mask=bias.astype(q.dtype)
            )
        )
    report("slopes of each sequence", out, mx.concatenate(expected))


if __name__ == "__main__":
    main()
