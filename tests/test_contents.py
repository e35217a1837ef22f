"""Contents of arrays, looked at when asked for."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.contents import check_contents
from metalgen.errors import ArgumentError
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs, check_call
from metalgen.problem.samples import sample_call

PACKED = AttentionConfig(32, varlen=True, alibi=True, sinks=True)
PAGED = AttentionConfig(32, page_size=8, rope="half")
LENGTHS = AttentionConfig(32, kv_lens=True, bias=True)

WRONG: dict[str, tuple[AttentionConfig, dict[str, Any], str]] = {
    "packed queries that start later": (
        PACKED,
        {"cu_q": [2, 3, 4]},
        "cu_q[0]: expected 0, the first start, but got 2",
    ),
    "packed queries that descend": (
        PACKED,
        {"cu_q": [0, 3, 2]},
        "cu_q[2]: expected 3 or more, as cu_q[1] is, but got 2",
    ),
    "packed queries after the last row": (
        PACKED,
        {"cu_q": [0, 3, 15]},
        "cu_q[2]: expected at most 14, the rows of q, but got 15",
    ),
    "packed keys that are negative": (
        PACKED,
        {"cu_k": [0, -4, 2]},
        "cu_k[1]: expected 0 or more, as cu_k[0] is, but got -4",
    ),
    "packed keys after the last": (
        PACKED,
        {"cu_k": [0, 100, 100]},
        "cu_k[1]: expected at most 34, the rows of k, but got 100",
    ),
    "a negative length": (
        LENGTHS,
        {"kv_lens": [3, -1]},
        "kv_lens[1]: expected 0 to 20 (keys of k), but got -1",
    ),
    "a length above the keys": (
        LENGTHS,
        {"kv_lens": [21, 0]},
        "kv_lens[0]: expected 0 to 20 (keys of k), but got 21",
    ),
    "a length above the pages": (
        PAGED,
        {"kv_lens": [25, 0]},
        "kv_lens[0]: expected 0 to 24 (keys of the block table's pages), but got 25",
    ),
    "a page that is none": (
        PAGED,
        {"kv_lens": [9, 24], "block_table": [[0, 1, 99], [2, -1, 7]]},
        "block_table[1, 2]: expected a page from 0 to 4, or -1 for keys that are not seen, "
        "but got 7",
    ),
    "a page of minus two": (
        PAGED,
        {"kv_lens": [9, 24], "block_table": [[0, -2, 99], [2, -1, 1]]},
        "block_table[0, 1]: expected a page from 0 to 4, or -1 for keys that are not seen, "
        "but got -2",
    ),
    "a position before the first": (
        PAGED,
        {"rope_offset": [0, -3]},
        "rope_offset[1]: expected a position, 0 or more, but got -3",
    ),
    "frequencies that are not finite": (
        PAGED,
        {"rope_freqs": np.array([1.0, np.inf] + 14 * [0.5], np.float32)},
        "rope_freqs[1]: expected a finite number, but got inf",
    ),
    "slopes that are no numbers": (
        PACKED,
        {"alibi_slopes": np.array([0.5, np.nan], np.float32)},
        "alibi_slopes[1]: expected a finite number, but got nan",
    ),
    "sinks that swallow everything": (
        PACKED,
        {"sinks": np.array([np.inf, -np.inf], np.float32)},
        "sinks[0]: expected a finite number or -inf, but got inf",
    ),
    "a bias that is no number": (
        LENGTHS,
        {"bias": np.array([0.0, np.nan], np.float32).reshape(2, 1, 1, 1)},
        "bias[1, 0, 0, 0]: expected a finite number or -inf, but got nan",
    ),
}


def arrays(config: AttentionConfig) -> tuple[mx.array, mx.array, mx.array, Inputs]:
    call = sample_call(config, batch=2, q_len=11, kv_len=20, seed=1)
    check_call(config, *call)
    return call


@pytest.mark.parametrize("config", [PACKED, PAGED, LENGTHS], ids=str)
def test_good_contents_pass(config: AttentionConfig) -> None:
    q, k, _, inputs = arrays(config)
    check_contents(config, q, k, inputs)


@pytest.mark.parametrize("name", WRONG)
def test_the_error_names_the_element_what_was_expected_and_what_came(name: str) -> None:
    config, contents, message = WRONG[name]
    q, k, v, inputs = arrays(config)
    wrong: dict[str, Any] = {n: mx.array(x) for n, x in contents.items()}
    inputs = dataclasses.replace(inputs, **wrong)
    if "cu_q" in contents or "cu_k" in contents:
        q, k = mx.zeros((1, 2, 14, 32), q.dtype), mx.zeros((1, 2, 34, 32), k.dtype)
        v = k
    if config is PAGED:
        k = v = mx.zeros((5, 2, 8, 32), k.dtype)
    check_call(config, q, k, v, inputs)
    with pytest.raises(ArgumentError) as caught:
        check_contents(config, q, k, inputs)
    assert str(caught.value) == message


def test_a_bias_of_minus_infinity_masks() -> None:
    q, k, _, inputs = arrays(LENGTHS)
    bias = mx.full((1, 1, 1, 20), -float("inf"), mx.float16)
    check_contents(LENGTHS, q, k, dataclasses.replace(inputs, bias=bias))


def test_table_entries_beyond_the_lengths_are_not_looked_at() -> None:
    q, k, _, inputs = arrays(PAGED)
    table = mx.array([[0, 99, -7], [99, 99, 99]])
    lengths = mx.array([8, 0])
    check_contents(PAGED, q, k, dataclasses.replace(inputs, block_table=table, kv_lens=lengths))
