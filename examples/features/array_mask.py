"""An array of booleans as the mask of several layers: its tiles are found once for all of them.

The mask is what padding and a causal rule give together, as an array; kernels are told no rule.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

LENGTHS, HEADS, KV_HEADS, WIDTH, LAYERS = (150, 40), 4, 2, 64, 2
LONGEST = max(LENGTHS)


def main() -> None:
    own = mx.arange(LONGEST) < mx.array(LENGTHS)[:, None]
    seen = own[:, None, None, :] & mx.tri(LONGEST, dtype=mx.bool_)
    blocks = metalgen.create_block_mask(seen, len(LENGTHS), None, LONGEST, LONGEST)
    print(f"{blocks.sparsity():.0f} % of the blocks are skipped")
    for layer in range(LAYERS):
        q = normal(len(LENGTHS), HEADS, LONGEST, WIDTH, seed=3 * layer)
        k, v = (normal(len(LENGTHS), KV_HEADS, LONGEST, WIDTH, seed=3 * layer + n) for n in (1, 2))
        out = metalgen.attention(q, k, v, mask=blocks, device=DEVICE)
        expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5, mask=seen)
        report(f"layer {layer}", out, expected)


if __name__ == "__main__":
    main()
