"""What features cost, in the simulator's counts: 2048 queries and keys, width 128, half."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen import AttentionConfig, simulator
from metalgen.devices import get_device
from metalgen.dsl.trace import trace
from metalgen.families import Schedule, default_schedule
from metalgen.problem.inputs import Inputs
from metalgen.problem.samples import sample_call

LENGTH, DIM = 2048, 128
PLAIN = AttentionConfig(DIM)
PLAIN_64 = AttentionConfig(64)
CAUSAL = AttentionConfig(DIM, causal=True)
SCHEDULE = default_schedule(CAUSAL)


def counted(
    config: AttentionConfig,
    schedule: Schedule = SCHEDULE,
    family: str = "forward",
    *,
    q_len: int = LENGTH,
    kv_len: int = LENGTH,
    inputs: Inputs | None = None,
) -> Any:
    """What a call on one KV head does, counted; no finding of the checker is let pass."""
    q, k, v, made_up = sample_call(config, kv_heads=1, q_len=q_len, kv_len=kv_len, ragged=False)
    run = get_device("simulator").build(config, schedule)
    with simulator.record(checked=True, raise_on_findings=True) as runs:
        mx.eval(run(q, k, v, 0.1, inputs or made_up)[0])
    return runs[0].counters


@functools.cache
def plain() -> Any:
    return counted(PLAIN)


@functools.cache
def causal() -> Any:
    return counted(CAUSAL)


def own_bytes(counters: Any, *names: str) -> int:
    return sum(counters.buffer(name).bytes_read for name in names)


@pytest.mark.parametrize(
    ("feature", "arrays"),
    [({"softcap": 50.0}, ()), ({"alibi": True}, ("alibi_slopes",)), ({"sinks": True}, ("sinks",))],
)
def test_features_of_scores_add_no_bytes_but_their_own_and_no_barrier(
    feature: dict[str, Any], arrays: tuple[str, ...]
) -> None:
    found = counted(AttentionConfig(DIM, **feature))
    own = own_bytes(found, *arrays)
    lanes = LENGTH // SCHEDULE.bq * SCHEDULE.threads
    assert own == (4 * lanes if arrays else 0)
    assert found.device_read - own == plain().device_read
    assert found.device_written == plain().device_written
    assert found.barriers == plain().barriers
    assert found.multiply_accumulates == plain().multiply_accumulates


def test_a_score_function_adds_no_bytes_but_its_own_and_no_barrier() -> None:
    slopes = mx.arange(8).astype(mx.float32)
    score = trace(lambda s, b, h, i, j: 50 * mx.tanh(s / 50) + slopes[h] * (j - i))
    given = Inputs(score=score.arrays)
    found = counted(AttentionConfig(DIM, score_mod=score.graph.text), inputs=given)
    own = found.buffer("score_captured_0")
    assert 0 < own.distinct_read <= 4 * 8
    assert found.device_read - own.bytes_read == plain().device_read
    assert found.device_written == plain().device_written
    assert found.barriers == plain().barriers
    assert found.multiply_accumulates == plain().multiply_accumulates


def test_a_window_of_256_adds_nothing_and_computes_less_than_a_third_of_causal() -> None:
    found = counted(AttentionConfig(DIM, causal=True, window_left=255))
    assert found.multiply_accumulates <= 0.3 * causal().multiply_accumulates
    assert found.device_read <= 0.3 * causal().device_read
    assert found.barriers <= 0.3 * causal().barriers


@pytest.mark.parametrize(
    ("family", "page_size"), [("forward", 8), ("forward", 256), ("decode", 8), ("decode", 64)]
)
def test_paged_keys_take_at_most_three_per_cent_more_bytes(page_size: int, family: str) -> None:
    paged = AttentionConfig(DIM, causal=True, page_size=page_size)
    schedule, q_len = SCHEDULE, LENGTH
    if family == "decode":
        schedule, q_len = default_schedule(CAUSAL, family="decode"), 8
    dense = causal() if family == "forward" else counted(CAUSAL, schedule, family, q_len=q_len)
    found = counted(paged, schedule, family, q_len=q_len)
    for got, expected in (
        (found.device_read, dense.device_read),
        (found.threadgroup_read, dense.threadgroup_read),
        (found.threadgroup_written, dense.threadgroup_written),
    ):
        assert expected <= got <= 1.03 * expected
    assert found.barriers == dense.barriers
    assert found.multiply_accumulates == dense.multiply_accumulates


@pytest.mark.parametrize(("family", "q_len"), [("forward", 64), ("decode", 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_a_batch_padded_on_the_left_by_half_computes_half(
    family: str, q_len: int, causal: bool
) -> None:
    """Eight sequences that begin at keys 0 to 1024, a seventh of that apart."""
    length, starts = 1024, mx.array([1024 * n // 7 for n in range(8)], mx.int32)
    found = []
    for given in (None, starts):
        config = AttentionConfig(64, causal=causal, kv_starts=given is not None)
        sizes = {"q_len": q_len, "kv_len": length, "batch": 8, "kv_heads": 1}
        q, k, v, _ = sample_call(PLAIN_64, **sizes, ragged=False)
        run = get_device("simulator").build(config, default_schedule(config, family=family))
        with simulator.record(checked=True, raise_on_findings=True) as runs:
            mx.eval(run(q, k, v, 0.1, Inputs(kv_starts=given))[0])
        found.append(runs[0].counters)
    assert found[1].multiply_accumulates <= 0.55 * found[0].multiply_accumulates
    for name in ("k", "v"):
        assert found[1].buffer(name).bytes_read <= 0.55 * found[0].buffer(name).bytes_read


def test_decode_with_eight_heads_a_kv_head_reads_keys_and_values_once() -> None:
    config = AttentionConfig(DIM, heads_per_kv=8)
    found = counted(config, default_schedule(config, family="decode"), "decode", q_len=1)
    for name in ("k", "v"):
        assert found.buffer(name).bytes_read == found.buffer(name).distinct_read == LENGTH * DIM * 2


def test_quantized_keys_are_read_as_they_are_stored() -> None:
    """4 bits in groups of 64, with a scale and a bias of 16 bits each: 9/32 of half's bytes."""
    config = AttentionConfig(DIM, heads_per_kv=8, kv_bits=4)
    found = counted(config, default_schedule(config, family="decode"), "decode", q_len=1)
    for name in ("k", "v"):
        assert found.buffer(name).bytes_read == LENGTH * DIM // 2
        assert found.buffer(f"{name}_scales").distinct_read == LENGTH * DIM // 64 * 2


