"""One decoding step over a paged cache: pages of 16 keys, anywhere in a pool, found by a table.

Each sequence's row of the block table lists its pages; -1 stands for none. The lengths say how many
keys there are, so that the last page may be part full.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

PAGE, POOL, HEADS, KV_HEADS, WIDTH = 16, 12, 8, 2, 64
TABLE = ((7, 2, 9, -1), (0, 11, -1, -1), (4, 1, 8, 5))
LENGTHS = (37, 20, 64)


def main() -> None:
    k, v = (normal(POOL, KV_HEADS, PAGE, WIDTH, seed=seed) for seed in (1, 2))
    q = normal(len(TABLE), HEADS, 1, WIDTH, seed=3)
    out = metalgen.attention(
        q,
        k,
        v,
        causal=True,
        block_table=mx.array(TABLE),
        kv_lens=mx.array(LENGTHS),
        check=True,  # looks at table and lengths: for debugging, it waits for the GPU
        device=DEVICE,
    )

    expected = []
    for n, (pages, length) in enumerate(zip(TABLE, LENGTHS, strict=True)):
        used = [page for page in pages if page >= 0]
        keys, values = (
            mx.concatenate([x[page] for page in used], axis=1)[None, :, :length] for x in (k, v)
        )
        own = mx.fast.scaled_dot_product_attention(q[n : n + 1], keys, values, scale=WIDTH**-0.5)
        expected.append(own)
    report("paged, against the gathered keys", out, mx.concatenate(expected))


if __name__ == "__main__":
    main()
