"""ALiBi: no positions are embedded; scores fall with the distance, at a slope for each head.

`metalgen.alibi_slopes` gives the slopes of the paper. The bias is computed in the kernel from the
slopes alone; as an array it would have a number for each head, query and key.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

HEADS, LENGTH = 12, 200


def main() -> None:
    q, k, v = (normal(1, HEADS, LENGTH, 64, seed=seed) for seed in (1, 2, 3))
    slopes = metalgen.alibi_slopes(HEADS)
    out = metalgen.attention(q, k, v, causal=True, alibi_slopes=slopes, device=DEVICE)

    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    bias = mx.where(j <= i, -slopes[:, None, None] * (i - j), -mx.inf).astype(q.dtype)
    expected = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask=bias)
    saved = f"{slopes.nbytes} bytes of slopes for {bias.nbytes} of bias"
    report(f"ALiBi ({saved}), against an additive mask", out, expected)


if __name__ == "__main__":
    main()
