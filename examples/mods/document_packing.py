"""Documents packed into one sequence: causal, and no query sees a key of another document.

Instead of padding each document to the longest, training joins them; a captured array says which
document a position belongs to. The blocks between documents are skipped.
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, LENGTHS = 2, (25, 40, 17, 46)
LENGTH = sum(LENGTHS)
DOCUMENT = mx.concatenate([mx.full(n, d) for d, n in enumerate(LENGTHS)])


def mask_mod(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return (DOCUMENT[q_idx] == DOCUMENT[kv_idx]) & (kv_idx <= q_idx)


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    blocks = metalgen.create_block_mask(mask_mod, None, None, LENGTH, LENGTH)
    out = metalgen.flex_attention(q, k, v, block_mask=blocks, device="simulator")

    # The same, one document at a time.
    parts, start = [], 0
    for n in LENGTHS:
        part = (x[:, :, start : start + n] for x in (q, k, v))
        parts.append(mx.fast.scaled_dot_product_attention(*part, scale=64**-0.5, mask="causal"))
        start += n
    own = mx.concatenate(parts, axis=2)
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(__file__, mask_mod=mask_mod, blocks=blocks, length=LENGTH)


if __name__ == "__main__":
    main()
