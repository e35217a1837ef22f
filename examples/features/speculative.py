"""Verifying drafts of several lengths in one call: each sequence has its own number of queries.

A draft model proposed 4, 1 and 3 tokens for three sequences. Their queries lie in one array with
room for 4; `seqused_q` says how many there are, and `kv_lens` where each sequence's keys end.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

DRAFTS, LENGTHS, ROOM, HEADS, KV_HEADS, WIDTH = (4, 1, 3), (90, 31, 64), 96, 8, 2, 64


def main() -> None:
    q = normal(len(DRAFTS), HEADS, max(DRAFTS), WIDTH, seed=1)
    k, v = (normal(len(DRAFTS), KV_HEADS, ROOM, WIDTH, seed=seed) for seed in (2, 3))
    out = metalgen.attention(
        q,
        k,
        v,
        causal=True,
        seqused_q=mx.array(DRAFTS),
        kv_lens=mx.array(LENGTHS),
        device=DEVICE,
    )
    found, expected = [], []
    for n, (draft, length) in enumerate(zip(DRAFTS, LENGTHS, strict=True)):
        keys, values = (x[n : n + 1, :, :length] for x in (k, v))
        own = q[n : n + 1, :, :draft]
        alone = mx.fast.scaled_dot_product_attention(
            own, keys, values, scale=WIDTH**-0.5, mask="causal"
        )
        found.append(out[n : n + 1, :, :draft])
        expected.append(alone)
    report(
        "drafts, against each sequence alone",
        mx.concatenate(found, axis=2),
        mx.concatenate(expected, axis=2),
    )


if __name__ == "__main__":
    main()
