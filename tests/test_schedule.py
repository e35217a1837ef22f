from __future__ import annotations

from dataclasses import replace

import pytest

from metalgen import ArgumentError, AttentionConfig, InvalidSchedule, Schedule
from metalgen.families import (
    Limits,
    check_schedule,
    decode_schedule,
    default_schedule,
    is_valid,
    threadgroup_bytes,
)
from metalgen.kinds import MMA, SIMDGROUP

D64 = AttentionConfig(64)
PLAIN = Schedule(bq=64, bk=32, bd=64, simdgroups=4, row_blocks=2)


def test_json_round_trips_and_leaves_defaults_out() -> None:
    schedule = replace(PLAIN, k_source="device", load_width=4)
    assert schedule.to_dict() == {
        "bq": 64,
        "bk": 32,
        "bd": 64,
        "simdgroups": 4,
        "row_blocks": 2,
        "k_source": "device",
        "load_width": 4,
    }
    assert decode_schedule(schedule.to_dict(), "forward", "metal") == schedule
    assert PLAIN.key == '{"bd":64,"bk":32,"bq":64,"row_blocks":2,"simdgroups":4}'


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"bq": "64"}, "bq"),
        ({"bq": True}, "bq"),
        ({"bk": 7}, "bk"),
        ({"q_source": "__import__('os')"}, "q_source"),
        ({"buffers": 1.0}, "buffers"),
        ({"color": 1}, "schedule"),
    ],
)
def test_a_value_outside_the_choices_is_refused(fields: dict[str, object], name: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        decode_schedule(PLAIN.to_dict() | fields, "forward", "metal")
    assert caught.value.argument == name


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"bq": 32}, "bq"),
        ({"bq": 512, "row_blocks": 8, "simdgroups": 8, "bk": 12}, "choices"),
        ({"bd": 72}, "bd"),
        ({"k_source": "device", "v_source": "device", "bd": 32}, "bd"),
        ({"k_source": "device", "v_source": "device", "buffers": 2}, "buffers"),
        ({"bk": 256, "bd": 64}, "threadgroup memory"),
        ({"load_width": 3}, "choices"),
    ],
)
def test_an_invalid_schedule_names_the_rule(change: dict[str, object], rule: str) -> None:
    with pytest.raises(InvalidSchedule) as caught:
        check_schedule(D64, replace(PLAIN, **change))  # type: ignore[arg-type]
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("change", "rule", "words"),
    [
        ({}, "", ""),
        ({"key_simdgroups": 8}, "key_simdgroups", "multiple of key_simdgroups=8, not 4"),
        (
            {"bq": 64},
            "bq",
            r"16 \* row_blocks \* simdgroups / key_simdgroups = 32, not 64",
        ),
        ({"bk": 48}, "bk", "bk must be a multiple of 32, not 48"),
    ],
)
def test_simdgroups_share_keys_in_decode_on_cuda(
    change: dict[str, int], rule: str, words: str
) -> None:
    pairs = Schedule(
        bq=32, bk=64, bd=64, simdgroups=4, key_simdgroups=2, family="decode", kind="mma"
    )
    assert (pairs.partials, replace(pairs, splits=8).partials) == (2, 16)
    own = Limits(101376, 1024, "cuda")
    if not rule:
        check_schedule(D64, pairs, own)
        with pytest.raises(InvalidSchedule, match="metal has no mma kernels"):
            check_schedule(D64, pairs)
        return
    with pytest.raises(InvalidSchedule, match=words) as caught:
        check_schedule(D64, replace(pairs, **change), own)
    assert caught.value.rule == rule


def test_limits_are_the_chips() -> None:
    assert is_valid(D64, PLAIN)
    assert not is_valid(D64, PLAIN, Limits(threads=64))
    assert not is_valid(D64, PLAIN, Limits(threadgroup_bytes=4096))
    with pytest.raises(InvalidSchedule, match="128 threads of at most 64"):
        check_schedule(D64, PLAIN, Limits(threads=64))


