"""Combinations of features, schedules and sizes, made up at random, and what is wrong with them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.calls.verify import (
    FUNCTION_FACTOR,
    MOST_FOR_FUNCTIONS,
    lse_fault,
    lse_tolerance,
    relative_error,
    tolerance_of,
)
from metalgen.devices import Device
from metalgen.devices.marking import marked_outputs
from metalgen.dsl.trace import trace
from metalgen.errors import ArgumentError, InvalidSchedule
from metalgen.families import (
    DECODE_QUERIES,
    Limits,
    Schedule,
    default_schedule,
    get_attention,
    space,
)
from metalgen.features.max_work import MIN_WORK
from metalgen.features.quantized import KV_BITS, KV_GROUPS
from metalgen.kinds import kinds_in
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs, check_call
from metalgen.problem.samples import sample_call
from metalgen.reference import attention_float64, attention_mlx, config_features

DIMS = (8, 16, 20, 32, 40, 64, 72, 96, 128, 136)
GROUPED_DIMS = (32, 64, 96, 128)
"""Widths of quantized rows."""
RARE_DIMS = (192, 256, 576)
SMALL = {"head_dim": 72, "simdgroups": 2, "row_blocks": 2, "bk": 32, "splits": 8}
"""Most of each in a small case."""
HOSTILE = (
    *("cu_q", "cu_k", "kv_lens", "kv_starts", "q_offset", "seqused_q"),
    *("block_table", "rope_offset"),
)
"""Inputs that say where things are, which may contain anything."""
HOSTILE_NUMBERS = (-(2**31), -100, -1, 0, 1, 3, 7, 8, 100, 2**20, 2**31 - 1)


@dataclass(frozen=True)
class Case:
    """One call of one kernel; the arguments of `metalgen.problem.samples.sample_call`."""

    config: AttentionConfig
    schedule: Schedule
    family: str
    batch: int
    kv_heads: int
    q_len: int
    kv_len: int
    seed: int

    def call(self) -> tuple[mx.array, mx.array, mx.array, Inputs]:
        """Its arrays."""
        call = sample_call(
            self.config,
            batch=self.batch,
            kv_heads=self.kv_heads,
            q_len=self.q_len,
            kv_len=self.kv_len,
            seed=self.seed,
        )
        check_call(self.config, *call)
        return call

    def __str__(self) -> str:
        """Enough to run it again: paste it where `Case` and `config` are imported."""
        return (
            f"{self.config}\n  {self.family}: {self.schedule}\n"
            f"Case(AttentionConfig.from_json({self.config.key!r}), "
            f"Schedule(**{self.schedule.to_dict()}), {self.family!r}, {self.batch}, "
            f"{self.kv_heads}, {self.q_len}, {self.kv_len}, {self.seed})"
        )


@functools.cache
def functions() -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Score and mask functions, as text: with captured arrays of each kind, and without."""
    table, slopes, factor = mx.zeros((16, 64)), mx.zeros((16,)), mx.array(0.5)  # at most 16 heads
    places = mx.zeros((64,), mx.int32)
    scores: list[Callable[..., Any]] = [
        lambda s, b, h, i, j: s + table[h, i - j],
        lambda s, b, h, i, j: s * factor - slopes[h] * mx.abs(i - j),
        lambda s, b, h, i, j: mx.where(i >= j, 20 * mx.tanh(s / 20), s + b),
    ]
    masks: list[Callable[..., Any]] = [
        lambda b, h, i, j: i >= j,
        lambda b, h, i, j: (places[i] == places[j]) | (j < 3),
        lambda b, h, i, j: ((i - j) % (h + 2) == 0) & (j >= b),
    ]
    return (
        tuple(trace(each, "score_mod").graph.text for each in scores),
        tuple(trace(each, "mask_mod").graph.text for each in masks),
    )


def made_up(number: int, limits: Limits, *, small: bool = False) -> Case:
    """The combination of that number: any features, schedule, and sizes around its tiles.

    With `small` tiles and heads for the simulator's checker, which takes its time with large ones.

    Chosen at random, not by Hypothesis, of whose 1,000 examples only half were different kernels.
    """
    random = Random(number)
    config = _with_more(Random(-1 - number), _config(random, limits.language, small))
    family = "forward" if config.block_mask else random.choice(("forward", "decode"))
    schedule = _schedule(random, config, limits, family, small)
    most = 12 if get_attention(family).head_rows else random.choice((12, 80))
    q_len = random.randint(1, most)
    if random.random() < 0.1:
        q_len = random.randint(0, DECODE_QUERIES)
    kv_len = random.randint(0, random.choice((2 * schedule.bk + 1, 150)))
    if config.block_mask:  # which is made for lengths above 0
        q_len, kv_len = max(1, q_len), max(1, kv_len)
    batch, kv_heads = random.randint(1, 4), random.randint(1, 2)
    return Case(config, schedule, family, batch, kv_heads, q_len, kv_len, number)


