"""Running backward kernels: from a cotangent to gradients of q, k and v."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx

from metalgen.devices.binding import check_buffers, launched, rows_as_bound
from metalgen.devices.marking import Launcher
from metalgen.families import Limits, Schedule, check_schedule
from metalgen.families.backward import backward_config, get_backward, made_by
from metalgen.families.launch import Launch
from metalgen.features.base import Binder
from metalgen.features.softcap import lse_shift
from metalgen.languages import get_language
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs, max_kv_len
from metalgen.reference.plain import rotate_queries

if TYPE_CHECKING:
    from metalgen.source.render import KernelSource

GradientRunner = Callable[..., list[mx.array]]
"""``run(q, k, v, results, cotangents, scale, inputs)``: gradients, shapes unchecked.

``results``: output and log-sum-exp; ``cotangents``: of both, the second of which may be None.
``terms``, by name: what `row_terms` makes of them, where that is known."""

NOTHING_SEEN = 3.4028234663852886e38
"""The log-sum-exp of a row that sees no key, for kernels: finite, so that fast math has its way."""
ROWS_BEHIND = 256
"""Rows behind the last one, which the last pass may read, and masks: as many as one has at most."""


class Compiles(Protocol):
    """What a device does for kernels (`metalgen.devices.kernel.KernelDevice`)."""

    @property
    def limits(self) -> Limits:
        """What a threadgroup may use."""

    def compile(self, source: KernelSource) -> Launcher:
        """A launcher of a source."""

    def number(self, x: float) -> mx.array:
        """A number as an array."""


def build_gradients(
    device: Compiles, config: AttentionConfig, schedules: tuple[Schedule, ...]
) -> GradientRunner:
    """A runner of backward kernels: of one family, or of several one after the other.

    Each kernel is a lazy operation of its own: a gradient that nothing uses is not computed.

    Args:
        device: what compiles and runs them.
        config: what the forward pass computes.
        schedules: of `backward_rows`, which gives dQ, and of `backward_keys`, which gives dK and
            dV.

    Raises:
        InvalidSchedule: a schedule cannot run the config within the device's limits, or the config
            has no backward kernels.
    """
    bare = backward_config(config)
    kernels = [_Kernels(device, bare, schedule) for schedule in schedules]

    def run(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        results: tuple[mx.array, mx.array],
        cotangents: tuple[mx.array, mx.array | None],
        scale: float,
        inputs: Inputs,
        *,
        terms: mx.array | None = None,
    ) -> list[mx.array]:
        if 0 in q.shape or 0 in k.shape:
            made = {"dq": q, "dk": k, "dv": v}
            return [mx.zeros_like(made[name]) for each in kernels for name in each.made]
        prepared = prepare(config, (q, k, v), results, cotangents, scale, inputs, terms)
        found: dict[str, mx.array] = {}
        for each in kernels:
            made_now = each(prepared, inputs)
            found |= zip(each.made, made_now, strict=True)
        if "dq" in found:
            dq = found["dq"]
            if scale <= 0:
                dq = -dq if scale < 0 else mx.zeros_like(dq)
            if config.rope is not None:
                rotated = functools.partial(rotate_queries, config=config, inputs=inputs)
                dq = mx.vjp(rotated, [q], [dq])[1][0]
            found["dq"] = dq
        return [*found.values()]

    return run


@dataclass(frozen=True)
class Prepared:
    """What backward kernels of a call read.

    Args:
        q: rotated, and of the sign that makes the scale positive.
        k, v, dout: keys, values, and the cotangent of the output.
        terms: of rows, as `row_terms` gives them.
        scale: a positive number.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    dout: mx.array
    terms: mx.array
    scale: float

    def bound(
        self, device: Compiles, config: AttentionConfig, schedule: Schedule, inputs: Inputs
    ) -> tuple[list[mx.array], Launch]:
        """The inputs of a schedule's kernels, and their launch."""
        language = get_language(schedule.language)
        q, k = self.q, self.k
        bound = [rows_as_bound(x, language) for x in (q, k, self.v, self.dout)]
        bound += [self.terms, device.number(self.scale * math.log2(math.e))]
        family = get_backward(schedule)
        keys_owned = family.main.keys_owned
        binder = Binder(
            (*q.shape[:3], max_kv_len(config, k, inputs)),
            schedule.bq,
            schedule.bk,
            functools.partial(rows_as_bound, language=language),
            keys_owned=keys_owned,
        )
        for feature in config.features:
            bound += feature.bind(config, inputs, binder)
        own, others = (k, q) if keys_owned else (q, k)
        sequences = 0 if inputs.cu_q is None else inputs.cu_q.size - 1
        batch, heads, length, _ = own.shape
        shape = (batch, heads, length)
        return bound, family.launch(config, schedule, shape, sequences, others.shape[2])


def prepare(
    config: AttentionConfig,
    arrays: tuple[mx.array, mx.array, mx.array],
    results: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array | None],
    scale: float,
    inputs: Inputs,
    terms: mx.array | None = None,
) -> Prepared:
    """What kernels read of a call: its arrays, their results and the cotangents of these."""
    q, k, v = arrays
    if config.rope is not None:
        q = rotate_queries(q, config=config, inputs=inputs)
    q = q if scale > 0 else -q if scale < 0 else mx.zeros_like(q)
    if terms is None:
        terms = row_terms(config, results, cotangents)
    return Prepared(q, k, v, cotangents[0], terms, abs(scale) or 1.0)


def row_terms(
    config: AttentionConfig,
    results: tuple[mx.array, mx.array],
    cotangents: tuple[mx.array, mx.array | None],
) -> mx.array:
    """``(B * H * Lq + rows behind, 2)``: LSE as an exponent of 2, and rowsum(dO O) - dLSE."""
    (out, lse), (dout, dlse) = results, cotangents
    empty = lse == -mx.inf
    powers = mx.where(empty, NOTHING_SEEN, (lse - lse_shift(config)) * math.log2(math.e))
    delta = (dout.astype(mx.float32) * out.astype(mx.float32)).sum(axis=-1)
    if dlse is not None:
        delta = delta - dlse
    terms = mx.stack([powers, mx.where(empty, 0.0, delta)], axis=-1)
    return mx.pad(terms.reshape(-1, 2), [(0, ROWS_BEHIND), (0, 0)])


class _Kernels:
    """The kernels of one family, compiled."""

    def __init__(self, device: Compiles, config: AttentionConfig, schedule: Schedule) -> None:
        from metalgen.source.render import render

        check_schedule(config, schedule, device.limits)
        self.device, self.config, self.schedule = device, config, schedule
        self.family = family = get_backward(schedule)
        self.steps = family.steps(schedule)
        self.made = made_by(schedule)
        self.sources = [render(config, schedule, step) for step in self.steps]
        for source in self.sources:
            check_buffers(source, get_language(schedule.language))
        self.compiled: list[Launcher] = [device.compile(source) for source in self.sources]

    def __call__(self, prepared: Prepared, inputs: Inputs) -> list[mx.array]:
        """The gradients that the family makes."""
        bound, launch = prepared.bound(self.device, self.config, self.schedule, inputs)
        name = str(prepared.q.dtype).rpartition(".")[2]
        found: list[mx.array] = []
        for step, source, kernel in zip(self.steps, self.sources, self.compiled, strict=True):
            dispatch = step.dispatch(self.config, self.schedule, launch, name)
            given: dict[str, Any] = launched(source, dispatch)
            found += kernel(inputs=bound, **given)
        return [x.astype(prepared.q.dtype) for x in found]
