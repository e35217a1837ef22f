"""Gradients of attention by their formulas, in NumPy float64, one sequence after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.problem.inputs import NOTHING, Inputs
from metalgen.reference.float64 import (
    Float64,
    Sequence,
    Weights,
    arrays_of,
    as_float64,
    changed,
    own_keys,
    places_of,
    rotated,
    sequences_of,
    weights_of,
)

STEP = 1e-6
"""Of central differences in what score functions read: their error is below 1e-9 of a derivative,
except within a step of a kink."""


def gradients(
    q: Any,
    k: Any,
    v: Any,
    cotangents: tuple[Any, Any],
    scale: float,
    features: dict[str, Any],
    given: tuple[Any, Any] | None = None,
) -> dict[str, Float64]:
    """What `metalgen.reference.gradients_float64` describes."""
    inputs = features.get("inputs") or NOTHING
    arrays = arrays_of(q, k, v, features, inputs)
    found = {name: np.zeros(x.shape) for name, x in zip("qkv", arrays, strict=True)}
    for name in ("bias", "alibi_slopes", "sinks"):
        if (array := getattr(inputs, name)) is not None:
            found[name] = np.zeros(array.shape)
    for number, array in enumerate(inputs.score):
        found[f"score[{number}]"] = np.zeros(array.shape)
    dout, dlse = (None if x is None else as_float64(x) for x in cotangents)
    assert dout is not None
    for s in sequences_of(*arrays, features, inputs):
        place = s.entry, slice(None), s.rows
        w = weights_of(s, arrays[0].shape, scale, features, inputs)
        if given is not None:  # weights by a log-sum-exp that other keys had a share in
            out, lse = (as_float64(x)[place] for x in given)
            w = _by_lse(w, lse)
        else:
            out, lse = w.dropped @ w.v, w.lse
        delta = (dout[place] * out).sum(axis=-1)
        if dlse is not None:
            delta = delta - np.where(np.isfinite(lse), dlse[place], 0.0)
        _add(found, s, w, dout[place], delta, scale, features, arrays[0].shape)
        if "sinks" in found:
            with np.errstate(invalid="ignore"):
                share = np.exp(as_float64(inputs.sinks)[:, None] - lse)
            found["sinks"] -= np.where(np.isfinite(lse), share * delta, 0.0).sum(axis=1)
    return found


def _by_lse(w: Weights, lse: Float64) -> Weights:
    base = np.where(np.isfinite(lse), lse, 0.0)[..., None]
    weights = np.where(w.seen & np.isfinite(lse)[..., None], np.exp(w.scores - base), 0.0)
    kept = np.divide(w.dropped, w.weights, out=np.zeros_like(weights), where=w.weights > 0)
    return dataclasses.replace(w, weights=weights, dropped=weights * kept)


def _add(
    found: dict[str, Float64],
    s: Sequence,
    w: Weights,
    dout: Float64,
    delta: Float64,
    scale: float,
    features: dict[str, Any],
    shape: tuple[int, ...],
) -> None:
    """Add a sequence's share of all gradients but the sinks'."""
    inputs = features.get("inputs") or NOTHING
    kept = np.divide(w.dropped, w.weights, out=np.zeros_like(w.weights), where=w.weights > 0)
    dy = w.weights * (kept * (dout @ np.swapaxes(w.v, 1, 2)) - delta[..., None])
    dx = np.where(w.seen, dy * _slope(w, s, shape, features, inputs), 0.0)
    dq = scale * dx @ w.k
    if features.get("rope"):
        dq = rotated(dq, features, inputs, s.number, -1)
    found["q"][s.entry, :, s.rows] += dq
    if s.keys is not None:
        group = s.q.shape[0] // s.k.shape[0]
        dk, dv = scale * np.swapaxes(dx, 1, 2) @ w.q, np.swapaxes(w.dropped, 1, 2) @ dout
        for name, x in (("k", dk), ("v", dv)):
            heads = x.reshape(x.shape[0] // group, group, *x.shape[1:]).sum(axis=1)
            found[name][s.entry][:, s.keys] += heads
    if "alibi_slopes" in found:
        distance = np.abs(own_keys(s) - places_of(s)["kv"])
        slopes = found["alibi_slopes"]
        own = slopes if slopes.ndim == 1 else slopes[s.number]
        own -= (dy * distance).sum(axis=(1, 2))
    if "bias" in found:
        _add_broadcast(found["bias"], dy, s.number)
    for number, array in enumerate(inputs.score):
        if mx.issubdtype(array.dtype, mx.floating):
            own_shape = found[f"score[{number}]"]
            for index, slope in _of_captured(w, s, shape, features, inputs, number):
                own_shape[index] += np.where(w.seen, dy * slope, 0.0).sum()


def _add_broadcast(into: Float64, dy: Float64, entry: int) -> None:
    """Add the gradient of one batch entry to that of an array of which any axis may be 1."""
    own = into[entry if into.shape[0] > 1 else 0]
    for axis, size in enumerate(own.shape):
        if size == 1:
            dy = dy.sum(axis=axis, keepdims=True)
    own[:, :, : dy.shape[2]] += dy


def _slope(
    w: Weights, s: Sequence, shape: tuple[int, ...], features: dict[str, Any], inputs: Inputs
) -> Float64:
    """The derivative of the changed scores in the raw ones."""
    if features.get("score_mod") is None:
        if (cap := features.get("softcap")) is None:
            return np.ones_like(w.raw)
        of_softcap: Float64 = 1 - np.tanh(w.raw / cap) ** 2
        return of_softcap
    step = STEP * np.maximum(1.0, np.abs(w.raw))
    above, below = (changed(w.raw + d, s, shape, features, inputs) for d in (step, -step))
    with np.errstate(invalid="ignore"):
        return (above - below) / (2 * step)


def _of_captured(
    w: Weights,
    s: Sequence,
    shape: tuple[int, ...],
    features: dict[str, Any],
    inputs: Inputs,
    number: int,
) -> Iterator[tuple[tuple[int, ...], Float64]]:
    """Each element of a captured array, and the derivative of all scores in it."""
    exact = as_float64(inputs.score[number])
    for index in np.ndindex(exact.shape):
        moved = []
        for direction in (1, -1):
            array = exact.copy()
            array[index] += direction * STEP
            captured: list[Any] = list(inputs.score)
            captured[number] = array  # float64, which MLX's array types are not
            own = dataclasses.replace(inputs, score=tuple(captured))
            moved.append(changed(w.raw, s, shape, features, own))
        yield index, (moved[0] - moved[1]) / (2 * STEP)
