"""What devices that run rendered kernels share: render, compile, launch."""

from __future__ import annotations

import abc
import functools
import math
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.devices.backward import GradientRunner, build_gradients
from metalgen.devices.base import Device, Runner
from metalgen.devices.binding import check_buffers, launched, rows_as_bound
from metalgen.devices.marking import Launcher
from metalgen.devices.pieces import run_in_pieces
from metalgen.families import Schedule, check_schedule, get_attention
from metalgen.families.launch import Launch
from metalgen.features.base import Binder, Summed
from metalgen.languages import get_language
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING, Inputs, max_kv_len

if TYPE_CHECKING:
    from metalgen.source.render import KernelSource


class KernelDevice(Device):
    """A device of a language: a subclass says how MLX compiles its sources."""

    language: str
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

    def build_gradients(
        self, config: AttentionConfig, schedules: tuple[Schedule, ...]
    ) -> GradientRunner:
        return build_gradients(self, config, schedules)

    def build_sum(
        self, config: AttentionConfig, schedule: Schedule, summed: Summed
    ) -> GradientRunner:
        from metalgen.devices.sums import SumKernel

        return SumKernel(self, config, schedule, summed)

    def build(self, config: AttentionConfig, schedule: Schedule) -> Runner:
        from metalgen.source.render import render  # brings Jinja, which a look-up does without

        check_schedule(config, schedule, self.limits)
        family, language = get_attention(schedule.family), get_language(self.language)
        steps = family.steps(schedule)
        sources = [render(config, schedule, step) for step in steps]
        for source in sources:
            check_buffers(source, language)
        kernels = [self.compile(source) for source in sources]
        most_kv_heads = family.most_kv_heads(config, schedule, self.most_groups)

        @functools.lru_cache(maxsize=64)
        def dispatches(
            shape: tuple[int, int, int], keys: int, sequences: int, dtype: mx.Dtype
        ) -> list[tuple[Launch, list[mx.array], list[dict[str, Any]]]]:
            """Each launch of a call of these sizes, its own input, and the kernels' arguments."""
            found = []
            for launch in family.launches(
                config, schedule, shape, keys, sequences, self.most_groups
            ):
                name = str(dtype).rpartition(".")[2]
                each = [step.dispatch(config, schedule, launch, name) for step in steps]
                given = [launched(*pair) for pair in zip(sources, each, strict=True)]
                start = [] if launch.start is None else [mx.array(launch.start, mx.int32)]
                found.append((launch, start, given))
            return found

        def run(
            q: mx.array, k: mx.array, v: mx.array, scale: float, inputs: Inputs = NOTHING
        ) -> tuple[mx.array, mx.array | None]:
            shape = q.shape
            if 0 in shape or 0 in k.shape or not max_kv_len(config, k, inputs):
                return _empty(config, q, inputs)  # nothing to launch: no row sees a key
            # With a bound on the work a call is cut into dispatches, which keep to the limits.
            crowded = shape[0] > self.most_groups or k.shape[1] > most_kv_heads
            if crowded and config.max_work is None:
                most = (self.most_groups, most_kv_heads)
                return run_in_pieces(run, config, most, q, k, v, scale, inputs)
            q, scale = positive_scale(q, scale)
            exponents = self.number(scale * math.log2(math.e))  # of 2
            bound = [*(rows_as_bound(x, language) for x in (q, k, v)), exponents]
            if inputs is not NOTHING:
                whole = (*shape[:3], max_kv_len(config, k, inputs))
                rows = functools.partial(rows_as_bound, language=language)
                binder = Binder(whole, sources[0].bq, schedule.bk, rows)
                for feature in config.features:
                    bound += feature.bind(config, inputs, binder)
            keys = max_kv_len(config, k, inputs)
            sequences = 0 if inputs.cu_q is None else inputs.cu_q.size - 1
            found = []
            launches = dispatches(shape[:3], keys, sequences, q.dtype)
            for _, start, each in launches:
                outputs = bound + start
                for kernel, own in zip(kernels, each, strict=True):
                    outputs = kernel(inputs=outputs, **own)
                found.append(outputs)
            outputs = found[0]
            if len(found) > 1:
                outputs = _joined(found, launches[0][0], *shape[:3])
            return outputs[0], outputs[1] if config.return_lse else None

        return run


def _empty(
    config: AttentionConfig, q: mx.array, inputs: Inputs
) -> tuple[mx.array, mx.array | None]:
    """What a call without queries or keys gives."""
    shape = q.shape[:3]
    out = mx.zeros((*shape, config.v_dim), q.dtype)
    if not config.return_lse:
        return out, None
    found = (feature.empty_lse(inputs) for feature in config.features)
    logits = next((logit for logit in found if logit is not None), None)
    if logits is None:
        return out, mx.full(shape, -mx.inf)
    lse = mx.broadcast_to(logits, shape)
    if inputs.cu_q is not None:  # rows of no sequence have none either
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
