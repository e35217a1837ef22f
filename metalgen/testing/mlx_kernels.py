"""MLX's own Metal kernels in the simulator, from the headers of the installed wheel."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from metalgen.simulator.harness import Constant, Output, run_metal

KERNELS = "mlx/backend/metal/kernels"
"""Where the headers are, in MLX's include folder."""
TYPES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
"""MLX's names of types, as its kernels are instantiated with."""


def include(*headers: str) -> str:
    """The text that includes some of MLX's kernel headers, after the one that all need."""
    return "".join(f'#include "{KERNELS}/{header}"\n' for header in ("utils.h", *headers))


def instantiate(name: str, function: str, *arguments: Any) -> str:
    """MLX's instantiation of a kernel template; booleans are spelled as in Metal."""
    spelled = ", ".join(str(a).lower() if isinstance(a, bool) else str(a) for a in arguments)
    return f'\ninstantiate_kernel("{name}", {function}, {spelled})\n'


def groups(counts: tuple[int, int, int], size: tuple[int, int, int]) -> dict[str, Any]:
    """Grid and threadgroup of a launch that MLX counts in threadgroups."""
    x, y, z = (count * extent for count, extent in zip(counts, size, strict=True))
    return {"grid": (x, y, z), "threadgroup": size}


def run_attention(q: mx.array, k: mx.array, v: mx.array, causal: bool = False) -> mx.array:
    """MLX's attention kernel, launched as MLX's host code does.

    Args:
        q: ``(B, H, Lq, D)``, k, v: ``(B, Hkv, Lk, D)``, of one of `TYPES`; D is 64, 80 or 128.
        causal: a mask aligned at the lower right.

    Returns:
        ``(B, H, Lq, D)``; scores are scaled by ``1 / sqrt(D)``.
    """
    batch, heads, q_len, dim = q.shape
    kv_len = k.shape[2]
    bq, bk = 32, 32 if dim < 128 else 16
    tname = TYPES[q.dtype]
    source = include("steel/attn/kernels/steel_attention.h")
    source += instantiate("attention_test", "attention", tname, bq, bk, dim, dim, 4, 1, tname)
    strides = [(x.shape[1] * x.shape[2] * dim, x.shape[2] * dim, dim) for x in (q, k, v, q)]
    params = Constant(
        "6i f 7i 0q 12q",
        batch,
        heads,
        dim,
        q_len,
        kv_len,
        heads // k.shape[1],
        dim**-0.5,
        -(-q_len // bq),
        -(-kv_len // bk),
        q_len // bq,
        kv_len // bk,
        q_len % bq,
        kv_len % bk,
        kv_len - q_len,
        *(stride for each in strides for stride in each),
    )
    outputs = run_metal(
        source,
        "attention_test",
        {0: q, 1: k, 2: v, 3: Output(q.shape, q.dtype), 4: params},
        constants={
            200: q_len % bq == 0,
            201: kv_len % bk == 0,
            300: False,
            301: causal,
            302: False,
            303: False,
        },
        **groups((-(-q_len // bq), heads, batch), (32, 4, 1)),
    )
    return outputs[3]
