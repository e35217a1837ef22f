"""Gradients of biases, slopes and captured arrays, which kernels sum by query, by key or by pair.

Each is a lazy operation of its own: one that nothing uses is not computed. By query and by key sums
are made in registers in a fixed order, and added up here to the elements of the array. Where only a
query and a key together tell the element, the kernel adds to it atomically.
"""

from __future__ import annotations

import mlx.core as mx

from metalgen.devices.backward import Compiles, Prepared, prepare
from metalgen.devices.binding import check_buffers, launched
from metalgen.dsl.loads import places
from metalgen.families import Schedule, check_schedule
from metalgen.families.backward import SumStep, backward_config
from metalgen.families.base import Dispatch, Output
from metalgen.features.base import Summed
from metalgen.features.functions import graphs
from metalgen.languages import get_language
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.reference.plain import Places, places_of_keys, places_of_queries

MOST_PAIRS = 1 << 24
"""Elements times sums that are compared with each other at once, for a fixed order of adding up."""


def array_of(inputs: Inputs, summed: Summed) -> mx.array:
    """The array whose gradient a sum is."""
    name = summed.array
    return inputs.score[int(name[6:-1])] if name.startswith("score[") else inputs[name]


def has_fixed_order(summed: Summed, array: mx.array, heads: tuple[int, int]) -> bool:
    """Whether a kernel makes a sum in the same order every time, for so many entries and heads."""
    return summed.by != "pair" or (bool(summed.add) and array.shape[:2] == heads)


class SumKernel:
    """The kernel of one sum, compiled: called as `metalgen.devices.backward.GradientRunner` is.

    Args:
        device: what compiles and runs it.
        config: what the forward pass computes.
        schedule: of the family that owns the rows by which it sums; of queries for pairs.
        summed: what it sums.

    Raises:
        InvalidSchedule: the schedule cannot run the config within the device's limits.
    """

    def __init__(
        self,
        device: Compiles,
        config: AttentionConfig,
        schedule: Schedule,
        summed: Summed,
    ) -> None:
        from metalgen.source.render import render

        self.bare = backward_config(config)
        check_schedule(self.bare, schedule, device.limits)
        self.device, self.config, self.schedule, self.summed = device, config, schedule, summed
        self.step = SumStep(summed)
        self.source = render(self.bare, schedule, self.step)
        check_buffers(self.source, get_language(schedule.language))
        self.kernel = device.compile(self.source)

    def __call__(
        self,
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
        """The gradient in float32, of the array's shape."""
        array = array_of(inputs, self.summed)
        if 0 in q.shape or 0 in k.shape:
            return [mx.zeros(array.shape)]
        prepared = prepare(self.config, (q, k, v), results, cotangents, scale, inputs, terms)
        bound, launch = prepared.bound(self.device, self.bare, self.schedule, inputs)
        dispatch = self.step.dispatch(self.bare, self.schedule, launch, "float32")
        pairs = self.summed.by == "pair"
        if pairs:
            output = Output("grad_sum", array.shape, "float32")
            dispatch = Dispatch(dispatch.groups, (output,), zeroed=True)
        given = launched(self.source, dispatch)
        (sums,) = self.kernel(inputs=bound, **given)
        return [sums if pairs else self._added(sums, array, prepared, inputs)]

    def _added(
        self, sums: mx.array, array: mx.array, prepared: Prepared, inputs: Inputs
    ) -> mx.array:
        """Sums ``(B, H, L)`` added up to the elements that they belong to."""
        by_key = self.summed.by == "key"
        wide = sums[:, :, None] if by_key else sums[..., None]
        if self.summed.add and array.ndim in (1, 4):  # heads, or the axes of scores
            shape = (1, array.size, 1, 1) if array.ndim == 1 else array.shape
            return _summed_to(wide, shape).reshape(array.shape)
        at = (places_of_keys if by_key else places_of_queries)(
            prepared.q, prepared.k, self.config.varlen, inputs
        )
        place = self._place(array, at, inputs)
        place = place.reshape((1,) * (4 - place.ndim) + place.shape)
        values = _summed_to(wide, place.shape).reshape(-1)
        add = _added_in_order if self.config.deterministic else _added_at_once
        return add(place.reshape(-1), values, array.size).reshape(array.shape)

    def _place(self, array: mx.array, at: Places, inputs: Inputs) -> mx.array:
        """The number of the element that a sum belongs to."""
        if self.summed.add:
            return at.b * array.shape[1] + at.h
        found = {"b": at.b, "h": at.h, "q": at.i, "kv": at.j, "score": mx.zeros(())}
        graph = graphs(self.config)["score"]
        return mx.array(places(graph, self.summed.node, mx, found, inputs.score))


def _summed_to(x: mx.array, shape: tuple[int, ...]) -> mx.array:
    """An array summed over the axes of which a shape has one element."""
    axes = [n for n, size in enumerate(shape) if size == 1 and x.shape[n] != 1]
    return x.sum(axis=axes, keepdims=True) if axes else x


def _added_at_once(places: mx.array, values: mx.array, count: int) -> mx.array:
    return mx.zeros(count).at[places].add(values)


def _added_in_order(places: mx.array, values: mx.array, count: int) -> mx.array:
    """The same by products with zeros and ones, whose order does not change from run to run."""
    elements, total = mx.arange(count)[:, None], mx.zeros(count)
    most = max(1, MOST_PAIRS // count)
    for first in range(0, values.size, most):
        part = slice(first, first + most)
        matches = (elements == places[part]).astype(mx.float32)
        total = total + matches @ values[part]
    return total
