"""Calls with more batch entries or heads than one grid takes, run in pieces."""

from __future__ import annotations

import mlx.core as mx

from metalgen.devices.base import Runner
from metalgen.errors import ArgumentError
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs


def run_in_pieces(
    run: Runner,
    config: AttentionConfig,
    most: tuple[int, int],
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    inputs: Inputs = NOTHING,
) -> tuple[mx.array, mx.array | None]:
    """A call of `run` as several, of so many batch entries and KV heads at most, put together.

    Args:
        run: computes a piece.
        most: batch entries (of no effect on packed sequences, which are one entry) and KV heads of
            a piece; each 1 or more.
        q, k, v, scale, inputs: of the call, as `metalgen.devices.base.Runner` takes them.

    Raises:
        ArgumentError: a config whose functions or dropout see the numbers of entries and heads,
            which would begin at 0 in each piece.
    """
    most_entries, most_kv_heads = most
    if any(feature.numbered for feature in config.features):
        wanted = (
            f"at most {most_entries} batch entries and {most_kv_heads} KV heads on this device "
            "beside score or mask functions and dropout, or max_work"
        )
        raise ArgumentError("q.shape", wanted, q.shape)
    entries = range(0, q.shape[0], most_entries)
    heads = range(0, k.shape[1], most_kv_heads)
    group = config.heads_per_kv
    outputs: list[tuple[mx.array, mx.array | None]] = []
    for entry in entries:
        own = slice(None) if config.varlen else slice(entry, entry + most_entries)
        cached = slice(None) if config.page_size is not None else own
        some = []
        for head in heads:
            columns = slice(head, head + most_kv_heads)
            rows = slice(head * group, (head + most_kv_heads) * group)
            given = inputs
            if inputs is not NOTHING:
                given = _piece(config, inputs, own, rows, cached, columns)
            keys, values = k[cached, columns], v[cached, columns]
            some.append(run(q[own, rows], keys, values, scale, given))
        outputs.append(_joined(some, 1))
    return _joined(outputs, 0)


def _piece(
    config: AttentionConfig,
    inputs: Inputs,
    own: slice,
    rows: slice,
    cached: slice,
    columns: slice,
) -> Inputs:
    """The inputs of a piece: of some batch entries, query heads and KV heads."""
    found = {}
    for each in config.inputs:
        x = inputs[each.name]
        if each.cut == "entries":
            found[each.name] = x[own]
        elif each.cut == "heads":
            found[each.name] = x[rows] if x.ndim == 1 else x[own, rows]
        elif each.cut == "keys":
            found[each.name] = x[cached, columns]
        elif each.cut == "scores":
            along = (
                own if x.shape[0] > 1 else slice(None),
                rows if x.shape[1] > 1 else slice(None),
            )
            found[each.name] = x[along]
    # What blocks the array of a piece has is found from it.
    return inputs.having(found, blocks=None)


def _joined(
    parts: list[tuple[mx.array, mx.array | None]], axis: int
) -> tuple[mx.array, mx.array | None]:
    if len(parts) == 1:
        return parts[0]
    lse = [x for _, x in parts if x is not None]
    out = mx.concatenate([out for out, _ in parts], axis=axis)
    return out, mx.concatenate(lse, axis=axis) if lse else None
