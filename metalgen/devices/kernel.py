"""What devices that run rendered kernels share: render, compile, launch."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.config import AttentionConfig
from metalgen.devices.base import Device, Runner
from metalgen.schedule import Schedule, check_schedule

if TYPE_CHECKING:
    from metalgen.dsl.inputs import FunctionInputs
    from metalgen.render import KernelSource


class KernelDevice(Device):
    """A device of a target: a subclass says how MLX compiles its sources."""

    target: str

    @abc.abstractmethod
    def compile(self, source: KernelSource) -> Callable[..., list[mx.array]]:
        """What MLX's constructor of custom kernels returns for a source."""

    def build(self, config: AttentionConfig, schedule: Schedule) -> Runner:
        from metalgen.render import render  # brings Jinja, which a look-up does without

        check_schedule(config, schedule, self.limits)
        source = render(config, schedule, self.target)
        kernel = self.compile(source)

        def run(
            q: mx.array,
            k: mx.array,
            v: mx.array,
            scale: float,
            inputs: FunctionInputs | None = None,
        ) -> tuple[mx.array, mx.array | None]:
            batch, heads, q_len, _ = q.shape
            shapes: list[tuple[int, ...]] = [(batch, heads, q_len, config.v_dim)]
            dtypes = [q.dtype]
            if config.return_lse:
                shapes.append((batch, heads, q_len))
                dtypes.append(mx.float32)
            if 0 in q.shape or 0 in k.shape:  # nothing to launch: no row sees a key
                empty = [mx.zeros(shapes[0], q.dtype)]
                empty += [mx.full(shape, -mx.inf) for shape in shapes[1:]]
                return empty[0], empty[1] if config.return_lse else None
            q, scale = positive_scale(q, scale)
            # Seen as bytes, an array is copied only where its last axis has gaps.
            bound = [x.view(mx.uint8) for x in (q, k, v)] + [scale * math.log2(math.e)]
            if inputs is not None:
                if inputs.blocks is not None:
                    bound.append(inputs.blocks.lists(source.bq, schedule.bk))
                bound += [mx.contiguous(x) for x in inputs.arrays]
            outputs = kernel(
                inputs=bound,
                output_shapes=shapes,
                output_dtypes=dtypes,
                grid=(-(-q_len // source.bq) * source.threads, heads, batch),
                threadgroup=(source.threads, 1, 1),
            )
            return outputs[0], outputs[1] if config.return_lse else None

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


def positive_scale(q: mx.array, scale: float) -> tuple[mx.array, float]:
    """The same scores by a scale above zero, which the kernels' row maxima need."""
    if scale > 0:
        return q, scale
    if scale < 0:
        return -q, -scale
    return mx.zeros_like(q), 1.0
