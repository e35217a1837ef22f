"""What all results of a kind say together: gains by model, and how near to the chip's limits."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metalgen.errors import MetalgenError
from metalgen.problem.visible import visible
from metalgen.report.results import Result
from metalgen.tuning.presets import preset


@dataclass(frozen=True)
class ModelGain:
    """What tuning does for a model, over the results whose configs are those of its layers.

    Args:
        model: its name.
        chip: whose results.
        prefill, decode: geometric means of the default schedule's time over the best's; None where
            there is no such result.
        against_mlx: the same of MLX's own time, over results that have it; None without any.
        results: how many there are.
    """

    model: str
    chip: str
    prefill: float | None
    decode: float | None
    against_mlx: float | None
    results: int

    @property
    def gain(self) -> float:
        """The larger of the two gains; 0 where there is none."""
        return max(self.prefill or 0.0, self.decode or 0.0)


def by_model(results: Iterable[Result]) -> list[ModelGain]:
    """The gains of models with a preset, the greatest first."""
    layers: dict[str, set[str]] = {}
    everything = preset("all")
    for problem in everything.problems:
        labels = {label.partition(" ")[0] for label in everything.models[problem.key]}
        layers.setdefault(problem.config.key, set()).update(labels)
    groups: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        for model in layers.get(r.problem.config.key, ()) if r.gain else ():
            groups.setdefault((model, r.chip), []).append(r)
    found = [
        ModelGain(
            *(model, chip),
            _mean(r.gain for r in own if r.problem.q_len > 1),
            _mean(r.gain for r in own if r.problem.q_len == 1),
            _mean(r.against_mlx for r in own),
            len(own),
        )
        for (model, chip), own in groups.items()
    ]
    return sorted(found, key=lambda g: (-g.gain, g.model, g.chip))


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value]
    return statistics.geometric_mean(known) if known else None


@dataclass(frozen=True)
class Point:
    """One result in a roofline.

    Args:
        intensity: operations for each byte of queries, keys, values and outputs.
        rate: operations a second of the best schedule.
        mlx: the same of MLX's own attention, or None.
    """

    intensity: float
    rate: float
    mlx: float | None


@dataclass(frozen=True)
class Roof:
    """The results of a chip, and its limits by its vendor, where they are known.

    Args:
        chip: its name.
        points: its results.
        operations: a second; float16 multiply-adds outside tensor units count as two.
        bytes: a second, of memory.
    """

    chip: str
    points: tuple[Point, ...]
    operations: float | None
    bytes: float | None


def roofs(results: Sequence[Result]) -> list[Roof]:
    """One roofline for each chip whose results have times."""
    from metalgen.chips import get_chip

    chips: dict[str, list[Point]] = {}
    for r in results:
        if r.winner and r.winner.seconds:
            chips.setdefault(r.chip, []).append(_point(r, r.winner.seconds))
    found = []
    for name, points in sorted(chips.items()):
        try:
            chip = get_chip(name)
            tflops, gbs = chip.fp16_tflops, chip.dram_gbs
        except MetalgenError:
            tflops = gbs = None
        found.append(
            Roof(name, tuple(points), tflops and tflops * 1e12, gbs and gbs * 1e9),
        )
    return found


def _point(r: Result, seconds: float) -> Point:
    work, moved = operations(r), bytes_of(r)
    mlx = work / r.mlx_seconds if r.mlx_seconds else None
    return Point(work / moved, work / seconds, mlx)


def operations(r: Result) -> float:
    """Multiplications and additions of the scores that causal masks and windows keep."""
    p = r.problem
    width = p.config.head_dim + p.config.v_dim
    return 2.0 * width * p.batch_heads * visible(p.config, p.q_len, p.kv_len)


def bytes_of(r: Result) -> float:
    """Bytes of queries, keys, values and outputs, each once."""
    p, c = r.problem, r.problem.config
    width = c.head_dim + c.v_dim
    rows = p.batch_heads / c.heads_per_kv * p.kv_len
    keys = rows * c.kv_row_bytes
    return keys + p.batch_heads * p.q_len * width * c.itemsize


def score_bytes(r: Result) -> float:
    """Bytes of the scores that an unfused computation keeps, and a fused one does not."""
    p = r.problem
    return float(p.batch_heads) * p.q_len * p.kv_len * p.config.itemsize
