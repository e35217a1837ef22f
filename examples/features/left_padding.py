"""A batch of prompts of several lengths, padded on the left: prefill, and one step of decoding.

All prompts end at the same row, so that the next token of each has the same place in the cache.
`kv_starts` says where each begins; what lies before it is neither read nor computed.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

LENGTHS, HEADS, KV_HEADS, WIDTH = (70, 23, 41), 8, 2, 64
LONGEST = max(LENGTHS)


def main() -> None:
    starts = mx.array([LONGEST - length for length in LENGTHS])
    k, v = (normal(len(LENGTHS), KV_HEADS, LONGEST, WIDTH, seed=seed) for seed in (1, 2))
    for step, rows in (("prefill", LONGEST), ("decoding", 1)):
        q = normal(len(LENGTHS), HEADS, rows, WIDTH, seed=3)
        out = metalgen.attention(q, k, v, causal=True, kv_starts=starts, device=DEVICE)
        found, expected = [], []
        for n, length in enumerate(LENGTHS):
            own = min(rows, length)  # the rows before are of the padding, and zeros
            found.append(out[n, :, -own:])
            keys, values = (x[n : n + 1, :, -length:] for x in (k, v))
            alone = mx.fast.scaled_dot_product_attention(
                q[n : n + 1, :, -own:], keys, values, scale=WIDTH**-0.5, mask="causal"
            )
            expected.append(alone[0])
        report(
            f"{step}, against each prompt alone",
            mx.concatenate(found, axis=1),
            mx.concatenate(expected, axis=1),
        )


if __name__ == "__main__":
    main()
