"""Calls made up for a config."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metalgen.contents import check_contents
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import check_call
from metalgen.problem.samples import sample_call

EVERYTHING = AttentionConfig(
    64,
    heads_per_kv=2,
    causal=True,
    alibi=True,
    bias=True,
    array_mask=True,
    sinks=True,
    dropout=0.1,
    page_size=8,
    kv_bits=4,
    kv_group=32,
    rope="half",
)
CONFIGS = [
    EVERYTHING,
    AttentionConfig(40),
    AttentionConfig(40, varlen=True, value_head_dim=24),
    AttentionConfig(64, varlen=True, page_size=16),
    AttentionConfig(64, varlen=True, kv_bits=8),
    AttentionConfig(64, kv_lens=True, kv_bits=8, kv_group=32),
]


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_calls_bring_what_the_config_asks_for(
    config: AttentionConfig, batch: int, ragged: bool
) -> None:
    for seed, (q_len, kv_len) in enumerate([(7, 33), (33, 7), (1, 1), (0, 5), (5, 0)]):
        q, k, v, inputs = sample_call(
            config, batch=batch, q_len=q_len, kv_len=kv_len, seed=seed, ragged=ragged
        )
        check_call(config, q, k, v, inputs)
        check_contents(config, q, k, inputs)
        assert sorted(inputs.named) == sorted(each.name for each in config.inputs)


def test_ragged_lengths_have_none_one_and_all() -> None:
    _, _, _, inputs = sample_call(CONFIGS[5], batch=5, q_len=7, kv_len=30, seed=3)
    lengths = np.array(inputs.kv_lens).tolist()
    assert {0, 1, 30} <= set(lengths) and len(lengths) == 5
    _, _, _, inputs = sample_call(CONFIGS[2], batch=5, q_len=7, kv_len=30, seed=3)
    for array, longest in ((inputs.cu_q, 7), (inputs.cu_k, 30)):
        assert {0, 1, longest} <= set(np.diff(np.array(array)).tolist())


def test_even_calls_are_as_long_as_they_may_be() -> None:
    q, k, _, inputs = sample_call(CONFIGS[3], batch=3, q_len=5, kv_len=32, ragged=False)
    assert q.shape == (1, 2, 15, 64) and k.shape == (6, 2, 16, 64)
    assert np.array(inputs.cu_q).tolist() == [0, 5, 10, 15]
    assert np.array(inputs.kv_lens).tolist() == [32] * 3
    assert sorted(np.array(inputs.block_table).ravel().tolist()) == list(range(6))


def test_nothing_is_looked_at_that_is_nan() -> None:
    """NaN lies in every place that no key or query of a sequence has, and nowhere else."""
    q, k, _, inputs = sample_call(CONFIGS[2], batch=4, q_len=7, kv_len=30, seed=1)
    assert inputs.cu_q is not None and inputs.cu_k is not None
    for array, starts in ((q, inputs.cu_q), (k, inputs.cu_k)):
        missing = np.isnan(np.array(array)).any(axis=(0, 1, 3))
        assert missing.any()
        assert np.array_equal(missing, np.arange(array.shape[2]) >= int(starts[-1]))
    _, k, v, inputs = sample_call(AttentionConfig(40, kv_lens=True), batch=4, q_len=7, kv_len=30)
    for array in (k, v):
        missing = np.isnan(np.array(array)).any(axis=(1, 3))
        assert np.array_equal(missing, np.arange(30) >= np.array(inputs.kv_lens)[:, None])


def test_a_seed_gives_the_same_call() -> None:
    calls = [sample_call(EVERYTHING, batch=2, q_len=5, kv_len=20, seed=s) for s in (1, 1, 2)]
    arrays = [[q, k, v, *inputs.arrays] for q, k, v, inputs in calls]
    same = [bool(mx.array_equal(a, b, equal_nan=True)) for a, b in zip(*arrays[:2], strict=True)]
    assert all(same)
    assert not mx.array_equal(arrays[0][0], arrays[2][0])
