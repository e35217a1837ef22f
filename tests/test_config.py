from __future__ import annotations

import dataclasses
import pickle
import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metalgen import ArgumentError, AttentionConfig, Rope
from metalgen.families.sizes import Problem, bucket
from metalgen.problem.config import field_names

configs = st.builds(
    AttentionConfig,
    head_dim=st.integers(8, 256),
    dtype=st.sampled_from(["float16", "bfloat16", "float32"]),
    value_head_dim=st.none() | st.integers(8, 256),
    heads_per_kv=st.integers(1, 64),
    causal=st.booleans(),
    return_lse=st.booleans(),
)


def test_a_key_is_canonical_json_without_defaults() -> None:
    assert AttentionConfig(64).key == '{"dtype":"float16","head_dim":64}'
    assert (
        AttentionConfig(128, "bfloat16", value_head_dim=64, heads_per_kv=4, causal=True).key
        == '{"causal":true,"dtype":"bfloat16","head_dim":128,"heads_per_kv":4,"value_head_dim":64}'
    )


def test_one_problem_has_one_spelling() -> None:
    plain = AttentionConfig(64, "float16")
    assert AttentionConfig(64, mx.float16) == plain  # type: ignore[arg-type]
    assert AttentionConfig(64, value_head_dim=64) == plain
    assert hash(AttentionConfig(64, value_head_dim=64)) == hash(plain)


@given(configs)
def test_json_round_trips(config: AttentionConfig) -> None:
    assert AttentionConfig.from_json(config.key) == config


@given(configs, configs)
def test_keys_differ_exactly_when_configs_do(a: AttentionConfig, b: AttentionConfig) -> None:
    assert (a.key == b.key) == (a == b)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_dim": 7}, "head_dim: expected an integer from 8 to 576, but got 7"),
        ({"head_dim": 64.0}, "head_dim: expected an integer from 8 to 576, but got 64.0"),
        ({"head_dim": True}, "head_dim: expected an integer from 8 to 576, but got True"),
        (
            {"head_dim": 64, "dtype": "int8"},
            "dtype: expected one of float32, float16, bfloat16, but got 'int8'",
        ),
        (
            {"head_dim": 64, "value_head_dim": 577},
            "value_head_dim: expected an integer from 8 to 576, but got 577",
        ),
        (
            {"head_dim": 64, "heads_per_kv": 0},
            "heads_per_kv: expected an integer from 1 to 1024, but got 0",
        ),
        ({"head_dim": 64, "causal": 1}, "causal: expected True or False, but got 1"),
        ({"dtype": "float16"}, "config: expected a field head_dim, but got ['dtype']"),
    ],
)
def test_a_bad_field_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        AttentionConfig.from_dict(fields)
    assert str(caught.value) == message


ODD: tuple[Any, ...] = (None, True, 0, -1, 8, 16, 64, 577, 0.5, float("nan"), 10**400, "half", "x")
ODD += (b"x", (), [], {}, [64], np.int64(64), np.array([1, 2]), mx.array(3), mx.float16, object())
ODD += ("0=score:float32()", "0=q:int32();1=kv:int32();2=less:bool(0,1)")


def test_any_value_of_any_field_is_kept_or_refused_by_name() -> None:
    names = field_names()
    kept = 0
    for seed in range(3000):
        choices = random.Random(seed)
        fields = {"head_dim": choices.choice([32, 64, 72])}
        for _ in range(choices.randint(1, 3)):
            fields[choices.choice(names)] = choices.choice(ODD)
        try:
            config = AttentionConfig.from_dict(fields)
        except ArgumentError as error:
            assert error.argument in names, fields
            continue
        kept += 1
        assert AttentionConfig.from_json(config.key) == config == dataclasses.replace(config)
        assert pickle.loads(pickle.dumps(config)) == config and str(config)
    assert kept > 100


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dims": 1 << 40}, "rope.dims: expected an integer from 2 to 576, or None"),
        ({"dims": 7}, "rope.dims: expected an even number"),
        ({"scale": 10**400}, "rope.scale: expected a finite number above 0"),
        ({"base": mx.array(2.0)}, "rope.base: expected a finite number above 0"),
    ],
)
def test_a_bad_field_of_a_rope_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        Rope(**fields)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"head_dim":64,"evil":1}', "[" * 100000])
def test_json_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(ArgumentError, match=r"^config: expected"):
        AttentionConfig.from_json(text)


@pytest.mark.parametrize(("n", "power"), [(1, 1), (2, 2), (3, 4), (1000, 1024), (1024, 1024)])
def test_buckets_are_the_next_power_of_two(n: int, power: int) -> None:
    assert bucket(n) == power


def test_a_problem_is_filed_under_its_buckets() -> None:
    config = AttentionConfig(64, heads_per_kv=3)
    problem = Problem(config, 9, 1000, 1025)
    assert problem == Problem(config, 16, 1024, 2048)
    assert problem.key == (
        '{"batch_heads":16,"config":{"dtype":"float16","head_dim":64,"heads_per_kv":3},'
        '"family":"forward","kv_len":2048,"q_len":1024}'
    )
    assert problem.heads == 15  # the multiple of 3 below the bucket
    with pytest.raises(ArgumentError, match="q_len"):
        Problem(config, 1, 0, 1)


def test_a_window_is_named_by_its_ends() -> None:
    assert str(AttentionConfig(64, causal=True, window_left=1023)) == (
        "D64 float16 causal window_left=1023"
    )
    both = AttentionConfig(64, window_left=8, window_right=0)
    assert str(both) == "D64 float16 window_left=8 window_right=0"


def test_values_quantized_as_keys_are_have_one_spelling() -> None:
    alike = AttentionConfig(64, kv_bits=8, kv_group=32)
    assert (
        AttentionConfig(64, kv_bits=8, kv_group=32, value_bits=8, value_group=32).key == alike.key
    )
    apart = AttentionConfig(64, kv_bits=8, kv_group=32, value_bits=4, value_group=64)
    assert apart.key == (
        '{"dtype":"float16","head_dim":64,"kv_bits":8,"kv_group":32,"value_bits":4,"value_group":64}'
    )
    assert AttentionConfig.from_json(apart.key) == apart
    assert str(apart) == "D64 float16 k8:32 v4:64"
    assert (apart.v_bits, apart.v_group, alike.v_bits, alike.v_group) == (4, 64, 8, 32)
    assert apart.kv_row_bytes == 64 + 32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value_bits": 4}, "value_bits: expected None without kv_bits"),
        ({"kv_bits": 8, "value_bits": 3}, "value_bits: expected one of None, 4, 8"),
        ({"kv_bits": 8, "value_group": 16}, "value_group: expected one of None, 32, 64, 128"),
        (
            {"kv_bits": 8, "kv_group": 32, "value_group": 128},
            "value_head_dim: expected a multiple of value_group=128",
        ),
    ],
)
def test_values_that_cannot_be_quantized_so(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=f"^{message}"):
        AttentionConfig(64, **fields)
