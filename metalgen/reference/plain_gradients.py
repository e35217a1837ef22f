"""Gradients of attention in plain MLX operations, from its output and log-sum-exp."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import mlx.core as mx

from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.reference.plain import kept, located, scores_of

MOST_SCORES = 1 << 25
"""Scores that are computed at once: more are cut into blocks of queries, one after the other."""
OF_ROWS = ("bias", "array_mask")
"""Inputs with an axis of queries."""

Results = tuple[mx.array, mx.array]


def gradients_plain(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    results: Results,
    cotangents: tuple[mx.array, mx.array | None],
    scale: float | mx.array,
    features: dict[str, Any],
    wanted: Collection[int] | None = None,
) -> list[mx.array]:
    """What `metalgen.reference.gradients_mlx` describes."""
    inputs = features.get("inputs") or NOTHING
    every = (q, k, v, *inputs.arrays)
    if 0 in q.shape[:3] or 0 in k.shape:
        return [mx.zeros_like(x) for x in every]
    keys = located(q[:, :, :1], k, v, features | {"block": (0, q.shape[2])}).k.shape[2]
    rows = max(16, MOST_SCORES // (q.shape[0] * q.shape[1] * keys))
    if rows >= q.shape[2]:
        return _of_block(q, k, v, results, cotangents, scale, features)
    return _in_blocks(every, results, cotangents, scale, features, (rows, wanted))


def _in_blocks(
    every: tuple[mx.array, ...],
    results: Results,
    cotangents: tuple[mx.array, mx.array | None],
    scale: float | mx.array,
    features: dict[str, Any],
    blocks: tuple[int, Collection[int] | None],
) -> list[mx.array]:
    """The same, some rows after the others, so that memory grows with the length alone.

    Those of `wanted`; others are zeros.
    """
    q, k, v, *_ = every
    inputs: Inputs = features.get("inputs") or NOTHING
    rows, wanted = blocks
    names = ["q", "k", "v", *("" for _ in (*inputs.score, *inputs.mask)), *inputs.named]
    chosen = range(len(every)) if wanted is None else sorted(wanted)
    by_rows = {n for n in chosen if n == 0 or (names[n] in OF_ROWS and every[n].shape[2] > 1)}
    wide = [x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x for x in (k, v)]
    parts: dict[int, list[mx.array]] = {n: [] for n in by_rows}
    sums: dict[int, mx.array] = {}
    total, before = q.shape[2], list[mx.array]()
    for first in range(0, total, rows):
        own = slice(first, min(first + rows, total))

        def cut(x: mx.array, own: slice = own) -> mx.array:
            return x[:, :, own]

        of_rows = {n: x for n in OF_ROWS if (x := inputs.get(n)) is not None and x.shape[2] > 1}
        given = inputs.having({n: cut(x) for n, x in of_rows.items()})
        queries = cut(q)
        if before:  # one block at a time: what it needs for a moment is free for the next
            queries = mx.depends(queries, before)
        dlse = cotangents[1]
        found = _of_block(
            *(queries, wide[0], wide[1]),
            (cut(results[0]), cut(results[1])),
            (cut(cotangents[0]), cut(dlse) if dlse is not None and dlse.ndim else dlse),
            scale,
            {**features, "inputs": given, "block": (first, total)},
        )
        for n in chosen:
            if n in by_rows:
                parts[n].append(found[n])
            else:
                sums[n] = sums[n] + found[n] if n in sums else found[n]
        before = [parts[n][-1] if n in by_rows else sums[n] for n in chosen]
    made = sums | {n: mx.concatenate(each, axis=2) for n, each in parts.items()}
    return [made[n].astype(x.dtype) if n in made else mx.zeros_like(x) for n, x in enumerate(every)]


def _of_block(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    results: Results,
    cotangents: tuple[mx.array, mx.array | None],
    scale: float | mx.array,
    features: dict[str, Any],
) -> list[mx.array]:
    """The gradients of a call, or of some of its rows (``features["block"]``)."""
    inputs = features.get("inputs") or NOTHING
    given = list(inputs.arrays)

    def with_arrays(arrays: tuple[mx.array, ...]) -> dict[str, Any]:
        return {**features, "inputs": inputs.replaced(arrays)}

    def scores(q: mx.array, k: mx.array, *arrays: mx.array) -> mx.array:
        own = with_arrays(arrays)
        return scores_of(q, located(q, k, v, own), scale, own)

    def values(v: mx.array, *arrays: mx.array) -> mx.array:
        return located(q, k, v, with_arrays(arrays)).v.astype(mx.float32)

    call = located(q, k, v, features)
    (out, lse), (dout, dlse) = results, cotangents
    # A row that sees nothing has a log-sum-exp of -inf, and weights of 0.
    lse = mx.where(lse == -mx.inf, mx.inf, lse)[..., None]
    weights = mx.exp(scores(q, k, *given) - lse)
    dout = dout.astype(mx.float32)
    if call.at.rows is not None:  # the output of rows of no sequence is constant
        dout = mx.where(call.at.rows[..., None], dout, 0.0)
    kv_heads, kv_len = call.k.shape[1:3]
    by_group = (q.shape[0], kv_heads, q.shape[1] // kv_heads, q.shape[2])
    grouped = dout.reshape(*by_group, -1)
    wide = call.v.astype(mx.float32)[:, :, None]
    of_weights = (grouped @ wide.swapaxes(-1, -2)).reshape(weights.shape)
    dropped = weights
    if features.get("dropout", 0.0):
        share = kept(call, features)
        of_weights, dropped = of_weights * share, weights * share
    delta = (dout * out.astype(mx.float32)).sum(axis=-1)
    if dlse is not None:
        delta = delta - dlse
    of_scores = weights * (of_weights - delta[..., None])
    of_values = (dropped.reshape(*by_group, kv_len).swapaxes(-1, -2) @ grouped).sum(axis=2)
    dq, dk, *others = mx.vjp(scores, [q, k, *given], [of_scores])[1]
    dv, *more = mx.vjp(values, [v, *given], [of_values])[1]
    found = [a + b for a, b in zip(others, more, strict=True)]  # scales of quantized values
    if inputs.sinks is not None:
        share = mx.exp(inputs.sinks[:, None] - lse[..., 0])
        number = next(n for n, x in enumerate(inputs.arrays) if x is inputs.sinks)
        found[number] = -(share * delta).sum(axis=(0, 2))
    return [dq, dk, dv, *found]
