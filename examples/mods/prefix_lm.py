"""Prefix-LM: all see the prompt, which sees itself in both directions; what follows is causal.

The length of the prefix is a captured array: one kernel serves every length. As in T5's prefix
language model and PaliGemma.
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, LENGTH = 2, 128
PREFIX = mx.array([40])


def in_prefix(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return kv_idx < PREFIX[b]


def causal(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return kv_idx <= q_idx


mask_mod = metalgen.or_masks(in_prefix, causal)


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    blocks = metalgen.create_block_mask(mask_mod, 1, None, LENGTH, LENGTH)
    out = metalgen.flex_attention(q, k, v, block_mask=blocks, device="simulator")

    # The same by whole arrays.
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    own = mx.fast.scaled_dot_product_attention(
        q, k, v, scale=64**-0.5, mask=(j < PREFIX) | (j <= i)
    )
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(__file__, mask_mod=mask_mod, blocks=blocks, length=LENGTH)


if __name__ == "__main__":
    main()
