"""A long prompt computed in blocks of queries, each where it stands in the whole.

Causal masks, windows and ALiBi usually align at the end of the keys. A block in the middle says
where its first query stands, and sees what its rows see in the whole call.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

LENGTH, BLOCK, HEADS, KV_HEADS, WIDTH = 150, 64, 4, 2, 64


def main() -> None:
    q = normal(1, HEADS, LENGTH, WIDTH, seed=1)
    k, v = (normal(1, KV_HEADS, LENGTH, WIDTH, seed=seed) for seed in (2, 3))
    options: dict[str, Any] = {
        "causal": True,
        "window_left": 100,
        "alibi_slopes": metalgen.alibi_slopes(HEADS),
        "device": DEVICE,
    }
    blocks = [
        metalgen.attention(q[:, :, first : first + BLOCK], k, v, q_offset=first, **options)
        for first in range(0, LENGTH, BLOCK)
    ]

    distance = mx.arange(LENGTH)[:, None] - mx.arange(LENGTH)
    seen = (distance >= 0) & (distance <= 100)
    fall = metalgen.alibi_slopes(HEADS)[:, None, None] * mx.abs(distance)
    bias = mx.where(seen, -fall, -mx.inf)[None].astype(q.dtype)
    whole = mx.fast.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5, mask=bias)
    report("in blocks, against the whole", mx.concatenate(blocks, axis=2), whole)


if __name__ == "__main__":
    main()
