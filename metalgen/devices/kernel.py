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
from metalgen.devices.launch import Launch, attention_launches
from metalgen.devices.marking import Launcher
from metalgen.devices.pieces import run_in_pieces
from metalgen.errors import InvalidSchedule
from metalgen.inputs import NOTHING, Inputs, asked_for, key_places
from metalgen.schedule import Schedule, check_schedule
from metalgen.targets import TARGETS, Target

if TYPE_CHECKING:
    from metalgen.render import KernelSource


METAL_BUFFERS = 31
"""Buffers that a Metal kernel may bind (Metal feature set tables: buffers per stage)."""


class KernelDevice(Device):
    """A device of a target: a subclass says how MLX compiles its sources."""

    target: str
    most_groups: int = (1 << 31) - 1
    """Threadgroups of one dispatch along y (heads) and along z (batch entries)."""

    @abc.abstractmethod
    def compile(self, source: KernelSource) -> Launcher:
        """What MLX's constructor of custom kernels returns for a source.

        Its outputs are marked where `metalgen.devices.marking.marked_outputs` asks for it.
        """

    def number(self, x: float) -> mx.array:
        """A number as an array that kernels take, which need not be made at every call."""
        return _number(x)

    def build(self, config: AttentionConfig, schedule: Schedule, family: str = "forward") -> Runner:
        from metalgen.render import render  # brings Jinja, which a look-up does without

        check_schedule(config, schedule, self.limits, family)
        facts = TARGETS[self.target]
        source = render(config, schedule, self.target, family)
        if self.target == "metal":
            check_buffers(source)
        kernel = self.compile(source)
        join = self._combine(config, schedule) if schedule.joined > 1 else None
        count, threads = len(source.outputs), (source.threads, 1, 1)
        # A threadgroup along y serves a head, or in decode a KV head, and a share of the values.
        per_kv_head = schedule.value_parts * (1 if family == "decode" else config.heads_per_kv)
        most_kv_heads = max(1, self.most_groups // per_kv_head)

        @functools.lru_cache(maxsize=64)
        def dispatches(
            shape: tuple[int, int, int], keys: int, sequences: int, dtype: mx.Dtype
        ) -> list[tuple[Launch, list[mx.array], dict[str, Any]]]:
            """Each dispatch of a call of these sizes, its own input, and the kernel's arguments."""
            found = []
            for launch in attention_launches(
                config, schedule, family, shape, keys, sequences, self.most_groups
            ):
                shapes = [(*launch.shape, config.v_dim), launch.shape]
                dtypes = [dtype, mx.float32]
                if join:
                    dtypes[0] = mx.float32
                    shapes = [(launch.splits, *own) for own in (shapes[0], (*shapes[1], 2))]
                x, y, z = launch.groups
                arguments = {
                    "output_shapes": shapes[:count],
                    "output_dtypes": dtypes[:count],
                    "grid": (x * source.threads, y, z),
                    "threadgroup": threads,
                }
                start = [] if launch.start is None else [mx.array(launch.start, mx.int32)]
                found.append((launch, start, arguments))
            return found

        def run(
            q: mx.array, k: mx.array, v: mx.array, scale: float, inputs: Inputs = NOTHING
        ) -> tuple[mx.array, mx.array | None]:
            shape = q.shape
            if 0 in shape or 0 in k.shape or not key_places(config, k, inputs):
                return _empty(config, q, inputs)  # nothing to launch: no row sees a key
            # With a bound on the work a call is cut into dispatches, which keep to the limits.
            crowded = shape[0] > self.most_groups or k.shape[1] > most_kv_heads
            if crowded and config.max_work is None:
                limits = (self.most_groups, most_kv_heads)
                return run_in_pieces(run, config, *limits, q, k, v, scale, inputs)
            q, scale = positive_scale(q, scale)
            exponents = self.number(scale * math.log2(math.e))  # of 2
            bound = [*(_rows(x, facts) for x in (q, k, v)), exponents]
            if inputs is not NOTHING:
                bound += _more(config, source, schedule, shape, k, inputs, facts)
            keys = key_places(config, k, inputs)
            sequences = 0 if inputs.cu_q is None else inputs.cu_q.size - 1
            found = []
            launches = dispatches(shape[:3], keys, sequences, q.dtype)
            for _, start, arguments in launches:
                outputs = kernel(inputs=bound + start, **arguments)
                found.append(join(outputs[0], outputs[1], q.dtype) if join else outputs)
            outputs = found[0]
            if len(found) > 1:
                outputs = _joined(found, launches[0][0], *shape[:3])
            return outputs[0], outputs[1] if config.return_lse else None

        return run

    def _combine(
        self, config: AttentionConfig, schedule: Schedule
    ) -> Callable[[mx.array, mx.array, mx.Dtype], list[mx.array]]:
        """The kernel that joins the outputs of several splits."""
        from metalgen.render import render

        source = render(config, schedule, self.target, "combine")
        kernel = self.compile(source)

        def run(parts: mx.array, sums: mx.array, dtype: mx.Dtype) -> list[mx.array]:
            shapes = [tuple(parts.shape[1:]), tuple(parts.shape[1:-1])]
            size = math.prod(shapes[0])
            return kernel(
                inputs=[parts, sums],
                output_shapes=shapes[: len(source.outputs)],
                output_dtypes=[dtype, mx.float32][: len(source.outputs)],
                grid=(-(-size // source.threads) * source.threads, 1, 1),
                threadgroup=(source.threads, 1, 1),
            )

        return run


def _more(
    config: AttentionConfig,
    source: KernelSource,
    schedule: Schedule,
    shape: tuple[int, ...],
    k: mx.array,
    inputs: Inputs,
    facts: Target,
) -> list[mx.array]:
    """A kernel's inputs beside q, k, v and the scale."""
    bound = []
    if inputs.blocks is not None:
        bound.append(inputs.blocks.lists(source.bq, schedule.bk))
    bound += [mx.contiguous(x) for x in (*inputs.score, *inputs.mask)]
    for name in asked_for(config):
        array = getattr(inputs, name)
        if name in ("bias", "array_mask"):
            whole = (*shape[:3], key_places(config, k, inputs))
            bound.append(mx.broadcast_to(array, whole))
        elif name.endswith(("_scales", "_biases")):
            bound.append(_rows(array, facts))
        else:
            bound.append(mx.contiguous(array))
    return bound


def _rows(x: mx.array, facts: Target) -> mx.array:
    """An array of rows (of Q, keys, or what belongs to keys) as a target's kernels take it."""
    if not facts.bytes:
        return x
    x = x.view(mx.uint8)
    # MLX binds arrays of fewer than 8 elements as `constant`, where no row can lie.
    missing = 8 - x.shape[-1] if x.size < 8 else 0
    return mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x


def _empty(
    config: AttentionConfig, q: mx.array, inputs: Inputs
) -> tuple[mx.array, mx.array | None]:
    """What a call without queries or keys gives."""
    shape = q.shape[:3]
    out = mx.zeros((*shape, config.v_dim), q.dtype)
    if not config.return_lse:
        return out, None
    if inputs.sinks is None:
        return out, mx.full(shape, -mx.inf)
    lse = mx.broadcast_to(inputs.sinks[None, :, None], shape)
    if inputs.cu_q is not None:  # rows of no sequence have no sink either
        lse = mx.where(mx.arange(shape[2]) < inputs.cu_q[-1], lse, -mx.inf)
    return out, lse


def _joined(
    found: list[list[mx.array]], first: Launch, batch: int, heads: int, q_len: int
) -> list[mx.array]:
    """The outputs of a call's dispatches, put together; they come in order of their rows."""
    outputs = []
    for parts in zip(*found, strict=True):
        if first.shape[1:] == (heads, q_len):
            outputs.append(mx.concatenate(list(parts), axis=0))
            continue
        # Shares of heads, or of one head's rows: rows of all heads of an entry, one after another.
        tail = parts[0].shape[3:]
        rows = mx.concatenate([p.reshape(-1, *tail) for p in parts], axis=0)
        outputs.append(rows.reshape(batch, heads, -1, *tail))
    return outputs


def check_buffers(source: KernelSource) -> None:
    """Whether a Metal kernel's arrays, shapes and strides can all be bound.

    Raises:
        InvalidSchedule: they cannot; so it is when nearly all features come at once.
    """
    buffers = len(source.inputs) + len(source.outputs)
    for name in source.inputs:
        buffers += sum(f"{name}_{fact}" in source.source for fact in ("shape", "strides"))
    if buffers > METAL_BUFFERS:
        detail = f"the kernel binds {buffers}, and Metal has {METAL_BUFFERS}: too many features"
        raise InvalidSchedule("buffers", detail)


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


_number = functools.lru_cache(maxsize=64)(mx.array)


def positive_scale(q: mx.array, scale: float) -> tuple[mx.array, float]:
    """The same scores by a scale above zero, which the kernels' row maxima need."""
    if scale > 0:
        return q, scale
    if scale < 0:
        return -q, -scale
    return mx.zeros_like(q), 1.0
