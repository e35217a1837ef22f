"""gpt-oss's layers: a window of 128 keys (32 here) in every second one, and attention sinks.

A sink is a learnt score for each head that takes part in the softmax and brings no value. With the
log-sum-exp returned it needs no kernel of its own: out * sigmoid(lse - sink). (`sinks=` has it
built in; see `examples/features/sinks.py`.) The heads share keys and values in groups.
"""

from __future__ import annotations

import mlx.core as mx
from _picture import difference, save

import metalgen

HEADS, KV_HEADS, LENGTH, WINDOW = 4, 2, 128, 32


def mask_mod(b: mx.array, h: mx.array, q_idx: mx.array, kv_idx: mx.array) -> mx.array:
    return (kv_idx <= q_idx) & (q_idx - kv_idx < WINDOW)


def main() -> None:
    mx.random.seed(0)
    q = mx.random.normal((1, HEADS, LENGTH, 64)).astype(mx.float16)
    k, v = (mx.random.normal((1, KV_HEADS, LENGTH, 64)).astype(mx.float16) for _ in range(2))
    sinks = mx.random.normal((HEADS,))
    blocks = metalgen.create_block_mask(mask_mod, None, None, LENGTH, LENGTH)
    result = metalgen.flex_attention(
        q, k, v, block_mask=blocks, return_lse=True, device="simulator"
    )
    assert isinstance(result, tuple)
    out, lse = result
    out = out * mx.sigmoid(lse - sinks[:, None])[..., None].astype(out.dtype)

    # The same by MLX, which takes the sinks as an argument.
    i, j = mx.arange(LENGTH)[:, None], mx.arange(LENGTH)
    own = mx.fast.scaled_dot_product_attention(
        q,
        k,
        v,
        scale=64**-0.5,
        mask=(j <= i) & (i - j < WINDOW),
        sinks=sinks.astype(q.dtype),
    )
    print(f"{difference(out, own)}; {blocks.sparsity():.0f}% of the blocks skipped")
    save(__file__, mask_mod=mask_mod, blocks=blocks, length=LENGTH)


if __name__ == "__main__":
    main()