def _config(random: Random, target: str, small: bool) -> AttentionConfig:
    """Any config that means something, of any combination of features."""

    def maybe(*choices: Any, share: float = 0.2, default: Any = None) -> Any:
        return random.choice(choices) if random.random() < share else default

    fields: dict[str, Any] = {
        "dtype": random.choice(kinds_in(target)[0].dtypes),
        "heads_per_kv": random.choice((1, 1, 2, 3, 8)),
        "causal": random.random() < 0.5,
        "return_lse": random.random() < 0.7,
        "window_left": maybe(0, 1, 9, 40),
        "window_right": maybe(0, 2, 20),
        "alibi": maybe(True, default=False),
        "sinks": maybe(True, default=False),
        "dropout": maybe(0.1, 0.5, 0.99, default=0.0),
        "kv_bits": maybe(*KV_BITS, share=0.3),
        "rope": maybe("half", "pairs", share=0.3),
        "page_size": maybe(8, 16, 24, 64, share=0.3),
        "varlen": maybe(True, share=0.3, default=False),
        "deterministic": maybe(True, share=0.1, default=False),
    }
    dims: tuple[int, ...] = DIMS if fields["kv_bits"] is None else GROUPED_DIMS
    if small:
        dims = tuple(dim for dim in dims if dim <= SMALL["head_dim"])
    fields["head_dim"] = maybe(*RARE_DIMS, share=0 if small else 0.05) or random.choice(dims)
    if fields["kv_bits"] is not None:
        width = fields["head_dim"]
        fields["kv_group"] = random.choice([g for g in KV_GROUPS if width % g == 0])
        dims = tuple(dim for dim in dims if dim % fields["kv_group"] == 0)
    fields["value_head_dim"] = maybe(*dims)
    if fields["rope"]:
        fields["rope_dims"] = maybe(2, 8, share=0.3)
    score, mask = functions()
    fields["score_mod"] = maybe(*score, share=0.15)
    fields["softcap"] = None if fields["score_mod"] else maybe(1.0, 30.0)
    fields["mask_mod"] = maybe(*mask, share=0.15)
    if not fields["varlen"]:
        fields["kv_lens"] = maybe(True, default=False)
        fields["bias"] = maybe(True, default=False)
        fields["array_mask"] = maybe(True, default=False)
        fields["max_work"] = maybe(MIN_WORK, share=0.1)
        fields["block_mask"] = fields["mask_mod"] is not None and random.random() < 0.5
    return AttentionConfig(**fields)


def _with_more(random: Random, config: AttentionConfig) -> AttentionConfig:
    """A config with newer features, drawn apart, so that a number stands for what it always did."""
    changes: dict[str, Any] = {"kv_starts": random.random() < 0.2}
    changes["q_offset"] = random.random() < 0.2 and not config.block_mask
    changes["seqused_q"] = random.random() < 0.15
    changes["alibi_by_sequence"] = config.alibi and random.random() < 0.5
    changes["rope_fixed"] = config.rope is not None and random.random() < 0.3
    if config.page_size is not None and random.random() < 0.2:
        changes["page_size"] = random.choice((264, 512, 4096))
    if config.kv_bits is not None and random.random() < 0.4:
        changes["value_bits"] = random.choice(KV_BITS)
        groups = [group for group in KV_GROUPS if config.v_dim % group == 0]
        changes["value_group"] = random.choice(groups)
    quantized_pages = config.page_size is not None and config.kv_bits is not None
    if config.array_mask and config.mask_mod is None and not quantized_pages:  # too many buffers
        changes["block_mask"] = random.random() < 0.5
    changes["rope_tables"] = config.rope is not None and random.random() < 0.3
    return replace(config, **changes)


