"""ALiBi: no position embedding, but a score that falls with the distance, faster in some heads.

Slopes as in Press, Smith, Lewis, "Train Short, Test Long" (2022): 2^(-8 (h + 1) / H).
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, LENGTH = 4, 128


def score_mod(
    score: mx.array, b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array
) -> mx.array:
    slope = 2.0 ** (-8.0 * (h + 1) / HEADS)
    return score - slope * (q_idx - kv_idx)


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
    bias = -(2.0 ** (-8.0 * (h + 1) / HEADS)) * (i - j)
    bias = mx.where(j <= i, bias, -mx.inf).astype(q.dtype)
    own = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask=bias)
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(
        __file__, score_mod=score_mod, mask_mod=mask_mod, blocks=blocks, heads=HEADS, length=LENGTH
    )


if __name__ == "__main__":
    main()
