"""Checking a kernel against the float64 reference, on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.config import AttentionConfig
from metalgen.devices import Device
from metalgen.reference import attention_float64, attention_mlx, config_features
from metalgen.schedule import Schedule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Largest relative error (norm over norm) of the output, by type, at unit-variance inputs."""
LSE_TOLERANCE = 1e-5
"""Largest absolute error of the log-sum-exp over its magnitude or 1, whichever is larger."""
FUNCTION_FACTOR = 8
"""How many times the error of plain MLX a kernel with a user's functions may have,"""
MOST_FOR_FUNCTIONS = 1e-2
"""and the error that none may have, whatever its functions."""


@dataclass(frozen=True)
class Verification:
    """How one kernel compared with the reference.

    Args:
        ok: within the tolerance, with no NaN and the empty rows exactly right.
        error: relative error of the output (norm over norm); inf where it is not finite.
        tolerance: what was allowed.
        shape: what was run.
        detail: what is wrong, or empty.
    """

    ok: bool
    error: float
    tolerance: float
    shape: str
    detail: str = ""


def verify(
    device: Device,
    config: AttentionConfig,
    schedule: Schedule,
    *,
    seed: int = 0,
    family: str = "forward",
) -> Verification:
    """Run a kernel on small ragged shapes and compare it with the float64 reference.

    Two query blocks and three passes over the keys, neither of them whole, two KV heads, keys and
    values as ``(B, L, H, D)`` views; for a causal config also more queries than keys, so that some
    rows see nothing.

    Raises:
        Whatever the device raises when it cannot build or run the kernel.
    """
    run = device.build(config, schedule, family)
    q_len, kv_len = schedule.bq + 5, 2 * schedule.bk + 3
    if family == "decode":  # one query, and several; a share for each split, and one that is short
        q_len, kv_len = 3, (2 * schedule.splits + 1) * schedule.bk + 3
    shapes = [(q_len, kv_len)]
    if family == "decode":
        shapes.append((1, schedule.bk + 1))
    if config.causal or config.window_right is not None:
        shapes.append((schedule.bk + 9, schedule.bk + 1))
    tolerance = TOLERANCE[config.dtype]
    worst, faults = 0.0, []
    for number, (queries, keys) in enumerate(shapes):
        q, k, v = _inputs(config, queries, keys, seed + number)
        scale = config.head_dim**-0.5
        features = config_features(config)
        if config.score_mod is None and config.mask_mod is None:
            out, lse = run(q, k, v, scale)
        else:
            from metalgen.samples import synthetic_inputs

            given = synthetic_inputs(config, q.shape[0], q.shape[1], queries, keys, seed)
            features["inputs"] = given
            out, lse = run(q, k, v, scale, given)
        mx.eval(out)
        expected, expected_lse = attention_float64(
            *(x.astype(mx.float32) for x in (q, k, v)), scale=scale, **features
        )
        if "inputs" in features:
            plain, _ = attention_mlx(q, k, v, scale=scale, **features)
            tolerance = max(tolerance, _by_functions(expected, plain))
        error = relative_error(out, expected)
        worst = max(worst, error)
        if not error <= tolerance:
            faults.append(f"Lq={queries} Lk={keys}: relative error {error:.2e}")
        if lse is not None:
            fault = _lse_fault(lse, expected_lse)
            faults += [f"Lq={queries} Lk={keys}: {fault}"] if fault else []
    shape = " and ".join(f"Lq={queries} Lk={keys}" for queries, keys in shapes)
    return Verification(not faults, worst, tolerance, shape, "; ".join(faults))


def relative_error(out: mx.array, expected: NDArray[np.float64]) -> float:
    """Norm of the difference over the norm of the expected; inf where `out` is not finite."""
    import numpy as np

    got = np.asarray(out.astype(mx.float32), dtype=np.float64)
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(got - expected)) / (norm or 1.0)


def _by_functions(expected: NDArray[np.float64], plain: mx.array) -> float:
    """What a user's functions allow: several times the error of plain MLX in float32.

    Their scores may be large, which costs a softmax digits, or be rounded to 16 bits on the way.
    """
    return min(FUNCTION_FACTOR * relative_error(plain, expected), MOST_FOR_FUNCTIONS)


def _lse_fault(lse: mx.array, expected: NDArray[np.float64]) -> str:
    import numpy as np

    got = np.asarray(lse, dtype=np.float64)
    if not np.array_equal(np.isneginf(got), np.isneginf(expected)):
        return "the log-sum-exp is -inf in other rows than the empty ones"
    rows = np.isfinite(expected)
    difference = np.abs(got[rows] - expected[rows]) / np.maximum(1.0, np.abs(expected[rows]))
    worst = float(difference.max(initial=0.0))
    return "" if worst <= LSE_TOLERANCE else f"log-sum-exp off by {worst:.2e}"


def _inputs(
    config: AttentionConfig, q_len: int, kv_len: int, seed: int
) -> tuple[mx.array, mx.array, mx.array]:
    dtype = getattr(mx, config.dtype)
    keys = mx.random.split(mx.random.key(seed), 3)
    heads = 2
    q = mx.random.normal((1, heads * config.heads_per_kv, q_len, config.head_dim), key=keys[0])
    k = mx.random.normal((1, kv_len, heads, config.head_dim), key=keys[1])
    v = mx.random.normal((1, kv_len, heads, config.v_dim), key=keys[2])
    k, v = (x.astype(dtype).swapaxes(1, 2) for x in (k, v))
    return q.astype(dtype), k, v
