"""Four sequences of different lengths in one call, none padded, none seeing another.

This is what training on packed batches and prefill in servers need. `cu_seqlens` says where each
sequence starts. Blocks of keys that belong to another sequence are skipped, not masked.
"""

from __future__ import annotations

from itertools import pairwise

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

LENGTHS = (50, 7, 130, 13)
TOTAL = sum(LENGTHS)
STARTS = [sum(LENGTHS[:n]) for n in range(len(LENGTHS) + 1)]


def main() -> None:
    q = normal(1, 8, TOTAL, 64, seed=1)
    k, v = normal(1, 2, TOTAL, 64, seed=2), normal(1, 2, TOTAL, 64, seed=3)
    starts = mx.array(STARTS)
    out = metalgen.attention(q, k, v, cu_seqlens_q=starts, causal=True, device=DEVICE)

    parts = []
    for a, b in pairwise(STARTS):
        own = (x[:, :, a:b] for x in (q, k, v))
        parts.append(mx.fast.scaled_dot_product_attention(*own, scale=64**-0.5, mask="causal"))
    report("packed, against each sequence alone", out, mx.concatenate(parts, axis=2))

    # flash-attn's layout: (rows, heads, width).
    q, k, v = (x[0].swapaxes(0, 1) for x in (q, k, v))
    out = metalgen.varlen_attention(q, k, v, starts, starts, causal=True, device=DEVICE)
    report("the same with heads second", out[None].swapaxes(1, 2), mx.concatenate(parts, axis=2))


if __name__ == "__main__":
    main()