def _schedule(
    random: Random, config: AttentionConfig, limits: Limits, family: str, small: bool
) -> Schedule:
    """Any schedule that a search may try; the default one where what was chosen does not fit."""
    declared = space(config, limits, family, math_modes=("safe", "relaxed", "fast"))
    if random.random() < 0.1:
        return declared.default
    for _ in range(20):
        point: dict[str, Any] = {}
        for parameter in declared.parameters:
            values = parameter.values(point)
            if small and parameter.name in SMALL:
                values = tuple(x for x in values if x <= SMALL[parameter.name]) or values[:1]
            point[parameter.name] = random.choice(values)
        found = declared.schedule(point)
        if declared.valid(found):
            return found
    return declared.default


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less: a feature, a schedule's choice, or half of a size."""
    config = case.config
    for field in dataclasses.fields(config):
        changes: dict[str, Any] = {field.name: field.default}
        if "mask" in field.name:
            changes["block_mask"] = False
        if field.default is dataclasses.MISSING or getattr(config, field.name) == field.default:
            continue
        try:
            yield replace(case, config=replace(config, **changes))
        except ArgumentError:
            continue
    for name, knob in case.schedule.knobs.items():
        if not knob.is_required and getattr(case.schedule, name) != knob.default:
            changes = {name: knob.default}
            yield replace(case, schedule=replace(case.schedule, **changes))
    least = 1 if config.block_mask else 0
    for name, low in (("batch", 1), ("kv_heads", 1), ("q_len", least), ("kv_len", least)):
        changes = {name: max(low, getattr(case, name) // 2)}
        if changes[name] != getattr(case, name):
            yield replace(case, **changes)


def smallest(case: Case, fails: Callable[[Case], bool], attempts: int = 60) -> Case:
    """A case that fails, too, from which nothing can be taken; or the last after some attempts."""
    progress = True
    while progress and attempts:
        progress = False
        for candidate in simpler(case):
            if attempts == 0:
                break
            attempts -= 1
            try:
                failed = fails(candidate)
            except InvalidSchedule:
                continue
            if failed:
                case, progress = candidate, True
                break
    return case


def fault(device: Device, case: Case) -> str:
    """What is wrong with a case's output and log-sum-exp; nothing where all is right."""
    config = case.config
    q, k, v, inputs = case.call()
    scale = config.head_dim**-0.5
    with marked_outputs():
        out, lse = device.build(config, case.schedule)(q, k, v, scale, inputs)
    features = config_features(config) | {"inputs": inputs}
    expected, expected_lse = attention_float64(q, k, v, scale=scale, **features)
    if out.dtype != q.dtype or out.shape != expected.shape:
        return f"{out.dtype} {out.shape}, not {q.dtype} {expected.shape}"
    plain, _ = attention_mlx(q, k, v, scale=scale, **features)
    most = min(MOST_FOR_FUNCTIONS, FUNCTION_FACTOR * relative_error(plain, expected))
    tolerance = max(tolerance_of(config), most) + _smallest(config, expected)
    error = relative_error(out, expected)
    if not error <= tolerance:
        return f"relative error {error:.2e}, not {tolerance:.2e} or less"
    if config.return_lse != (lse is not None):
        return "a log-sum-exp" if lse is not None else "no log-sum-exp"
    return "" if lse is None else lse_fault(lse, expected_lse, lse_tolerance(config))


def _smallest(config: AttentionConfig, expected: Any) -> float:
    """The relative error of an output that is not more than float16's subnormal numbers.

    Weights are rounded to multiples of 2**-24, and divided by the share that dropout keeps; values
    are below 4. Where nearly all weights are dropped, nothing else may be left.
    """
    norm = float(np.linalg.norm(expected))
    if config.dtype != "float16" or not norm:
        return 0.0
    return 4 * 2.0**-24 / (1 - config.dropout) * math.sqrt(expected.size) / norm


def hostile(case: Case, seed: int) -> Inputs:
    """A case's inputs, with anything in the arrays that say where things are."""
    _, _, _, inputs = case.call()
    choices = np.random.default_rng(seed)
    changed: dict[str, Any] = {}
    for name in HOSTILE:
        array = getattr(inputs, name)
        if array is not None:
            numbers = choices.choice(np.array(HOSTILE_NUMBERS, np.int32), array.shape)
            if name.endswith("_offset"):  # they are added to, and read nothing
                numbers = numbers // 2
            kept = choices.random(array.shape) < choices.choice([0.0, 0.5])
            changed[name] = mx.array(np.where(kept, np.array(array), numbers))
    return replace(inputs, **changed)


def default_case(config: AttentionConfig, limits: Limits, family: str, **sizes: int) -> Case:
    """A case of the default schedule, of sizes that no tile divides."""
    schedule = default_schedule(config, limits, family)
    q_len = 3 if get_attention(family).head_rows else schedule.bq + 5
    chosen = {"batch": 4, "kv_heads": 2, "q_len": q_len, "kv_len": 2 * schedule.bk + 3, "seed": 0}
    return Case(config, schedule, family, **(chosen | sizes))
