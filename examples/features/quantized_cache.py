"""Decoding over a quantized cache: the kernel reads packed words, and no dequantized copy is made.

The format is MLX's own (`mx.quantize`, affine): bits and group size are read off the shapes. Eight
bits are half of the bytes of float16, four bits a quarter, and a scale and a bias per group. Keys
and values may be quantized apart; keys usually need more bits, as their errors enter exponents.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

GROUP = 64


def main() -> None:
    q = normal(2, 8, 1, 128, seed=1)
    k, v = normal(2, 2, 300, 128, seed=2), normal(2, 2, 300, 128, seed=3)
    for both in ((8, 8), (4, 4), (8, 4)):
        keys, values = (
            mx.quantize(x, group_size=GROUP, bits=bits)
            for x, bits in zip((k, v), both, strict=True)
        )
        out = metalgen.attention(q, keys, values, value_head_dim=128, device=DEVICE)

        wide = (
            mx.dequantize(*x, group_size=GROUP, bits=bits)
            for x, bits in zip((keys, values), both, strict=True)
        )
        expected = mx.fast.scaled_dot_product_attention(q, *wide, scale=128**-0.5)
        size = sum(x.nbytes for x in (*keys, *values)) / (k.nbytes + v.nbytes)
        bits = f"{both[0]} and {both[1]} bits, {size:.0%} of the bytes"
        report(f"{bits}, against mx.dequantize", out, expected)


if __name__ == "__main__":
    main()
