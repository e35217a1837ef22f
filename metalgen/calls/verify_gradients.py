"""Checking a backward kernel against the float64 gradients, on a device."""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.calls.verify import SEQUENCES, Verification, relative_error
from metalgen.devices import Device
from metalgen.devices.marking import marked_outputs
from metalgen.families import Schedule, get_family
from metalgen.families.backward import made_by
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.problem.samples import Call, sample_call
from metalgen.reference import attention_mlx, config_features, gradients_float64, gradients_mlx

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GRADIENT_TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest relative error (norm over norm) of a gradient, by type, at unit-variance inputs."""
TF32_GRADIENT_TOLERANCE = 3e-3
FACTOR = 3
"""How many times the error of the same graph in plain operations of the type a gradient may have,
where that is more: the rule of flash-attention's tests,"""
MOST = 5e-2
"""and the error that none may have."""


def verify_gradients(
    device: Device, config: AttentionConfig, schedule: Schedule, *, seed: int | None = None
) -> Verification:
    """Run the kernels of a backward schedule on small ragged shapes, and compare their gradients.

    Outputs hold NaN before they run, as in `metalgen.calls.verify.verify`.

    Raises:
        Whatever the device raises when it cannot build or run the kernels.
    """
    if seed is None:
        seed = zlib.crc32(f"{schedule.family} {schedule.key}".encode())
    names = made_by(schedule)
    run = device.build_gradients(config, (schedule,))
    worst, tolerance, faults, shapes = 0.0, 0.0, [], []
    for number, (queries, keys) in enumerate(check_sizes(config, schedule)):
        call = sample_call(
            config,
            batch=SEQUENCES if config.differs_by_sequence else 1,
            q_len=queries,
            kv_len=keys,
            seed=seed + number,
        )
        scale = config.head_dim**-0.5
        results, cotangents = cotangents_of(config, call, scale, seed + number)
        with marked_outputs():
            found = run(*call[:3], results, cotangents, scale, call[3])
        mx.eval(found)
        exact = exact_gradients(config, call, cotangents, scale)
        shape = f"Lq={queries} Lk={keys}"
        shapes.append(shape)
        for name, array in zip(names, found, strict=True):
            error = relative_error(array, exact[name[1]])
            allowed = allowed_error(config, call, results, cotangents, scale, exact, name[1])
            worst, tolerance = max(worst, error), max(tolerance, allowed)
            if not error <= allowed:
                faults.append(f"{shape}: {name} has a relative error of {error:.2e}")
    return Verification(not faults, worst, tolerance, " and ".join(shapes), "; ".join(faults))


def check_sizes(config: AttentionConfig, schedule: Schedule) -> list[tuple[int, int]]:
    """Two blocks of owned rows and three passes, none of them whole; more queries than keys, too,
    where a mask hides keys, so that some rows see nothing."""
    owned, passed = schedule.bq + 5, 2 * schedule.bk + 3
    by_rows = "q" in get_family(schedule.family).own
    sizes = [(owned, passed) if by_rows else (passed, owned)]
    hides = config.causal or config.window_right is not None
    return [*sizes, (schedule.bk + 9, schedule.bk + 1)] if hides else sizes


def cotangents_of(
    config: AttentionConfig, call: Call, scale: float, seed: int
) -> tuple[tuple[mx.array, mx.array], tuple[mx.array, mx.array]]:
    """Output and log-sum-exp of a call, and made-up cotangents of both."""
    q, k, v, inputs = call
    out, lse = attention_mlx(q, k, v, scale=scale, **config_features(config), inputs=inputs)
    shape = q.shape[:3]
    dout = mx.random.normal((*shape, config.v_dim), key=mx.random.key(seed)).astype(q.dtype)
    dlse = mx.random.normal(shape, key=mx.random.key(seed + 1))
    return (out, lse), (dout, mx.where(lse == -mx.inf, 0.0, dlse))


def exact_gradients(
    config: AttentionConfig,
    call: Call,
    cotangents: tuple[mx.array, mx.array | None],
    scale: float,
) -> dict[str, NDArray[np.float64]]:
    """The gradients of a call by their formulas."""
    q, k, v, inputs = call
    features = config_features(config) | {"inputs": inputs}
    return gradients_float64(q, k, v, cotangents, scale=scale, **features)


def allowed_error(
    config: AttentionConfig,
    call: tuple[mx.array, mx.array, mx.array, Inputs],
    results: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array | None],
    scale: float,
    exact: dict[str, NDArray[np.float64]],
    name: str,
) -> float:
    """The tolerance of a gradient, or several times the error of plain MLX if that is more."""
    q, k, v, inputs = call
    tolerance = TF32_GRADIENT_TOLERANCE if config.tf32 else GRADIENT_TOLERANCE[config.dtype]
    with mx.stream(mx.cpu):  # in float32, where a GPU's products may be tf32
        found = gradients_mlx(
            *(q, k, v, results, cotangents), scale=scale, **config_features(config), inputs=inputs
        )
        plain = found["qkv".index(name)]
        plain = mx.where(mx.isnan(plain), 0.0, plain)  # what lies where no key is
    return max(tolerance, min(FACTOR * relative_error(plain, exact[name]), MOST))
