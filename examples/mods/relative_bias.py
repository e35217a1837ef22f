"""Relative position bias: a learnt number for each head and bucket of distances, as in T5.

Distances up to 8 have a bucket each, longer ones share logarithmic buckets up to 128 (Raffel et
al., 2020, causal form). The table is a captured array, and gradients reach it.
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, LENGTH = 4, 128
EXACT, BUCKETS, FARTHEST = 8, 16, 128
mx.random.seed(1)
TABLE = mx.random.normal((HEADS, BUCKETS))


def bucket(distance: mx.array) -> mx.array:
    """Number of the bucket of a distance back, an integer from 0 on."""
    ratio = mx.maximum(distance, 1).astype(mx.float32) / EXACT
    far = EXACT + mx.log(ratio) / mx.log(mx.array(FARTHEST / EXACT)) * (BUCKETS - EXACT)
    far = mx.minimum(far.astype(mx.int32), BUCKETS - 1)
    return mx.where(distance < EXACT, distance, far)


def score_mod(
    score: mx.array, b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array
) -> mx.array:
    return score + TABLE[h, bucket(mx.maximum(q_idx - kv_idx, 0))]


def mask_mod(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return kv_idx <= q_idx


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    blocks = metalgen.create_block_mask(mask_mod, None, None, LENGTH, LENGTH)
    out = metalgen.flex_attention(
        q, k, v, score_mod=score_mod, block_mask=blocks, device="simulator"
    )

    # The same by whole arrays.
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    h = mx.arange(HEADS)[:, None, None]
    bias = TABLE[h, bucket(mx.maximum(i - j, 0))]
    bias = mx.where(j <= i, bias, -mx.inf).astype(q.dtype)
    own = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask=bias)
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(
        __file__, score_mod=score_mod, mask_mod=mask_mod, blocks=blocks, heads=HEADS, length=LENGTH
    )


if __name__ == "__main__":
    main()
