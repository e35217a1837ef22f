"""Checking a kernel against the float64 reference, on a device."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.devices import Device
from metalgen.devices.marking import UNWRITTEN, is_unwritten, marked_outputs
from metalgen.families import Schedule, get_attention
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs, needs_inputs
from metalgen.problem.samples import sample_call
from metalgen.reference import attention_float64, attention_mlx, config_features

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TOLERANCE = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}
"""Largest relative error (norm over norm) of the output, by type, at unit-variance inputs."""
TF32_TOLERANCE = 1e-3
"""The same where float32 products keep 11 bits, as float16 does."""
LSE_TOLERANCE = 1e-5
"""Largest absolute error of the log-sum-exp over its magnitude or 1, whichever is larger."""
FUNCTION_FACTOR = 8
"""How many times the error of plain MLX a kernel with more inputs or functions may have,"""
MOST_FOR_FUNCTIONS = 1e-2
"""and the error that none may have, whatever its inputs."""
SEQUENCES = 4
"""Batch entries where lengths differ: the longest, none, one, and any."""


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
    seed: int | None = None,
) -> Verification:
    """Run a kernel on small ragged shapes and compare it with the float64 reference.

    The family names the sizes (`metalgen.families.Family.check_sizes`); two KV heads, keys and
    values as views (`metalgen.problem.samples.sample_call`). Outputs hold NaN before the kernel
    runs, so that one which is never launched is not taken for an earlier one
    (`metalgen.devices.marking`).

    Raises:
        Whatever the device raises when it cannot build or run the kernel.
    """
    if seed is None:  # for each kernel its own: what another one left is not right for it either
        seed = zlib.crc32(f"{schedule.family} {schedule.key}".encode())
    run = device.build(config, schedule)
    shapes = get_attention(schedule.family).check_sizes(config, schedule)
    worst, tolerance, faults = 0.0, 0.0, []
    for number, (queries, keys) in enumerate(shapes):
        q, k, v, given = sample_call(
            config,
            batch=SEQUENCES if config.differs_by_sequence else 1,
            q_len=queries,
            kv_len=keys,
            seed=seed + number,
        )
        scale = config.head_dim**-0.5
        with marked_outputs():
            out, lse = run(q, k, v, scale, given) if needs_inputs(config) else run(q, k, v, scale)
        error, allowed, fault = judge(config, q, k, v, given, out, lse)
        worst, tolerance = max(worst, error), max(tolerance, allowed)
        faults += [f"Lq={queries} Lk={keys}: {fault}"] if fault else []
    shape = " and ".join(f"Lq={queries} Lk={keys}" for queries, keys in shapes)
    return Verification(not faults, worst, tolerance, shape, "; ".join(faults))


def judge(
    config: AttentionConfig,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    given: Inputs,
    out: mx.array,
    lse: mx.array | None,
) -> tuple[float, float, str]:
    """Compare a call's results with the float64 reference.

    Args:
        q, k, v, given: what the call was given; its scale is ``1 / sqrt(D)``.
        out, lse: what it returned.

    Returns:
        The relative error of `out`, the largest that is allowed, and what is wrong; empty where
        nothing is.
    """
    scale, tolerance = config.head_dim**-0.5, tolerance_of(config)
    mx.eval(out)
    features = config_features(config) | {"inputs": given}
    expected, expected_lse = attention_float64(q, k, v, scale=scale, **features)
    if needs_inputs(config):
        with mx.stream(mx.cpu):  # in float32, where a GPU's products may be tf32
            plain, _ = attention_mlx(q, k, v, scale=scale, **features)
        tolerance = max(tolerance, _by_functions(expected, plain))
    error = relative_error(out, expected)
    faults = []
    if not error <= tolerance:
        unwritten = f" ({UNWRITTEN})" if is_unwritten(out) else ""
        faults.append(f"relative error {error:.2e}{unwritten}")
    if lse is not None and (fault := lse_fault(lse, expected_lse, lse_tolerance(config))):
        faults.append(fault)
    return error, tolerance, "; ".join(faults)


def of_compiler(error: Exception) -> bool:
    """Whether MLX's error is the compiler's, Metal's or NVRTC's, which name what was not made."""
    text = str(error).lower()
    return "compile" in text or "library" in text


def tolerance_of(config: AttentionConfig) -> float:
    """Largest relative error of a config's output, at unit-variance inputs."""
    return TF32_TOLERANCE if config.tf32 else TOLERANCE[config.dtype]


def relative_error(out: mx.array, expected: NDArray[np.float64]) -> float:
    """Norm of the difference over the norm of the expected; inf where `out` is not finite."""
    import numpy as np

    got = np.asarray(out.astype(mx.float32), dtype=np.float64)
    if got.shape != expected.shape or not np.isfinite(got).all():
        return float("inf")
    norm = float(np.linalg.norm(expected))
    return float(np.linalg.norm(got - expected)) / (norm or 1.0)


def _by_functions(expected: NDArray[np.float64], plain: mx.array) -> float:
    """What other inputs allow: several times the error of plain MLX in float32.

    Scores of functions may be large, which costs a softmax digits, or be rounded on the way.
    """
    return min(FUNCTION_FACTOR * relative_error(plain, expected), MOST_FOR_FUNCTIONS)


def lse_tolerance(config: AttentionConfig) -> float:
    """Largest error of a log-sum-exp: absolute, or over its magnitude where above 1.

    Turned queries are rounded to the config's type, now and then to the other neighbour.
    """
    if config.rope is not None or config.tf32:
        return max(LSE_TOLERANCE, tolerance_of(config))
    return LSE_TOLERANCE


def lse_fault(lse: mx.array, expected: NDArray[np.float64], tolerance: float) -> str:
    """What is wrong with a log-sum-exp, or nothing."""
    import numpy as np

    got = np.asarray(lse, dtype=np.float64)
    if not np.array_equal(np.isneginf(got), np.isneginf(expected)):
        return "the log-sum-exp is -inf in other rows than the empty ones"
    rows = np.isfinite(expected)
    difference = np.abs(got[rows] - expected[rows]) / np.maximum(1.0, np.abs(expected[rows]))
    worst = float(difference.max(initial=0.0))
    return "" if worst <= tolerance else f"log-sum-exp off by {worst:.2e}"
