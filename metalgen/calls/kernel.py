"""A kernel that can be called with arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from metalgen.arguments import as_number
from metalgen.calls.backward import KernelGradients
from metalgen.calls.gradients import (
    BACKWARDS,
    Computation,
    backward_of,
    differentiable,
    function_of,
)
from metalgen.counters import Tally, tally
from metalgen.database.hit import brief
from metalgen.devices import Runner
from metalgen.errors import ArgumentError
from metalgen.families import Schedule
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs, check_inputs, check_qkv, needs_inputs

MAX_SCALE = 1e30
"""Scales are below this; those below its inverse are 0."""


@dataclass(eq=False)
class Kernel:
    """Attention for one config, on one device. Call it with arrays.

    Attributes:
        config: what it computes.
        device: name of the device that computes it.
        backend: ``"metalgen"`` (our kernel), ``"mlx"`` (``mx.fast.scaled_dot_product_attention``)
            or ``"plain"`` (plain MLX operations).
        family: ``"forward"`` or ``"decode"`` (up to 64 queries); either takes any lengths.
        schedule: how our kernel runs, or would run where another backend keeps the call.
        path: how the schedule was found, and why the backend is what it is.
    """

    config: AttentionConfig
    device: str
    backend: str
    family: str
    schedule: Schedule
    path: tuple[str, ...]
    _run: Runner = field(repr=False)
    _gradients: KernelGradients | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        """Short, for a prompt; `explain` says more."""
        return f"<Kernel {self.config}: {self.backend} on {self.device}, {self.schedule}>"

    @functools.cached_property
    def _tally(self) -> Tally:
        """Where calls of this kernel are counted."""
        ours = self.backend == "metalgen" or not self.path
        return tally(self.backend, "" if ours else self.path[-1])

    @functools.cached_property
    def _computation(self) -> Computation:
        return Computation(self._run, self.config, self._gradients)

    @functools.cached_property
    def _asks(self) -> bool:
        return needs_inputs(self.config)

    @functools.cached_property
    def backward(self) -> str:
        """What computes gradients: ``"metalgen"``, backward kernels, ``"mlx"``, the function's of
        ``mx.fast``, or ``"plain"``, plain MLX operations."""
        if self._gradients is not None:
            return "plain" if self._gradients.schedules is None else "metalgen"
        return "mlx" if self.backend == "mlx" else backward_of(self.config)

    @property
    def backward_schedules(self) -> tuple[Schedule, ...]:
        """Schedules of our backward kernels: of query rows and of key rows unless these are a
        cache, or of one kernel for all gradients; empty without any."""
        return () if self._gradients is None else self._gradients.used

    @functools.cached_property
    def _has_own_gradient(self) -> bool:
        """Whether gradients are not those that MLX finds by itself of what runs."""
        return self.backend == "metalgen" or (self.backend, self.backward) == ("plain", "mlx")

    @functools.cached_property
    def source(self) -> str:
        """The source of our kernel for this config and schedule: Metal, or on a CUDA GPU CUDA."""
        from metalgen.source.render import render

        return render(self.config, self.schedule).text

    def explain(self) -> str:
        """Where the schedule came from, what runs, and why; one step a line."""
        names = {
            "metalgen": "metalgen's kernel",
            "mlx": "MLX's own fused attention",
            "plain": "plain MLX operations",
        }
        head = f"{self.config}: {names[self.backend]} on device {self.device!r}"
        steps = (f"  {step}" for step in brief(self.path))
        by = BACKWARDS[self.backward] if self._gradients is None else self._gradients.explain()
        gradients = f"  gradients: {by}"
        return "\n".join([head, f"  schedule: {self.schedule}", *steps, gradients])

    def __call__(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        *,
        scale: float | None = None,
        inputs: Inputs = NOTHING,
    ) -> mx.array | tuple[mx.array, mx.array]:
        """Attention of `q`, `k` and `v`; lazy on a GPU, and differentiable.

        Args:
            q: ``(B, H, Lq, D)``, k: ``(B, Hkv, Lk, D)``, v: ``(B, Hkv, Lk, Dv)``, of the config's
                type; any lengths, any strides. (Shapes and types of packed sequences, pages and
                quantized keys: `AttentionConfig`.)
            scale: factor of the scores; None means ``1 / sqrt(D)``.
            inputs: the other arrays that the config asks for.

        Returns:
            ``(B, H, Lq, Dv)``; with the config's ``return_lse`` a pair with the log-sum-exp,
            ``(B, H, Lq)``, float32.

        Raises:
            ArgumentError: shapes or types that do not fit the config.
        """
        check_qkv(self.config, q, k, v, inputs)
        if self._asks or inputs is not NOTHING:
            check_inputs(self.config, q, k, v, inputs)
        scale = check_scale(self.config.head_dim, scale)
        self._tally.calls += 1
        if self._has_own_gradient:
            out, lse = differentiable(self._computation, q, k, v, scale, inputs)
        else:
            out, lse = self._run(q, k, v, scale, inputs)
        return out if lse is None else (out, lse)

    def _with_scale(self, scale: float) -> Callable[..., tuple[mx.array, ...]]:
        """The kernel as a function of q, k and v that checks and counts nothing.

        For one of ours whose config asks for no other input. It returns the output and, where the
        config asks for it, the log-sum-exp.
        """
        return function_of(self._computation, check_scale(self.config.head_dim, scale), NOTHING)


def check_scale(head_dim: int, scale: float | None) -> float:
    """The scale as a float, by default ``1 / sqrt(D)``; raises `ArgumentError` if it is none."""
    if scale is None:
        return float(head_dim**-0.5)
    number = as_number(scale)
    if number is None or not abs(number) < MAX_SCALE:
        expected = f"a finite number below {MAX_SCALE:g}, or None for 1 / sqrt(head_dim)"
        raise ArgumentError("scale", expected, scale)
    # Below, a kernel's factor would be no normal float32, and masked scores no longer be lowest.
    return number if abs(number) >= 1 / MAX_SCALE else 0.0
