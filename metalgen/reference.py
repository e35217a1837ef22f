"""Attention by its definition: in float64 for checking, in plain MLX for what has no kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metalgen.config import AttentionConfig


def attention_float64(
    q: Any, k: Any, v: Any, *, scale: float, causal: bool = False, **features: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Attention and its log-sum-exp in NumPy float64: what every kernel is checked against.

    Args:
        q: ``(B, H, Lq, D)``, k: ``(B, Hkv, Lk, D)``, v: ``(B, Hkv, Lk, Dv)``; anything that NumPy
            converts to float64.
        scale: factor of the scores.
        causal: aligned at the lower right.
        features: ``window_left``, ``window_right``, ``softcap``, ``score_mod``, ``mask_mod`` as in
            `AttentionConfig`; ``inputs``, a `Inputs` with what functions capture.

    Returns:
        ``(B, H, Lq, Dv)``, zeros in rows that see no key, and ``(B, H, Lq)``, -inf there.
    """
    import numpy as np

    q, k, v = (np.asarray(x, dtype=np.float64) for x in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = (np.repeat(x, repeats, axis=1) for x in (k, v))
    scores = scale * (q @ np.swapaxes(k, -1, -2))
    if (cap := features.get("softcap")) is not None:
        scores = cap * np.tanh(scores / cap)
    scores, chosen = _by_functions(np, scores, features)
    i = np.arange(q.shape[2])[:, None] + k.shape[2] - q.shape[2]
    seen = _seen(i, np.arange(k.shape[2])[None, :], causal, features)
    if chosen is not None:
        seen = seen & chosen
    scores = np.where(seen, scores, -np.inf)
    peak = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    out = (weights @ v) / np.where(total == 0.0, 1.0, total)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0.0, peak + np.log(total), -np.inf)[..., 0]
    return out, lse


def attention_mlx(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | mx.array,
    causal: bool = False,
    **features: Any,
) -> tuple[mx.array, mx.array]:
    """The same in plain MLX operations, in float32; lazy and differentiable.

    Shapes as `attention_float64`; the output has the type of `q`, the log-sum-exp is float32.
    Its memory grows with Lq * Lk.
    """
    batch, heads, q_len, head_dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    groups = (batch, kv_heads, heads // kv_heads, q_len, head_dim)
    grouped = q.astype(mx.float32).reshape(groups)
    k, values = (x.astype(mx.float32)[:, :, None] for x in (k, v))
    scores = (grouped * scale) @ k.swapaxes(-1, -2)
    if (cap := features.get("softcap")) is not None:
        scores = cap * mx.tanh(scores / cap)
    if features.get("score_mod") is not None or features.get("mask_mod") is not None:
        shape = scores.shape
        by_head = scores.reshape(batch, heads, q_len, kv_len)
        by_head, chosen = _by_functions(mx, by_head, features)
        if chosen is not None:
            by_head = mx.where(chosen, by_head, -mx.inf)
        scores = by_head.reshape(shape)
    if causal or any(features.get(name) is not None for name in ("window_left", "window_right")):
        i = mx.arange(q_len)[:, None] + (kv_len - q_len)
        seen = _seen(i, mx.arange(kv_len)[None, :], causal, features)
        scores = mx.where(seen, scores, -mx.inf)
    if kv_len:
        peak = mx.stop_gradient(scores.max(axis=-1, keepdims=True))
        peak = mx.where(peak == -mx.inf, 0.0, peak)
    else:
        peak = mx.zeros((*scores.shape[:-1], 1))
    weights = mx.exp(scores - peak)
    total = weights.sum(axis=-1, keepdims=True)
    safe = mx.where(total == 0.0, 1.0, total)  # a row without a key: zeros, and no NaN gradient
    out = (weights @ values) / safe
    lse = mx.where(total == 0.0, -mx.inf, peak + mx.log(safe))
    return (
        out.reshape(batch, heads, q_len, v.shape[3]).astype(q.dtype),
        lse.reshape(batch, heads, q_len),
    )


def config_features(config: AttentionConfig) -> dict[str, Any]:
    """The keyword arguments of both functions for a config."""
    names = ("causal", "window_left", "window_right", "softcap", "score_mod", "mask_mod")
    return {name: getattr(config, name) for name in names}


def _seen(i: Any, j: Any, causal: bool, features: dict[str, Any]) -> Any:
    """Which of the keys j query i sees; both in positions of keys, arrays of NumPy or MLX."""
    seen = (i == i) & (j == j)
    if causal:
        seen = seen & (j <= i)
    if (left := features.get("window_left")) is not None:
        seen = seen & (j >= i - left)
    if (right := features.get("window_right")) is not None:
        seen = seen & (j <= i + right)
    return seen


def _by_functions(xp: Any, scores: Any, features: dict[str, Any]) -> tuple[Any, Any]:
    """Scores ``(B, H, Lq, Lk)`` by the score function; what the mask function leaves, or None."""
    texts = features.get("score_mod"), features.get("mask_mod")
    if texts == (None, None):
        return scores, None
    from metalgen.dsl.graph import parse
    from metalgen.inputs import NOTHING

    inputs = features.get("inputs") or NOTHING
    batch, heads, q_len, kv_len = scores.shape
    places = {
        "score": scores,
        "b": xp.arange(batch, dtype=xp.int32)[:, None, None, None],
        "h": xp.arange(heads, dtype=xp.int32)[:, None, None],
        "q": xp.arange(q_len, dtype=xp.int32)[:, None],
        "kv": xp.arange(kv_len, dtype=xp.int32),
    }
    results: list[Any] = []
    for text, arrays in zip(texts, (inputs.score, inputs.mask), strict=True):
        if text is None:
            results.append(None)
            continue
        given = [_as_numpy(a) for a in arrays] if xp is not mx else arrays
        results.append(xp.broadcast_to(parse(text).evaluate(xp, places, given), scores.shape))
    return scores if results[0] is None else results[0], results[1]


def _as_numpy(array: mx.array) -> Any:
    import numpy as np

    return np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
