"""Kernels of any family as functions of queries, keys and values: what timings run."""

from __future__ import annotations

import functools

import mlx.core as mx

from metalgen.devices import Device, Runner
from metalgen.families import AttentionFamily, Schedule, get_family
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs

LSE = 10.0
"""The log-sum-exp of all rows of calls that are only timed: weights are then small numbers."""


def runner_of(device: Device, config: AttentionConfig, schedule: Schedule) -> Runner:
    """A runner of the kernels of a schedule; lazy where the device is lazy.

    Of a backward schedule it takes the queries for the output and its cotangent, too, and gives the
    first of the gradients, which is there when all of them are.

    Raises:
        InvalidSchedule: the schedule cannot run the config within the device's limits.
    """
    if isinstance(get_family(schedule.family), AttentionFamily):
        return device.build(config, schedule)
    gradients = device.build_gradients(config, (schedule,))

    @functools.lru_cache(maxsize=4)
    def sums(shape: tuple[int, ...]) -> mx.array:
        return mx.full(shape, LSE)

    def run(
        q: mx.array, k: mx.array, v: mx.array, scale: float, inputs: Inputs = NOTHING
    ) -> tuple[mx.array, None]:
        shape = q.shape[:3]
        out = q if config.v_dim == q.shape[3] else mx.zeros((*shape, config.v_dim), q.dtype)
        found = gradients(q, k, v, (out, sums(shape)), (out, None), scale, inputs)
        return (mx.depends(found[0], found[1:]) if len(found) > 1 else found[0]), None

    return run
