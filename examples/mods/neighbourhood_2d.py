"""Neighbourhood attention in 2-D: a pixel sees the square of pixels around it.

Pixels of a HEIGHT x WIDTH image in rows; the square is moved inwards at the borders, so that every
query sees RADIUS * 2 + 1 squared keys (Hassani et al., "Neighborhood Attention Transformer", 2023).
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, HEIGHT, WIDTH, RADIUS = 2, 8, 16, 2
LENGTH = HEIGHT * WIDTH


def near(query: mx.array, key: mx.array, size: int) -> mx.array:
    """Whether a row (or column) is in the span of another, out of `size`."""
    centre = mx.clip(query, RADIUS, size - 1 - RADIUS)
    return mx.abs(key - centre) <= RADIUS


def mask_mod(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    rows = near(q_idx // WIDTH, kv_idx // WIDTH, HEIGHT)
    return rows & near(q_idx % WIDTH, kv_idx % WIDTH, WIDTH)


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    blocks = metalgen.create_block_mask(mask_mod, None, None, LENGTH, LENGTH)
    out = metalgen.flex_attention(q, k, v, block_mask=blocks, device="simulator")

    # The same by whole arrays.
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    b, h = mx.array(0), mx.arange(HEADS)[:, None, None]
    seen = mask_mod(b, h, i, j)
    assert mx.all(seen.sum(axis=-1) == (2 * RADIUS + 1) ** 2)
    own = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask=seen)
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(__file__, mask_mod=mask_mod, blocks=blocks, length=LENGTH)


if __name__ == "__main__":
    main()
