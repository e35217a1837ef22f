"""Attention over a cache that is spread over several processes: each answers for its part."""

from __future__ import annotations

from typing import Any, cast

import mlx.core as mx

from metalgen.calls.options import Keys
from metalgen.distributed.agreement import agree, place, words_of
from metalgen.errors import ArgumentError
from metalgen.ops.attention import attention
from metalgen.ops.blocks import merge

NOT_SPREAD = frozenset(("bias", "mask", "dropout", "dropout_key", "cu_seqlens_q", "cu_seqlens_k"))
"""Options of `metalgen.attention` that have no meaning for a part of the keys."""

OWN = frozenset(("q_offset", "kv_lens", "kv_starts", "block_table", "value_head_dim"))
"""Options that describe a process's own part."""


def spread_attention(
    q: mx.array,
    k: Keys,
    v: Keys,
    *,
    group: Any = None,
    scale: float | None = None,
    return_lse: bool = False,
    **options: Any,
) -> mx.array | tuple[mx.array, mx.array]:
    """Attention of queries that every process has, over keys of which each process has a part.

    Every process computes its part, with whatever cache it has (dense, paged, quantized, of any
    length); outputs and log-sum-exps are gathered in one message and merged. For inference: it has
    no gradients.

    Args:
        q: ``(B, H, Lq, D)``, the same on every process.
        k, v: this process's part of the cache, as of `metalgen.attention`.
        group: a group of ``mx.distributed``; None: all processes.
        scale, return_lse: as of `metalgen.attention`.
        options: of `metalgen.attention`, for this part. If a mask or a position counts (causal,
            windows, ALiBi, rope), `q_offset` is the place of the first query counted from this
            part's first key. Sinks are counted once.

    Returns:
        ``(B, H, Lq, Dv)`` of the type of `q`, the same on every process; with `return_lse` a pair.

    Raises:
        ArgumentError: an option without a meaning for parts; on every process, processes that
            disagree on the queries or the options.
    """
    for name, value in options.items():
        unset = value is None or (isinstance(value, (int, float)) and not value)
        if name in NOT_SPREAD and not unset:
            raise ArgumentError(name, "none with keys that are spread", value)
    rank, size = place(group)
    shared = {name: value for name, value in options.items() if name not in OWN}
    words = (q.shape, str(q.dtype), scale, return_lse, words_of(shared))
    agree("q and options", words, q.shape, group)
    if rank:
        options["sinks"] = None

    @mx.custom_function
    def answer(q: mx.array) -> mx.array:
        out, lse = attention(q, k, v, scale=scale, return_lse=True, **options)
        own = mx.concatenate([out.astype(mx.float32), lse[..., None]], axis=-1)
        return mx.distributed.all_gather(own[None], group=group)

    @answer.vjp
    def backward(primals: Any, cotangent: Any, output: Any) -> Any:
        raise ArgumentError("q", "no gradients here; context_attention has them", "mx.grad")

    every = cast(mx.array, answer(q))
    parts = [(each[0, ..., :-1], each[0, ..., -1]) for each in mx.split(every, size, axis=0)]
    out, lse = merge(*parts)
    out = out.astype(q.dtype)
    return (out, lse) if return_lse else out
