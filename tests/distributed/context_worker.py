"""One process of several: compares its part of attention in parts with the whole, in NumPy float64.

Run by `test_context.py`, which sets MLX_RANK and MLX_HOSTFILE. Prints a JSON line.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen import Rope
from metalgen.distributed import (
    context_attention,
    shard_sequence,
    spread_attention,
    unshard_sequence,
)
from metalgen.distributed.layouts import own_part
from metalgen.errors import ArgumentError
from metalgen.ops.attention import attention
from metalgen.ops.flex_attention import flex_attention
from metalgen.reference import attention_float64

SLOPES = mx.array([0.5, 0.25, 0.125, 0.0625])
SINKS = mx.array([0.3, -1.0, 0.0, 2.0])


def documents(b: Any, h: Any, i: Any, j: Any) -> Any:
    return (i // 9 == j // 9) & (j <= i)


def capped(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return 5 * mx.tanh(s / 5) - 0.01 * mx.abs(i - j)


CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window_left": 7},
    "both sides": {"window_left": 3, "window_right": 10},
    "alibi, softcap, sinks": {
        "causal": True,
        "softcap": 4.0,
        "alibi_slopes": SLOPES,
        "sinks": SINKS,
    },
    "dropout": {"causal": True, "dropout": 0.3, "dropout_key": mx.random.key(5)},
    "rotary": {"causal": True, "rope": Rope(dims=8)},
    "functions": {"score_mod": capped, "mask_mod": documents},
}


def arrays(size: int) -> tuple[mx.array, ...]:
    length = 12 * size
    shapes = ((2, 4, length, 16), (2, 2, length, 16), (2, 2, length, 8), (2, 4, length, 8))
    return tuple(mx.random.normal(s, key=mx.random.key(n)) for n, s in enumerate(shapes))


def whole_call(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
    call = flex_attention if "score_mod" in options else attention
    return call(q, k, v, return_lse=True, device="reference", q_offset=0, **options)


def worst(found: mx.array, expected: Any) -> float:
    return float(np.abs(np.array(found) - np.array(expected)).max())


def compare(name: str, layout: str, rank: int, size: int) -> dict[str, float]:
    options = CASES[name]
    q, k, v, weight = arrays(size)

    def part(x: Any) -> mx.array:
        return own_part(mx.array(x).astype(mx.float32), rank, size, layout, 2)

    def shared(q: Any, k: Any, v: Any) -> Any:
        out, lse = context_attention(
            q, k, v, layout=layout, return_lse=True, device="reference", **options
        )
        return out, lse

    def loss(q: Any, k: Any, v: Any) -> Any:
        return (shared(q, k, v)[0] * part(weight)).sum()

    parts = [part(x) for x in (q, k, v)]
    out, lse = shared(*parts)
    gradients = mx.grad(loss, argnums=(0, 1, 2))(*parts)
    exact = whole_call(q, k, v, options)
    if name in ("causal", "window"):  # and by no operations of MLX
        exact = attention_float64(q, k, v, scale=0.25, **options)
    expected = mx.grad(
        lambda q, k, v: (whole_call(q, k, v, options)[0] * weight).sum(), argnums=(0, 1, 2)
    )(q, k, v)
    return {
        "out": worst(out, part(exact[0])),
        "lse": worst(lse, part(exact[1])),
        "gradients": max(
            worst(a, part(b)) for a, b in zip(gradients, expected, strict=True)
        ),
    }  # fmt: skip


def refusal(rank: int) -> str:
    """What a process says when the last one calls something else."""
    x = mx.zeros((1, 1, 4, 8))
    window = 3 if rank == 0 else 2
    try:
        mx.eval(context_attention(x, x, x, causal=True, window_left=window, device="reference"))
    except ArgumentError as error:
        return str(error)
    return "none"


SPREAD: dict[str, dict[str, Any]] = {
    "all keys": {},
    "causal drafts": {"causal": True},
    "window and ALiBi": {"causal": True, "window_left": 11, "alibi_slopes": SLOPES},
    "sinks and softcap": {"sinks": SINKS, "softcap": 3.0},
}
LENGTHS = (5, 12, 8, 0)
"""Rows of the cache that each process has."""


def spread(name: str, rank: int, size: int) -> float:
    """How far an answer over a cache in parts is from that over the whole one."""
    options = SPREAD[name]
    total = sum(LENGTHS[:size])
    first = sum(LENGTHS[:rank])
    q = mx.random.normal((2, 4, 3, 16), key=mx.random.key(7))
    k, v = (mx.random.normal((2, 2, total, 16), key=mx.random.key(n)) for n in (8, 9))
    at = {"q_offset": total - 3} if "causal" in options else {}
    expected = attention(q, k, v, return_lse=True, device="reference", **at, **options)
    if at:
        at["q_offset"] -= first
    own = slice(first, first + LENGTHS[rank])
    found = spread_attention(
        q, k[:, :, own], v[:, :, own], return_lse=True, device="reference", **at, **options
    )
    return max(worst(a, b) for a, b in zip(found, expected, strict=True))


def trained(steps: int, rank: int, size: int) -> float:
    """The largest difference from the first of so many equal steps, forward and backward."""
    parts = [own_part(x, rank, size, "zigzag", 2) for x in arrays(size)[:3]]

    def loss(q: Any, k: Any, v: Any) -> Any:
        return context_attention(q, k, v, causal=True, device="reference").square().sum()

    step, first, most = mx.value_and_grad(loss, argnums=(0, 1, 2)), None, 0.0
    for _ in range(steps):
        value, gradients = step(*parts)
        found = [value, *gradients]
        first = found if first is None else first
        most = max(most, *(worst(a, b) for a, b in zip(found, first, strict=True)))
    return most


def main() -> None:
    group = mx.distributed.init(strict=True, backend="ring")
    rank, size = group.rank(), group.size()
    found: dict[str, Any] = {}
    if len(sys.argv) > 1:
        print(json.dumps({"steps": trained(int(sys.argv[1]), rank, size)}))
        return
    for layout in ("zigzag", "contiguous"):
        for name in CASES:
            found[f"{name}, {layout}"] = compare(name, layout, rank, size)
    whole = mx.arange(12.0 * size)[None, None, :, None]
    own = shard_sequence(whole)
    found["joined"] = bool((unshard_sequence(own) == whole).all().item())
    found["spread"] = max(spread(name, rank, size) for name in SPREAD)
    found["refusal"] = refusal(rank)
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
