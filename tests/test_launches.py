"""How a call is launched: dispatches of bounded work, and rows that depend on nothing else."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from metalgen import AttentionConfig, InvalidSchedule, Schedule, get_kernel, simulator
from metalgen.devices import get_device
from metalgen.families import default_schedule
from metalgen.families.launch import attention_launches
from metalgen.problem.inputs import Inputs
from metalgen.problem.samples import sample_call

TILE = Schedule(bq=32, bk=16, bd=32, simdgroups=2, row_blocks=2)


def starts(shape: tuple[int, int, int], keys: int, most: int) -> list[tuple[int, int, int]]:
    config = AttentionConfig(32, max_work=most)
    found = attention_launches(config, TILE, shape, keys)
    assert all(launch.start is not None for launch in found)
    rows = sum(b * h * length for b, h, length in (launch.shape for launch in found))
    assert rows == shape[0] * shape[1] * shape[2]
    assert all(b * h * length * keys <= most for b, h, length in (x.shape for x in found))
    return [launch.start for launch in found if launch.start]


def test_a_call_within_the_bound_is_one_dispatch() -> None:
    assert starts(
        (
            2,
            4,
            128,
        ),
        64,
        2 * 4 * 128 * 64,
    ) == [(0, 0, 0)]


def test_a_call_is_cut_into_entries_then_heads_then_blocks_of_rows() -> None:
    assert starts((3, 4, 128), 512, 2 * 4 * 128 * 512) == [(0, 0, 0), (2, 0, 0)]
    assert starts((2, 4, 128), 512, 3 * 128 * 512) == [(0, 0, 0), (0, 3, 0), (1, 0, 0), (1, 3, 0)]
    # 128 rows in blocks of 32: at most 96 of them at once.
    assert starts((1, 2, 128), 1024, 96 * 1024) == [(0, 0, 0), (0, 0, 3), (0, 1, 0), (0, 1, 3)]


@pytest.mark.parametrize("family", ["forward", "decode"])
def test_no_dispatch_computes_more_than_the_bound(family: str) -> None:
    config = AttentionConfig(32, heads_per_kv=2, max_work=1 << 16)
    schedule = default_schedule(config, family=family)
    q_len = 300 if family == "forward" else 60
    q, k, v, given = sample_call(config, batch=2, kv_heads=2, q_len=q_len, kv_len=500)
    run = get_device("simulator").build(config, schedule)
    with simulator.record(checked=True, raise_on_findings=True) as runs:
        mx.eval(run(q, k, v, 0.2, given)[0])
    joins = len(runs) // 2 if family == "decode" else 0
    done = [r.counters.multiply_accumulates for r in runs if r.counters is not None]
    products = [n * 8**3 / 64 for n in done]  # of D + Dv multiply-accumulates a score
    most = 1 << 16 if family == "forward" else 60 * 500 * 2
    rounded = 1.5  # whole tiles
    assert len(runs) - joins > 3
    assert 0 < max(products) <= rounded * most


def outputs(config: AttentionConfig, q: mx.array, k: mx.array, v: mx.array) -> np.ndarray:
    kernel = get_kernel(
        config,
        batch=q.shape[0],
        heads=q.shape[1],
        q_len=q.shape[2],
        kv_len=k.shape[2],
        device="simulator",
    )
    return np.array(kernel(q, k, v, scale=0.2))


@pytest.mark.parametrize("q_len", [3, 80])
def test_a_deterministic_row_has_the_same_bits_alone_and_in_any_batch(q_len: int) -> None:
    config = AttentionConfig(32, heads_per_kv=2, causal=True, deterministic=True)
    q, k, v, _ = sample_call(config, batch=5, kv_heads=2, q_len=q_len, kv_len=2100)
    together = outputs(config, q, k, v)
    for entry in (0, 3):
        own = slice(entry, entry + 1)
        assert np.array_equal(outputs(config, q[own], k[own], v[own]), together[own])
        some = outputs(config, q[own, 2:], k[own, 1:], v[own, 1:])
        assert np.array_equal(some, together[own, 2:])
        last = outputs(config, q[own, :, -2:], k[own], v[own])
        assert q_len > 64 or np.array_equal(last, together[own, :, -2:])


def test_a_deterministic_row_has_the_same_bits_beside_longer_sequences() -> None:
    config = AttentionConfig(32, varlen=True, deterministic=True)
    q, k, v, _ = sample_call(AttentionConfig(32), kv_heads=1, q_len=8, kv_len=3000)
    run = get_device("simulator").build(config, default_schedule(config, family="decode"))

    def call(cu_q: list[int], cu_k: list[int], rows: slice, keys: slice) -> np.ndarray:
        given = Inputs(cu_q=mx.array(cu_q, mx.int32), cu_k=mx.array(cu_k, mx.int32))
        return np.array(run(q[:, :, rows], k[:, :, keys], v[:, :, keys], 0.2, given)[0])

    both = call([0, 3, 8], [0, 700, 3000], slice(0, 8), slice(0, 3000))
    alone = call([0, 3], [0, 700], slice(0, 3), slice(0, 700))
    assert np.array_equal(both[:, :, :3], alone)


def test_more_buffers_than_metal_has_are_refused_before_anything_is_compiled() -> None:
    """One more than Metal has: arrays, outputs, and the shapes and strides that are read."""
    config = AttentionConfig(
        32,
        **dict.fromkeys(("causal", "alibi", "bias", "array_mask", "sinks"), True),
        page_size=64,
        kv_bits=4,
        kv_group=32,
        rope="pairs",
        return_lse=True,
        max_work=1 << 16,
    )
    device = get_device("simulator")
    schedule = default_schedule(config, family="decode")
    with pytest.raises(
        InvalidSchedule, match=r"\(buffers\): the kernel binds 32, and Metal has 31"
    ):
        device.build(config, schedule)
    kernel = get_kernel(config, q_len=1, device="simulator")
    assert kernel.backend == "plain"
    assert "the kernel binds 32" in kernel.explain() and "FALLBACK" in kernel.explain()
