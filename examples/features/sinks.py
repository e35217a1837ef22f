"""A decoding step of a layer of gpt-oss: a sink for each head, a window, queries that turn.

A sink is a learnt logit that takes part in the softmax and has no value: a head that finds nothing
attends to it. Queries get their rotary embedding in the kernel; the cache holds turned keys.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

HEADS, KV_HEADS, WIDTH, LENGTH, WINDOW, BASE = 64, 8, 64, 300, 128, 150000.0


def main() -> None:
    q = normal(1, HEADS, 1, WIDTH, seed=1)
    k, v = normal(1, KV_HEADS, LENGTH, WIDTH, seed=2), normal(1, KV_HEADS, LENGTH, WIDTH, seed=3)
    sinks = normal(HEADS, seed=4)
    out = metalgen.attention(
        q,
        k,
        v,
        causal=True,
        window_left=WINDOW - 1,
        sinks=sinks,
        rope=metalgen.Rope(base=BASE),  # the query stands at the last key
        device=DEVICE,
    )

    turned = mx.fast.rope(q, WIDTH, traditional=False, base=BASE, scale=1.0, offset=LENGTH - 1)
    expected = mx.fast.scaled_dot_product_attention(
        turned,
        k[:, :, -WINDOW:],
        v[:, :, -WINDOW:],
        scale=WIDTH**-0.5,
        sinks=sinks,
    )
    report("sinks, window and rotary queries, against MLX's three steps", out, expected)


if __name__ == "__main__":
    main()
