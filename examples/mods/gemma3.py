"""Gemma 3's layers: five of six see a window (1,024 keys there, 32 here), the sixth sees all.

The kind of layer is a number in Python, so there are two kernels, each with its own block mask. The
heads share keys and values in groups.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, KV_HEADS, LENGTH, WINDOW, GLOBAL_EVERY = 4, 2, 128, 32, 6

MaskMod = Callable[[mx.array, mx.array, mx.array, mx.array], mx.array]


def mask_of(layer: int) -> MaskMod:
    """The mask function of a layer."""

    def causal(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
        return kv_idx <= q_idx

    def near(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
        return q_idx - kv_idx < WINDOW

    is_global = (layer + 1) % GLOBAL_EVERY == 0
    return causal if is_global else metalgen.and_masks(causal, near)


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, KV_HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    for layer in (GLOBAL_EVERY - 1, 0):
        blocks = metalgen.create_block_mask(mask_of(layer), None, None, LENGTH, LENGTH)
        out = metalgen.flex_attention(q, k, v, block_mask=blocks, device="simulator")
        seen = (j <= i) & ((i - j < WINDOW) | (layer == GLOBAL_EVERY - 1))
        own = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask=seen)
        skipped = f"{blocks.sparsity():.0f}% of the blocks skipped"
        print(f"layer {layer}: {difference(out, own)}; {skipped}")
    save(__file__, mask_mod=mask_of(0), blocks=blocks, length=LENGTH)


if __name__ == "__main__":
    main()
