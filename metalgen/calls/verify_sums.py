"""Checking a kernel that sums the gradient of an input, against plain MLX operations."""

from __future__ import annotations

import mlx.core as mx

from metalgen.calls.check import first_line
from metalgen.calls.verify import SEQUENCES, relative_error
from metalgen.calls.verify_gradients import MOST, check_sizes, cotangents_of
from metalgen.devices import Device
from metalgen.devices.backward import GradientRunner
from metalgen.devices.marking import marked_outputs
from metalgen.devices.sums import array_of
from metalgen.families import Schedule
from metalgen.features.base import Summed
from metalgen.problem.config import AttentionConfig
from metalgen.problem.samples import Call, sample_call
from metalgen.reference import config_features, gradients_mlx

SCALE = 0.25
TOLERANCE = {"float32": 2e-4, "float16": 1e-2, "bfloat16": MOST}
"""Largest relative error of a sum of many terms of either sign, by the type of q."""


def sum_fault(
    device: Device,
    config: AttentionConfig,
    schedules: tuple[Schedule, ...],
    each: tuple[Summed, ...],
) -> str:
    """What is wrong with the kernels that sum the gradient of an input; empty where nothing is.

    Args:
        device: what runs them.
        config: of the forward pass.
        schedules: of the families that own rows of queries and of keys.
        each: all sums of one input.
    """
    import numpy as np  # which a call without gradients does without

    try:
        runners = sum_runners(device, config, schedules, each)
        for number, (queries, keys) in enumerate(check_sizes(config, schedules[0])):
            call = _call(config, each[0], queries, keys, number)
            q, k, v, inputs = call
            results, cotangents = cotangents_of(config, call, SCALE, number)
            with marked_outputs():
                parts = [run(*call[:3], results, cotangents, SCALE, inputs)[0] for run in runners]
            features = config_features(config) | {"inputs": inputs}
            with mx.stream(mx.cpu):  # in float32, where a GPU's products may be tf32
                plain = gradients_mlx(q, k, v, results, cotangents, scale=SCALE, **features)
            expected = plain[3 + inputs.names.index(each[0].array)]
            exact = np.array(expected.astype(mx.float32), np.float64)
            error = relative_error(sum(parts[1:], parts[0]), exact)
            if not error <= TOLERANCE[config.dtype]:
                return f"Lq={queries} Lk={keys}: a relative error of {error:.2e}"
    except Exception as error:  # whatever a compiler or a device raises
        return f"{type(error).__name__}: {first_line(error)}"
    return ""


def sum_runners(
    device: Device,
    config: AttentionConfig,
    schedules: tuple[Schedule, ...],
    each: tuple[Summed, ...],
) -> list[GradientRunner]:
    """The kernels of sums, each by the schedule that owns the rows by which it sums."""
    return [device.build_sum(config, schedules[one.by == "key"], one) for one in each]


def _call(config: AttentionConfig, summed: Summed, queries: int, keys: int, seed: int) -> Call:
    """A call in which an input that broadcasts has the axes that the sum has."""
    batch = SEQUENCES if config.differs_by_sequence else 1
    q, k, v, inputs = sample_call(config, batch=batch, q_len=queries, kv_len=keys, seed=seed)
    if array_of(inputs, summed).ndim == 4 and summed.add:
        whole = {"query": (queries, 1), "key": (1, keys), "pair": (queries, keys)}[summed.by]
        bias = mx.random.normal((1, q.shape[1], *whole), key=mx.random.key(seed))
        inputs = inputs.having({summed.array: bias})
    return q, k, v, inputs