def test_float32_needs_no_widening() -> None:
    with pytest.raises(InvalidSchedule) as caught:
        check_schedule(AttentionConfig(64, "float32"), replace(PLAIN, fragment="float32"))
    assert caught.value.rule == "fragment"


def test_threadgroup_memory_by_hand() -> None:
    # One staging buffer: 32 rows of 64 halves and 16 bytes.
    assert threadgroup_bytes(D64, PLAIN) == 32 * (128 + 16)
    # Two of 32 columns, and 64 rows of Q.
    both = replace(PLAIN, bd=32, buffers=2, q_source="threadgroup")
    assert threadgroup_bytes(D64, both) == 2 * 32 * (64 + 16) + 64 * (128 + 16)
    direct = replace(PLAIN, k_source="device", v_source="device")
    assert threadgroup_bytes(D64, direct) == 0


@pytest.mark.parametrize(
    ("config", "simdgroups", "size"),
    [
        # 64 rows of Q, and two tiles of 64 keys: 8 chunks of 16 bytes a row, which are swizzled.
        (D64, 4, 64 * 128 + 2 * 64 * 128),
        # 72 columns are 80, of 10 chunks, and an odd number keeps rows in different banks.
        (AttentionConfig(72), 4, 64 * 176 + 2 * 64 * 176),
        # The wider of K and V makes a tile.
        (AttentionConfig(64, value_head_dim=128), 4, 64 * 128 + 2 * 64 * 256),
        # 128 elements of 4 bits: 64 bytes, 5 chunks apart; two scales and two biases, 4 bytes each.
        # Several warps share what is dequantized, 64 rows of 256 bytes; one needs no such tile.
        (AttentionConfig(128, kv_bits=4), 4, 64 * 256 + 64 * 256 + 2 * 64 * (80 + 8)),
        (AttentionConfig(128, kv_bits=4), 1, 16 * 256 + 2 * 64 * (80 + 8)),
        # 96 of 8 bits: 6 chunks, so 7 apart. Three scales are 6 bytes, somewhere in 8.
        (AttentionConfig(96, kv_bits=8, kv_group=32), 1, 16 * 208 + 2 * 64 * (112 + 16)),
    ],
)
def test_shared_memory_by_hand(config: AttentionConfig, simdgroups: int, size: int) -> None:
    bq, bd = 16 * simdgroups, MMA.widest_row(config, 1)
    schedule = Schedule(bq=bq, bk=64, bd=bd, simdgroups=simdgroups, buffers=2, kind="mma")
    check_schedule(config, schedule, Limits(size, 1024, "cuda"))
    assert threadgroup_bytes(config, schedule) == size
    with pytest.raises(InvalidSchedule, match=f"{size} bytes of at most {size - 1}"):
        check_schedule(config, schedule, Limits(size - 1, 1024, "cuda"))


def test_register_estimate_by_hand() -> None:
    # 16 rows: O 64, S 32, Q 32 half-registers, and 85.
    assert SIMDGROUP.registers(D64, PLAIN) == 64 + 32 + 32 + 85
    assert SIMDGROUP.registers(D64, replace(PLAIN, q_source="threadgroup")) == 64 + 32 + 85


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("limits", [Limits(), Limits(threadgroup_bytes=16384)])
def test_there_is_a_valid_default_for_every_width(dtype: str, limits: Limits) -> None:
    for head_dim in range(8, 257, 4):
        for value_head_dim in (None, 8, 100, 256):
            config = AttentionConfig(head_dim, dtype, value_head_dim=value_head_dim)
            check_schedule(config, default_schedule(config, limits), limits)


@pytest.mark.parametrize(
    ("head_dim", "bk", "bd", "q_source"),
    [(128, 32, 128, "registers"), (192, 16, 64, "threadgroup"), (256, 16, 64, "threadgroup")],
)
def test_wide_rows_are_staged_in_narrow_slices_by_default(
    head_dim: int, bk: int, bd: int, q_source: str
) -> None:
    found = default_schedule(AttentionConfig(head_dim))
    assert (found.bk, found.bd, found.q_source) == (bk, bd, q_source)
