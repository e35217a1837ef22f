"""Multi-head latent attention (DeepSeek) in its absorbed form: all heads share one latent.

The cache holds, for each token, 512 latent columns and 64 of rotary keys. The projections of keys
and values are absorbed into the queries and the output, so that attention reads the latents alone:
keys of width 576 whose first 512 columns are the values, shared by all query heads.
"""

from __future__ import annotations

import mlx.core as mx
from _compare import DEVICE, normal, report

import metalgen

HEADS, LATENT, ROTARY, NOPE, LENGTH = 16, 512, 64, 128, 150
SCALE = (NOPE + ROTARY) ** -0.5


def main() -> None:
    cache = normal(1, 1, LENGTH, LATENT + ROTARY, seed=1)
    up_k = normal(HEADS, NOPE, LATENT, seed=2) * LATENT**-0.5  # key projection of each head
    q_nope, q_rope = normal(1, HEADS, 1, NOPE, seed=3), normal(1, HEADS, 1, ROTARY, seed=4)

    q = mx.concatenate([q_nope @ up_k, q_rope], axis=-1)
    out = metalgen.attention(q, cache, cache[..., :LATENT], scale=SCALE, device=DEVICE)

    # The same with the keys of each head written out.
    latents, rotary = (x.astype(mx.float32) for x in (cache[..., :LATENT], cache[..., LATENT:]))
    keys = latents @ up_k.astype(mx.float32).swapaxes(-1, -2)
    scores = q_nope.astype(mx.float32) @ keys.swapaxes(-1, -2)
    scores = scores + q_rope.astype(mx.float32) @ rotary.swapaxes(-1, -2)
    expected = mx.softmax(scores * SCALE, axis=-1) @ latents
    report("absorbed, against the keys of all heads", out, expected)


if __name__ == "__main__":
    main()
