"""Dilated attention: a head sees every key, every second, every third or every fourth.

As in Longformer's dilated windows (Beltagy et al., 2020): the window spans WINDOW keys that are
h + 1 apart, so that higher heads look farther back at the same cost.
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, LENGTH, WINDOW = 4, 128, 16


def mask_mod(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    back = q_idx - kv_idx
    step = h + 1
    return (back >= 0) & (back % step == 0) & (back < WINDOW * step)


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    blocks = metalgen.create_block_mask(mask_mod, None, HEADS, LENGTH, LENGTH)
    out = metalgen.flex_attention(q, k, v, block_mask=blocks, device="simulator")

    # The same by whole arrays.
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    h = mx.arange(HEADS)[:, None, None]
    step = h + 1
    seen = (j <= i) & ((i - j) % step == 0) & (i - j < WINDOW * step)
    own = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask=seen)
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(__file__, mask_mod=mask_mod, blocks=blocks, heads=HEADS, length=LENGTH)


if __name__ == "__main__":
    main()
