"""Sliding window: a query sees its own key and the 31 before it, as in Mistral 7B (4,096 there).

Two mask functions joined by `and_masks`; the blocks outside of the band are skipped.
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, LENGTH, WINDOW = 2, 128, 32


def causal(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return kv_idx <= q_idx


def near(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return q_idx - kv_idx < WINDOW


mask_mod = metalgen.and_masks(causal, near)


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    blocks = metalgen.create_block_mask(mask_mod, None, None, LENGTH, LENGTH)
    out = metalgen.flex_attention(q, k, v, block_mask=blocks, device="simulator")

    # The same by whole arrays.
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    own = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=64**-0.5, mask=(j <= i) & (i - j < WINDOW)
    )
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(__file__, mask_mod=mask_mod, blocks=blocks, length=LENGTH)


if __name__ == "__main__":
    main()
