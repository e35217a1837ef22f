"""Causal attention: a query sees the keys up to its own position.

The block mask skips the blocks above the diagonal and masks only those on it.
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, LENGTH = 2, 128


def mask_mod(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return kv_idx <= q_idx


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    blocks = metalgen.create_block_mask(mask_mod, None, None, LENGTH, LENGTH)
    out = metalgen.flex_attention(q, k, v, block_mask=blocks, device="simulator")

    # The same by whole arrays.
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    b, h = mx.array(0), mx.arange(HEADS)[:, None, None]
    own = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask=mask_mod(b, h, i, j))
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(__file__, mask_mod=mask_mod, blocks=blocks, length=LENGTH)


if __name__ == "__main__":
    main()
