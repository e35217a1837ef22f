"""The closed form of a launch's work, against loops written out and against hand calculation."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metalgen.errors import InvalidSchedule
from metalgen.families import Limits, Schedule, default_schedule, threadgroup_bytes
from metalgen.families.counts import (
    Counts,
    combine_counts,
    decode_counts,
    floor_sum,
    forward_counts,
    pass_sums,
)
from metalgen.problem.config import AttentionConfig


@given(st.integers(0, 40), st.integers(0, 60), st.integers(0, 60), st.integers(1, 50))
def test_floor_sum_is_the_sum_of_floors(count: int, step: int, start: int, divisor: int) -> None:
    expected = sum((start + n * step) // divisor for n in range(count))
    assert floor_sum(count, step, start, divisor) == expected


@settings(max_examples=2000)
@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.sampled_from([8, 16, 24, 32, 64, 128]),
    st.sampled_from([8, 16, 24, 32, 64]),
    st.none() | st.integers(0, 400),
    st.none() | st.integers(0, 400),
)
def test_pass_sums_are_what_the_loops_of_the_kernel_do(
    q_len: int, kv_len: int, rows: int, bk: int, left: int | None, right: int | None
) -> None:
    passes = keys = 0
    for first in range(0, q_len, rows):
        last = min(first + rows, q_len) - 1
        begin = 0 if left is None else max(0, first + kv_len - q_len - left)
        end = kv_len if right is None else min(kv_len, last + kv_len - q_len + right + 1)
        for k0 in range(begin // bk * bk, end, bk):
            passes += 1
            keys += min(bk, kv_len - k0)
    assert pass_sums(q_len, kv_len, rows, bk, left, right) == (passes, keys)


def test_a_causal_window_of_two_keys_counts_as_by_hand() -> None:
    config = AttentionConfig(8, causal=True, window_left=1, window_right=5, softcap=20.0)
    schedule = Schedule(bq=16, bk=8, bd=8, simdgroups=2)
    # Rows 0..15 see keys 0..15, rows 16..31 keys 15..31: 2 and 3 passes; a simdgroup of rows
    # 0..7 1 pass, others 2 (the key before their own, and their own eight).
    got = forward_counts(config, schedule, batch_heads=1, q_len=32, kv_len=32)
    assert (got.group_passes, got.live_passes) == (2 + 3, 1 + 2 + 2 + 2)
    assert got.k_read == got.v_read == (16 + 24) * 8 * 2
    # A lane of a pass: two scores, an exp2 each for softcap and for softmax, and one to rescale.
    assert got.exponentials == 7 * 32 * (2 * 2 + 1)
    assert got.shuffles == 2 * (7 + 4)  # a row's maximum in each pass, its sum at the end
    # In float32 a hyperbolic tangent caps; a score so bounded needs no maximum: nothing rescales.
    exact = dataclasses.replace(config, dtype="float32")
    got = forward_counts(exact, schedule, batch_heads=1, q_len=32, kv_len=32)
    assert (got.exponentials, got.shuffles) == (7 * 32 * 2, 2 * 4)


def test_a_schedule_for_cuda_is_refused() -> None:
    schedule = default_schedule(AttentionConfig(64), Limits(232448, 1024, "cuda"))
    with pytest.raises(InvalidSchedule, match="Metal"):
        forward_counts(AttentionConfig(64), schedule, batch_heads=1, q_len=32, kv_len=32)


def test_the_default_schedule_at_128_queries_and_keys_counts_as_by_hand() -> None:
    config = AttentionConfig(64, return_lse=True)
    schedule = default_schedule(config)
    assert str(schedule) == "64x32x64 sg4x2 q:reg k:tg v:tg buf1 w8"
    # 3 heads of 2 tiles of 64 rows; 4 passes of 32 keys; 4 simdgroups of 2 blocks of 8 rows.
    assert forward_counts(config, schedule, batch_heads=3, q_len=128, kv_len=128) == Counts(
        groups=6,
        simdgroups=24,
        group_passes=24,
        live_passes=96,
        multiply_accumulates=96 * 2 * 4 * (8 + 8),
        q_read=3 * 128 * 64 * 2,
        k_read=6 * 128 * 64 * 2,
        v_read=6 * 128 * 64 * 2,
        out_written=3 * 128 * 64 * 2,
        lse_written=3 * 128 * 4,
        threadgroup_read=96 * 32 * 64 * 2 * 2,
        threadgroup_written=24 * 32 * 64 * 2 * 2,
        threadgroup_memory=32 * (64 + 8) * 2,
        exponentials=96 * 32 * 2 * (4 * 2 + 1),
        shuffles=2 * 2 * (96 + 24),
        barriers=24 * 2 * 2 * 4,
        simdgroup_barriers=0,
    )


def test_a_ragged_causal_launch_with_direct_keys_counts_as_by_hand() -> None:
    config = AttentionConfig(20, "float32", value_head_dim=9, heads_per_kv=2, causal=True)
    schedule = Schedule(
        bq=16,
        bk=16,
        bd=8,
        simdgroups=2,
        q_source="threadgroup",
        k_source="device",
        buffers=2,
        load_width=4,
    )
    # 20 queries beside the last 20 of 30 keys: tiles of rows 0..15 and 16..19 see up to 26 and 30
    # keys, 2 passes each; simdgroups end at rows 7, 15, 19 (the fourth has none) and see up to 18,
    # 26 and 30 keys, 2 passes each.
    got = forward_counts(config, schedule, batch_heads=4, q_len=20, kv_len=30)
    assert got == Counts(
        groups=4 * 2,
        simdgroups=4 * 4,
        group_passes=4 * 4,
        live_passes=4 * 6,
        multiply_accumulates=24 * 2 * (3 + 2),
        q_read=4 * 32 * 20 * 4,
        k_read=24 * 16 * 20 * 4,
        v_read=4 * (2 + 2) * 16 * 9 * 4,  # a pass reads the last key again where there is none
        out_written=4 * 20 * 9 * 4,
        lse_written=0,
        threadgroup_read=24 * 16 * 16 * 4 + 24 * 8 * 24 * 4,
        threadgroup_written=16 * 16 * 16 * 4 + 8 * 16 * 24 * 4,
        threadgroup_memory=threadgroup_bytes(config, schedule),
        exponentials=24 * 32 * (2 * 2 + 1),
        shuffles=2 * (24 + 16),
        barriers=16 * 2 * 2,
        simdgroup_barriers=16,
    )
    assert got.device_read == got.q_read + got.k_read + got.v_read
    assert got.device_written == got.out_written


def test_queries_before_the_first_key_make_no_pass() -> None:
    config = AttentionConfig(64, causal=True)
    schedule = default_schedule(config)
    # 200 queries, 8 keys: only the last 8 queries see any, in the last of 4 tiles.
    got = forward_counts(config, schedule, batch_heads=1, q_len=200, kv_len=8)
    assert (got.groups, got.group_passes, got.live_passes) == (4, 1, 1)
    assert got.k_read == 32 * 64 * 2  # the pass asks for all of its rows


def test_a_decode_launch_counts_as_by_hand() -> None:
    config = AttentionConfig(64, heads_per_kv=4, causal=True, window_left=40)
    schedule = Schedule(
        bq=8,
        bk=8,
        bd=64,
        simdgroups=1,
        k_source="device",
        v_source="device",
        splits=2,
        family="decode",
    )
    # 2 KV heads, 3 queries each of 4 heads: 12 rows in 2 tiles, each in 2 splits. The first query
    # stands beside key 97 of 100 and sees keys from 57 on; passes begin at key 56: 44 keys, 6
    # passes.
    got = decode_counts(config, schedule, batch_heads=8, q_len=3, kv_len=100)
    assert (got.groups, got.group_passes, got.live_passes) == (2 * 2 * 2, 4 * 6, 4 * 6)
    assert got.multiply_accumulates == 24 * (8 + 8)
    assert got.k_read == got.v_read == 24 * 8 * 64 * 2  # whole passes: past the end the last key
    assert got.q_read == 8 * 8 * 64 * 2
    assert got.out_written == 2 * 24 * 64 * 4  # each split writes float32
    assert got.lse_written == 2 * 24 * 8  # an exponent and a sum
    assert got.exponentials == 24 * 32 * (2 + 1)  # none at the stores: both go out as they are


def test_joining_three_splits_counts_as_by_hand() -> None:
    config = AttentionConfig(16, value_head_dim=24, heads_per_kv=4, return_lse=True)
    schedule = dataclasses.replace(default_schedule(config, family="decode"), splits=3)
    got = combine_counts(config, schedule, batch_heads=8, q_len=5)
    assert got.threads == 8 * 5 * 24
    assert got.parts_read == 3 * 8 * 5 * 24 * 4
    # by every thread: the exponent for the maximum, then both numbers for the weight
    assert got.sums_read == 3 * 3 * 8 * 5 * 24 * 4
    assert got.exponentials == 3 * 8 * 5 * 24
    assert (got.out_written, got.lse_written) == (8 * 5 * 24 * 2, 8 * 5 * 4)


def test_shares_of_the_values_repeat_the_scores() -> None:
    config = AttentionConfig(64, value_head_dim=512, causal=True)
    whole = default_schedule(config)
    assert whole.value_parts == 2
    got = forward_counts(config, whole, batch_heads=3, q_len=100, kv_len=100)
    half = dataclasses.replace(config, value_head_dim=256)
    one = dataclasses.replace(whole, value_parts=1)
    expected = forward_counts(half, one, batch_heads=6, q_len=100, kv_len=100)
    assert got == expected._replace(lse_written=got.lse_written)
