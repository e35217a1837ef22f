"""What devices that run rendered kernels share: render, compile, launch."""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.config import AttentionConfig
from metalgen.devices.base import Device, Runner
from metalgen.inputs import NOTHING, Inputs
from metalgen.schedule import Schedule, check_schedule

if TYPE_CHECKING:
    from metalgen.render import KernelSource


class KernelDevice(Device):
    """A device of a target: a subclass says how MLX compiles its sources."""

    target: str

    @abc.abstractmethod
    def compile(self, source: KernelSource) -> Callable[..., list[mx.array]]:
        """What MLX's constructor of custom kernels returns for a source."""

    def build(self, config: AttentionConfig, schedule: Schedule, family: str = "forward") -> Runner:
        from metalgen.render import render  # brings Jinja, which a look-up does without

        check_schedule(config, schedule, self.limits, family)
        source = render(config, schedule, self.target, family)
        kernel = self.compile(source)
        splits = schedule.splits
        join = self._combine(config, schedule) if splits > 1 else None

        def run(
            q: mx.array,
            k: mx.array,
            v: mx.array,
            scale: float,
            inputs: Inputs = NOTHING,
        ) -> tuple[mx.array, mx.array | None]:
            batch, heads, q_len, _ = q.shape
            shapes = [(batch, heads, q_len, config.v_dim), (batch, heads, q_len)]
            if 0 in q.shape or 0 in k.shape:  # nothing to launch: no row sees a key
                lse = mx.full(shapes[1], -mx.inf) if config.return_lse else None
                return mx.zeros(shapes[0], q.dtype), lse
            dtypes = [q.dtype, mx.float32]
            if join:
                shapes, dtypes = [(splits, *shape) for shape in shapes], [mx.float32] * 2
            rows, columns = (
                (q_len * config.heads_per_kv, k.shape[1]) if family == "decode" else (q_len, heads)
            )
            q, scale = positive_scale(q, scale)
            # Seen as bytes, an array is copied only where its last axis has gaps.
            bound = [*(x.view(mx.uint8) for x in (q, k, v)), _exponent_scale(scale)]
            if inputs.blocks is not None:
                bound.append(inputs.blocks.lists(source.bq, schedule.bk))
            bound += [mx.contiguous(x) for x in inputs.arrays]
            outputs = kernel(
                inputs=bound,
                output_shapes=shapes[: len(source.outputs)],
                output_dtypes=dtypes[: len(source.outputs)],
                grid=(-(-rows // source.bq) * source.threads * splits, columns, batch),
                threadgroup=(source.threads, 1, 1),
            )
            if join:
                outputs = join(outputs[0], outputs[1], q.dtype)
            return outputs[0], outputs[1] if config.return_lse else None

        return run

    def _combine(
        self, config: AttentionConfig, schedule: Schedule
    ) -> Callable[[mx.array, mx.array, mx.Dtype], list[mx.array]]:
        """The kernel that joins the outputs of several splits."""
        from metalgen.render import render

        source = render(config, schedule, self.target, "combine")
        kernel = self.compile(source)

        def run(parts: mx.array, part_lse: mx.array, dtype: mx.Dtype) -> list[mx.array]:
            shapes = [tuple(parts.shape[1:]), tuple(part_lse.shape[1:])]
            size = math.prod(shapes[0])
            return kernel(
                inputs=[parts, part_lse],
                output_shapes=shapes[: len(source.outputs)],
                output_dtypes=[dtype, mx.float32][: len(source.outputs)],
                grid=(-(-size // source.threads) * source.threads, 1, 1),
                threadgroup=(source.threads, 1, 1),
            )

        return run


def arguments(source: KernelSource) -> dict[str, Any]:
    """The arguments that MLX's constructors for Metal and for CUDA have in common."""
    return {
        "name": source.name,
        "input_names": list(source.inputs),
        "output_names": list(source.outputs),
        "source": source.source,
        "header": source.header,
        "ensure_row_contiguous": False,
    }


@functools.lru_cache(maxsize=64)
def _exponent_scale(scale: float) -> mx.array:
    """The scale of exponents of 2, as an array that need not be made at every call."""
    return mx.array(scale * math.log2(math.e))


def positive_scale(q: mx.array, scale: float) -> tuple[mx.array, float]:
    """The same scores by a scale above zero, which the kernels' row maxima need."""
    if scale > 0:
        return q, scale
    if scale < 0:
        return -q, -scale
    return mx.zeros_like(q), 1.0