def test_packed_sequences_compute_their_own_blocks_only() -> None:
    """Two sequences of half the length: half of the products, and of the keys' bytes."""
    config = AttentionConfig(DIM, varlen=True)
    q, k, v, _ = sample_call(PLAIN, kv_heads=1, q_len=LENGTH, kv_len=LENGTH, ragged=False)
    starts = mx.array([0, LENGTH // 2, LENGTH], mx.int32)
    run = get_device("simulator").build(config, SCHEDULE)
    with simulator.record(checked=True, raise_on_findings=True) as runs:
        mx.eval(run(q, k, v, 0.1, Inputs(cu_q=starts, cu_k=starts))[0])
    found = runs[0].counters
    assert 2 * found.multiply_accumulates == plain().multiply_accumulates
    assert 2 * found.buffer("k").bytes_read == plain().buffer("k").bytes_read


def test_keys_beyond_the_lengths_and_pages_that_are_none_cost_nothing() -> None:
    config = AttentionConfig(DIM, page_size=64)
    q, k, v, given = sample_call(config, kv_heads=1, q_len=LENGTH, kv_len=LENGTH, ragged=False)
    assert given.block_table is not None
    table = np.array(given.block_table)
    table[:, 8:16] = -1
    given = replace(given, kv_lens=mx.array([LENGTH // 2], mx.int32), block_table=mx.array(table))
    run = get_device("simulator").build(config, SCHEDULE)
    with simulator.record(checked=True, raise_on_findings=True) as runs:
        mx.eval(run(q, k, v, 0.1, given)[0])
    found = runs[0].counters
    assert 4 * found.multiply_accumulates == plain().multiply_accumulates
    assert 4 * found.buffer("k").bytes_read == plain().buffer("k").bytes_read
