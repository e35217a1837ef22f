"""Softcap: no score exceeds C, and small ones hardly change; C = 50 in Gemma 2.

One line; `mx.grad` of it would print just as well. (`metalgen.attention(softcap=)` has it built in,
with a cheaper hyperbolic tangent for 16-bit types.)
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, LENGTH, CAP = 2, 128, 50.0


def score_mod(
    score: mx.array, b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array
) -> mx.array:
    return CAP * mx.tanh(score / CAP)


def mask_mod(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return kv_idx <= q_idx


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    blocks = metalgen.create_block_mask(mask_mod, None, None, LENGTH, LENGTH)
    out = metalgen.flex_attention(
        q, k, v, score_mod=score_mod, block_mask=blocks, device="simulator"
    )

    # The same by whole arrays.
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    scores = (q.astype(mx.float32) * 64**-0.5) @ k.astype(mx.float32).swapaxes(-1, -2)
    scores = mx.where(j <= i, CAP * mx.tanh(scores / CAP), -mx.inf)
    own = mx.softmax(scores, axis=-1) @ v.astype(mx.float32)
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(
        __file__,
        score_mod=score_mod,
        mask_mod=mask_mod,
        blocks=blocks,
        length=LENGTH,
        raw=100 * mx.random.normal((LENGTH, LENGTH)),
    )


if __name__ == "__main__":
    main()
