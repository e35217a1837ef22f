"""What user functions cost: every operation has a price, and a launch pays it once a score."""

from __future__ import annotations

import dataclasses

import mlx.core as mx
import pytest

from metalgen.chips import get_chip
from metalgen.chips.counts import covers
from metalgen.chips.functions import GUESSED, MEASURED, NOTHING, FunctionCost, function_cost
from metalgen.chips.model import predict
from metalgen.chips.work import forward_work
from metalgen.dsl.operations import ARITY
from metalgen.dsl.trace import trace
from metalgen.families import default_schedule
from metalgen.families.counts import CallCounts, forward_counts
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig

PLAIN = AttentionConfig(64)
SLOPES = mx.ones((8,))


def biased(score: mx.array, b: mx.array, h: mx.array, q: mx.array, kv: mx.array) -> mx.array:
    return score + SLOPES[h] * (kv - q).astype(mx.float32)


def squashed(score: mx.array, b: mx.array, h: mx.array, q: mx.array, kv: mx.array) -> mx.array:
    return 20.0 * mx.tanh(score / 20.0)


def near(b: mx.array, h: mx.array, q: mx.array, kv: mx.array) -> mx.array:
    return mx.abs(q - kv) < 128


def config(score: object = None, mask: object = None) -> AttentionConfig:
    texts = {}
    if score:
        texts["score_mod"] = trace(score, "score_mod").graph.text  # type: ignore[arg-type]
    if mask:
        texts["mask_mod"] = trace(mask, "mask_mod").graph.text  # type: ignore[arg-type]
    return dataclasses.replace(PLAIN, **texts)  # type: ignore[arg-type]


def test_every_operation_has_a_price() -> None:
    assert set(ARITY) <= MEASURED.keys() | GUESSED.keys()
    assert not MEASURED.keys() & GUESSED.keys()
    assert all(cost > 0 for cost in (MEASURED | GUESSED).values())


def test_no_function_costs_nothing() -> None:
    assert function_cost(PLAIN) == NOTHING == FunctionCost(0.0, 0.0, 0.0, 0.0)


def test_a_bias_costs_a_difference_a_conversion_a_product_and_a_sum() -> None:
    # The slope is a head's: loaded once a kernel, or once a row where rows are of several heads.
    assert function_cost(config(biased)) == FunctionCost(0, 1 + 1 + 4 + 1 + 1, 0, 0)
    assert function_cost(config(biased), packed=True) == FunctionCost(8, 8, 1, 0)


def test_a_mask_costs_its_test_and_its_choice() -> None:
    assert function_cost(config(mask=near)).element == 2 + 3  # difference, magnitude, comparison


def test_a_launch_pays_a_function_for_each_score_of_a_lane() -> None:
    def arithmetic(of: AttentionConfig) -> float:
        schedule = default_schedule(PLAIN)
        counts = forward_counts(of, schedule, batch_heads=8, q_len=512, kv_len=512)
        return forward_work(of, schedule, CallCounts(counts, 8, 512), 512).arithmetic

    scores = 8 * 512 * 512 / 32
    assert arithmetic(config(biased)) - arithmetic(PLAIN) == pytest.approx(8 * scores)


def test_functions_make_a_launch_slower_by_what_they_cost() -> None:
    schedule = default_schedule(PLAIN)
    times = [
        predict(Problem(of, 32, 4096, 4096), schedule, get_chip("M1Max")).seconds
        for of in (PLAIN, config(mask=near), config(biased), config(squashed))
    ]
    assert times == sorted(times)
    assert times[3] > 1.1 * times[0]  # division and tanh of each score


def test_a_field_that_is_not_counted_is_named_and_noted() -> None:
    assert covers(config(biased, near)) is None
    other = dataclasses.replace(PLAIN, alibi=True, page_size=16)
    assert covers(other) == "the model ignores alibi=True, page_size=16"
    got = predict(Problem(other, 8, 512, 512), default_schedule(PLAIN), get_chip("M3Max"))
    plain = predict(Problem(PLAIN, 8, 512, 512), default_schedule(PLAIN), get_chip("M3Max"))
    assert (got.note, plain.note) == (covers(other), "")
    assert got.seconds == plain.seconds


def test_whatever_is_not_known_to_be_counted_is_not_covered() -> None:
    counted = {"head_dim", "dtype", "value_head_dim", "heads_per_kv", "causal", "return_lse"}
    counted |= {"window_left", "window_right", "softcap", "score_mod", "mask_mod"}
    values = {"bool": True, "float": 0.5, "int | None": 16, "str | None": "half"}
    for field in dataclasses.fields(AttentionConfig):
        if field.name in counted or field.name in ("block_mask", "others"):
            continue
        bare = object.__new__(AttentionConfig)  # no rule of a config is at issue here
        for other in dataclasses.fields(AttentionConfig):
            object.__setattr__(bare, other.name, getattr(PLAIN, other.name))
        object.__setattr__(bare, field.name, values.get(str(field.type), 32))
        assert field.name in (covers(bare) or ""), field.name
