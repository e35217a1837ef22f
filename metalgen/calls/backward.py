"""The backward kernels of a config, which are checked and built for its first gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx

from metalgen.calls.checked import passes
from metalgen.calls.verify_sums import sum_fault, sum_runners
from metalgen.database.hit import Hit
from metalgen.database.lookup import lookup
from metalgen.devices import Device, Runner
from metalgen.devices.backward import GradientRunner, row_terms
from metalgen.devices.mlx_attention import differentiates_in_linear_memory
from metalgen.devices.sums import array_of, has_fixed_order
from metalgen.errors import InvalidSchedule
from metalgen.families import Limits, Schedule, default_schedule, get_attention
from metalgen.families.backward import (
    BACKWARD_ALL,
    backward_config,
    backward_families,
    made_by,
    unsupported,
)
from metalgen.families.sizes import Problem
from metalgen.features.base import Summed
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs
from metalgen.reference import config_features, gradients_mlx
from metalgen.source.hashes import template_hashes

if TYPE_CHECKING:
    from metalgen.chips import Chip


@dataclass(eq=False)
class KernelGradients:
    """Gradients by backward kernels; in plain MLX operations where these turn out to be wrong.

    Attributes:
        device: what runs them.
        config: of the forward pass.
        schedules: of the rows of queries, and of the rows of keys unless these are a cache; None:
            there are no kernels.
        joint: of a kernel that makes all three gradients, where that was measured as faster.
        forward: the schedule of the forward kernel.
        sources: where the schedules come from, if not by default.
        path: how they were checked; empty until the first gradient.
    """

    device: Device
    config: AttentionConfig
    schedules: tuple[Schedule, ...] | None
    forward: Schedule
    sources: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    joint: Schedule | None = None
    _sums: dict[tuple[Summed, ...], list[GradientRunner] | None] = field(default_factory=dict)

    @functools.cached_property
    def runners(self) -> dict[tuple[int, ...], list[GradientRunner]] | None:
        """The kernels, checked, by the numbers of the gradients that they make, of q, k and v; None
        where there are none, or one of them does not pass."""
        if self.schedules is None:
            return None
        bare = backward_config(self.config)
        for schedules in dict.fromkeys([self.used, self.schedules]):
            if all(passes(self.device, bare, each, self.path) for each in schedules):
                return {
                    tuple("qkv".index(name[1]) for name in made_by(each)): [
                        self.device.build_gradients(self.config, (each,))
                    ]
                    for each in schedules
                }
        self.path.append("FALLBACK to plain MLX operations: no backward kernel passed")
        return None

    @functools.cached_property
    def with_lse(self) -> Runner:
        """The forward kernel with its log-sum-exp, for kernels that do not give it."""
        return self.device.build(replace(self.config, return_lse=True), self.forward)

    def of(self, scale: float, inputs: Inputs) -> Callable[..., tuple[mx.array, ...]]:
        """The gradients as a function of arrays, whose own derivatives are those of plain MLX.

        The function takes q, k, v, output, log-sum-exp, the cotangents of these two, and all other
        arrays of the call; it returns the gradients of q, k, v and of all other arrays.
        """
        features = config_features(self.config)

        def plain(*arrays: mx.array, wanted: list[int] | None = None) -> list[mx.array]:
            q, k, v, out, lse, dout, dlse, *others = arrays
            own = {**features, "inputs": inputs.replaced(tuple(others)), "wanted": wanted}
            return gradients_mlx(q, k, v, (out, lse), (dout, dlse), scale=scale, **own)

        runners = self.runners
        if runners is None:
            return lambda *arrays: tuple(plain(*arrays))

        def gradients(*arrays: mx.array) -> tuple[mx.array, ...]:
            q, k, v, out, lse, dout, dlse, *others = arrays
            given = inputs.replaced(tuple(others))
            parts = {**runners}
            for name, each in self._summed(q, given).items():
                parts[(3 + given.names.index(name),)] = each
            kept = {n for part in parts for n in part}
            every = (q, k, v, *others)
            floats = {n for n, x in enumerate(every) if mx.issubdtype(x.dtype, mx.floating)}
            found = [mx.zeros_like(x) for x in every]
            if left := sorted(floats - kept):
                rest = plain(*arrays, wanted=left)
                for n in left:
                    found[n] = rest[n]
            terms = row_terms(self.config, (out, lse), (dout, dlse))
            for numbers, each in parts.items():
                for n, x in zip(numbers, part(numbers, each)(*arrays, terms), strict=True):
                    found[n] = x
            return tuple(found)

        def part(numbers: tuple[int, ...], each: list[GradientRunner]) -> Any:
            """Some of the gradients, by the sum of some kernels, as a function of its own: MLX
            computes all results of a function of which it is told the derivatives, or none."""

            @mx.custom_function
            def kernels(*arrays: mx.array) -> tuple[mx.array, ...]:
                q, k, v, out, lse, dout, dlse, *others, terms = arrays
                call = (q, k, v, (out, lse), (dout, dlse), scale, inputs.replaced(tuple(others)))
                found = [run(*call, terms=terms) for run in each]
                sums = (functools.reduce(mx.add, one) for one in zip(*found, strict=True))
                of = [(q, k, v, *others)[n] for n in numbers]
                return tuple(x.astype(y.dtype) for x, y in zip(sums, of, strict=True))

            @kernels.vjp
            def second(primals: list[mx.array], cotangents: Any, outputs: object) -> object:
                *arrays, terms = primals

                def own(*arrays: mx.array) -> list[mx.array]:
                    found = plain(*arrays, wanted=list(numbers))
                    return [found[n] for n in numbers]

                return (*mx.vjp(own, arrays, list(cotangents))[1], mx.zeros_like(terms))

            return kernels

        return gradients

    def _summed(self, q: mx.array, inputs: Inputs) -> dict[str, list[GradientRunner]]:
        """The kernels that sum the gradients of inputs, by name; others are left to plain MLX."""
        found: dict[str, list[Summed]] = {}
        for feature in self.config.features:
            for summed in feature.sums(self.config, inputs):
                found.setdefault(summed.array, []).append(summed)
        heads, made = (q.shape[0], q.shape[1]), dict[str, list[GradientRunner]]()
        for name, each in found.items():
            if self.config.deterministic and not all(
                has_fixed_order(summed, array_of(inputs, summed), heads) for summed in each
            ):
                continue
            if (runners := self._sum(tuple(each))) is not None:
                made[name] = runners
        return made

    def _sum(self, each: tuple[Summed, ...]) -> list[GradientRunner] | None:
        """The kernels of the sums of one input, checked; None where they do not pass."""
        if each not in self._sums:
            assert self.schedules is not None
            if len(self.schedules) == 1 and any(one.by == "key" for one in each):
                return None
            fault = sum_fault(self.device, self.config, self.schedules, each)
            made = None if fault else sum_runners(self.device, self.config, self.schedules, each)
            said = f"FALLBACK to plain MLX operations: {fault}" if fault else "ok"
            self.path.append(f"gradient of {each[0].array} by sums on {self.device.name}: {said}")
            self._sums[each] = made
        return self._sums[each]

    @property
    def used(self) -> tuple[Schedule, ...]:
        """The schedules of the kernels that compute gradients, as far as these pass their check."""
        if self.schedules is None:
            return ()
        return self.schedules if self.joint is None else (self.joint,)

    def explain(self) -> str:
        """What computes gradients, and how it was checked."""
        if self.schedules is None:
            return "plain MLX operations, in blocks of queries: memory grows with the length"
        names = ", ".join(f"{schedule.family} {schedule}" for schedule in self.used)
        checked = "; ".join([*self.sources, *(self.path or ["checked with the first gradient"])])
        return f"metalgen's backward kernels ({names}; {checked})"


def with_lse(config: AttentionConfig, gradients: KernelGradients | None) -> AttentionConfig:
    """What the forward kernel computes so that gradients need not run it again.

    Few rows leave their log-sum-exp out, unless it is asked for: it is cheap to compute again, and
    calls of few rows are seldom differentiated.
    """
    if gradients is None or get_attention(gradients.forward.family).head_rows:
        return config
    return replace(config, return_lse=True)


class Where(NamedTuple):
    """What runs kernels, and whose records say which.

    Args:
        device: the device.
        limits: what kernels may use.
        chip: whose tuning records; None: nobody's.
    """

    device: Device
    limits: Limits
    chip: Chip | None = None


def kernel_gradients(
    where: Where, problem: Problem, forward: Schedule, path: list[str]
) -> KernelGradients | None:
    """What computes the gradients of a config from the results of a kernel; None: MLX's function.

    That keeps those that it computes in linear memory.

    Args:
        where: what runs kernels.
        problem: of the forward pass: config and sizes.
        forward: the schedule of its kernel.
        path: takes in why there are none.
    """
    assert where.device.language is not None
    if differentiates_in_linear_memory(problem.config, where.device.language):
        return None
    return backward_kernels(where, problem, forward, path)


def backward_kernels(
    where: Where, problem: Problem, forward: Schedule, path: list[str]
) -> KernelGradients:
    """As `kernel_gradients`, also where MLX's function keeps the gradients."""
    device, config = where.device, problem.config
    bare = backward_config(config)
    if reason := unsupported(bare):
        path.append(f"gradients: backward kernels do not support {reason}")
        return KernelGradients(device, config, None, forward)
    names = tuple(family.name for family in backward_families(bare))
    hits = [_on_record(where, problem, family) for family in names]
    try:
        schedules = tuple(
            default_schedule(bare, where.limits, family) if hit is None else hit.schedule
            for family, hit in zip(names, hits, strict=True)
        )
    except InvalidSchedule as error:
        path.append(f"gradients: no backward kernel fits: {error.detail}")
        return KernelGradients(device, config, None, forward)
    found = KernelGradients(device, config, schedules, forward)
    alone = config.deterministic or len(names) == 1
    together = None if alone else _on_record(where, problem, BACKWARD_ALL.name)
    if together is not None and is_faster(together, hits):
        found.joint, hits, names = together.schedule, [together], (BACKWARD_ALL.name,)
    pairs = zip(names, hits, strict=True)
    found.sources += [f"{name}: {hit.place}, {hit.provenance}" for name, hit in pairs if hit]
    return found


def is_faster(one: Hit, several: list[Hit | None]) -> bool:
    """Whether a kernel was measured as faster than several others together, each of them too."""
    times = [hit.seconds for hit in (one, *several) if hit is not None and hit.is_measured]
    if len(times) <= len(several) or None in times:
        return False
    first, *others = (seconds for seconds in times if seconds is not None)
    return first < sum(others)


def _on_record(where: Where, problem: Problem, family: str) -> Hit | None:
    """The best schedule of a backward family on record."""
    assert where.device.language is not None
    bare = backward_config(problem.config)
    own = Problem(bare, problem.batch_heads, problem.q_len, problem.kv_len, family)
    hashes = template_hashes(family, where.device.language)
    return lookup(own, where.chip, hashes, limits=where.limits)
