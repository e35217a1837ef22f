"""Causal attention of 8 query and 2 key/value heads, by a Metal kernel executed on this CPU.

    metalgen tune --chip M3Max
    python examples/attention.py

The first command tunes for that chip; the second runs the kernel that won, in the simulator.
"""

from __future__ import annotations

import mlx.core as mx

import metalgen

mx.random.seed(0)
q = mx.random.normal((1, 8, 200, 64)).astype(mx.float16)  # batch, heads, length, head dimension
k = mx.random.normal((1, 2, 200, 64)).astype(mx.float16)
v = mx.random.normal((1, 2, 200, 64)).astype(mx.float16)

out = metalgen.attention(q, k, v, causal=True, device="simulator")

own = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask="causal")
error = mx.linalg.norm((out - own).astype(mx.float32)) / mx.linalg.norm(own.astype(mx.float32))
print(f"{out.shape} {out.dtype}, {error.item():.1e} from MLX's own attention (norm over norm)")

config = metalgen.AttentionConfig(head_dim=64, dtype="float16", heads_per_kv=4, causal=True)
kernel = metalgen.get_kernel(config, heads=8, q_len=200, device="simulator")
print(kernel.explain())
