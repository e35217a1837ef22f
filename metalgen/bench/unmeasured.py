"""What can be said of a row without a GPU: times by the chip model, counts by the simulator.

Neither is a measurement, and no ratio of such times is called a speed-up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.bench.work import Work
from metalgen.calls.check import first_line
from metalgen.errors import MetalgenError
from metalgen.families import default_schedule, enumerate_valid
from metalgen.problem.samples import sample_call

if TYPE_CHECKING:
    from metalgen.chips import Chip

MLX_WIDTHS = (64, 128)
"""Head dimensions for which the chip model knows MLX's own kernel."""
MOST_COUNTED = 1 << 22
"""Scores of the largest call that the simulator counts."""


@dataclass(frozen=True)
class Modelled:
    """One predicted time.

    Args:
        name: ``"ours, best modelled"``, ``"ours default"`` or ``"MLX fused"``.
        seconds: predicted; None where the model cannot say.
        detail: why not, or what is not priced, or the schedule.
    """

    name: str
    seconds: float | None
    detail: str = ""


@dataclass
class ModelledRow:
    """A work and its predictions on a chip."""

    work: Work
    chip: str
    results: list[Modelled] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        results = [asdict(r) | {"provenance": "modelled"} for r in self.results]
        return {"work": self.work.to_dict(), "chip": self.chip, "results": results}


def modelled(work: Work, chip: Chip) -> ModelledRow:
    """Predictions of ours and of MLX's own kernel, forward, of the attention of a work."""
    from metalgen.chips.adapters import mlx_work
    from metalgen.chips.model import estimate, predict
    from metalgen.tuning.search.ranking import rank

    row = ModelledRow(work, chip.name)
    problem, config = work.problem, work.config
    try:
        default = default_schedule(config, chip.limits, problem.family)
        valid = enumerate_valid(config, chip.limits, problem.family)
        best = rank(problem, valid, chip)[0]
        row.results.append(Modelled("ours, best modelled", best[0], str(best[1])))
        found = predict(problem, default, chip)
        row.results.append(Modelled("ours default", found.seconds, found.note or str(default)))
    except MetalgenError as error:
        row.results.append(Modelled("ours", None, first_line(error)))
    plain = config.head_dim in MLX_WIDTHS and config.v_dim == config.head_dim
    same = {"causal", "head_dim", "dtype", "heads_per_kv"}
    if not plain or {f for f in config.to_dict() if f not in same} or config.dtype == "float32":
        row.results.append(Modelled("MLX fused", None, "the model does not know its kernel here"))
        return row
    sizes = problem.batch_heads, problem.q_len, problem.kv_len
    try:
        seconds = estimate(mlx_work(config.head_dim, config.causal, *sizes), chip).seconds
        row.results.append(Modelled("MLX fused", seconds, "the kernel before M5"))
    except MetalgenError as error:
        row.results.append(Modelled("MLX fused", None, first_line(error)))
    return row


@dataclass(frozen=True)
class Counted:
    """What the simulator counted of one call of the default schedule.

    Args:
        products: 8x8x8 matrix products.
        device_bytes: read from and written to buffers, before any cache.
        threadgroup_bytes: of threadgroup memory, likewise.
        exponentials, barriers: as `metalgen.simulator.counters.Counters` has them.
        findings: of the checker: races, accesses out of bounds and so on.
        detail: why there are no counts, or the schedule.
    """

    products: int = 0
    device_bytes: int = 0
    threadgroup_bytes: int = 0
    exponentials: int = 0
    barriers: int = 0
    findings: int = 0
    detail: str = ""


@dataclass(frozen=True)
class CountedRow:
    """A work and its counts."""

    work: Work
    counts: Counted

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = asdict(self.counts) | {"provenance": "simulated"}
        return {"work": self.work.to_dict(), "results": [counts]}


def counted(work: Work) -> CountedRow:
    """Execute one call on the simulator, checked, and count what it does."""
    from metalgen import simulator
    from metalgen.devices import get_device

    scores = work.batch * work.heads * work.q_len * work.kv_len
    if scores > MOST_COUNTED:
        why = f"{scores:,} scores are too many to execute on a CPU; --quick takes small sizes"
        return CountedRow(work, Counted(detail=why))
    device, config = get_device("simulator"), work.config
    try:
        schedule = default_schedule(config, device.limits, work.problem.family)
        q, k, v, inputs = sample_call(
            config,
            batch=work.batch,
            kv_heads=work.kv_heads,
            q_len=work.q_len,
            kv_len=work.kv_len,
            ragged=False,
        )
        with simulator.record(checked=True) as launches:
            out, _ = device.build(config, schedule)(q, k, v, config.head_dim**-0.5, inputs)
            mx.eval(out)
    except (MetalgenError, RuntimeError) as error:
        return CountedRow(work, Counted(detail=first_line(error)))
    all_counts = [launch.counters for launch in launches if launch.counters]
    return CountedRow(
        work,
        Counted(
            products=sum(c.multiply_accumulates for c in all_counts),
            device_bytes=sum(b.bytes_read + b.bytes_written for c in all_counts for b in c.buffers),
            threadgroup_bytes=sum(c.threadgroup_read + c.threadgroup_written for c in all_counts),
            exponentials=sum(c.exponentials for c in all_counts),
            barriers=sum(c.barriers for c in all_counts),
            findings=sum(len(x.findings) for x in launches if x.findings is not None),
            detail=str(schedule),
        ),
    )
