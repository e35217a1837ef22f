"""Entries of caches: the same live keys and values, kept in several layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.bench.entries import (
    Absent,
    Call,
    Entry,
    Found,
    Set,
    definition,
    kernel_call,
    kernels,
)
from metalgen.bench.work import Work
from metalgen.calls.verify import tolerance_of
from metalgen.devices import Device
from metalgen.devices.mlx_attention import mlx_sdpa
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import NOTHING
from metalgen.problem.samples import sample_call

if TYPE_CHECKING:
    from metalgen.chips import Chip

GROUP = 64
"""Elements that share a scale and a bias in quantized caches."""


def cache_entries(work: Work, device: Device, chip: Chip | None) -> list[Found]:
    """A dense cache, a paged one and two quantized ones with our kernels; MLX on a dense one."""
    config = work.config
    item, width = config.itemsize, config.head_dim + config.v_dim
    rows = work.batch * work.kv_heads
    dense = dataclasses.replace(config, kv_lens=True)
    paged = dataclasses.replace(dense, page_size=work.page_size)
    pages = -(-work.kv_len // work.page_size) * work.page_size
    found: list[Found] = []
    found += _ours(work, "dense", dense, _dense, rows * work.capacity * width * item, device, chip)
    found += _ours(work, "paged", paged, _paged, rows * pages * width * item, device, chip)
    for bits in (8, 4):
        name = f"{bits} bits"
        if config.head_dim % GROUP or config.v_dim % GROUP:
            found.append(Absent(name, f"rows of {config.head_dim} are no groups of {GROUP}"))
            continue
        quantized = dataclasses.replace(dense, kv_bits=bits, kv_group=GROUP)
        size = rows * work.capacity * width * bits // 8
        size += rows * work.capacity * width // GROUP * 2 * item
        found += _ours(work, name, quantized, _dense, size, device, chip)
    bytes_of_all = rows * work.capacity * width * item
    found.append(
        Entry(
            "MLX fused, dense",
            _fused(config),
            lambda work, seed: (*_dense(dense, work, seed)[:3], work.kv_len),
            lambda given: definition(config)((given[0], *_live(given), NOTHING)),
            tolerance_of(config),
            cache_bytes=bytes_of_all,
        )
    )
    return found


def _ours(
    work: Work,
    name: str,
    config: AttentionConfig,
    sample: Callable[[AttentionConfig, Work, int], Set],
    size: int,
    device: Device,
    chip: Chip | None,
) -> list[Found]:
    """One entry of a layout by the best of our kernels."""
    one = dataclasses.replace(work, config=config)
    kernel = next(iter(kernels(one, device, chip).values()))
    if isinstance(kernel, str):
        return [Absent(name, kernel)]
    return [
        Entry(
            name,
            kernel_call(kernel),
            lambda work, seed: sample(config, work, seed),
            definition(config),
            tolerance_of(config),
            note=str(kernel.schedule),
            cache_bytes=size,
            live_bytes=_live_bytes(work, config),
        )
    ]


def _live_bytes(work: Work, config: AttentionConfig) -> float:
    """Bytes of the live keys and values in a layout, with the scales and biases of groups."""
    width = config.head_dim + config.v_dim
    each = float(config.itemsize)
    if config.kv_bits is not None:
        each = config.kv_bits / 8 + 2 * config.itemsize / GROUP
    return work.batch * work.kv_heads * work.kv_len * width * each


def _dense(config: AttentionConfig, work: Work, seed: int) -> Set:
    """A cache with room for more keys than live in it."""
    sizes = {"batch": work.batch, "kv_heads": work.kv_heads, "q_len": work.q_len}
    room = max(work.capacity, work.kv_len)
    q, k, v, inputs = sample_call(config, **sizes, kv_len=room, seed=seed, ragged=False)
    lengths = mx.full((work.batch,), work.kv_len, mx.int32)
    return q, k, v, inputs.having({"kv_lens": lengths})


def _paged(config: AttentionConfig, work: Work, seed: int) -> Set:
    """As many pages as live keys fill."""
    sizes = {"batch": work.batch, "kv_heads": work.kv_heads, "q_len": work.q_len}
    return sample_call(config, **sizes, kv_len=work.kv_len, seed=seed, ragged=False)


def _live(given: Set) -> tuple[mx.array, mx.array]:
    """The keys and values of a dense cache that live."""
    _, k, v, seen = given
    return k[:, :, :seen], v[:, :, :seen]


def _fused(config: AttentionConfig) -> Call:
    """MLX's function over the live part of a dense cache, whose length the host knows."""

    def call(q: mx.array, k: mx.array, v: mx.array, seen: int) -> mx.array:
        mask = "causal" if config.causal and q.shape[2] > 1 else None
        keys, values = k[:, :, :seen], v[:, :, :seen]
        return mlx_sdpa(q, keys, values, scale=config.head_dim**-0.5, mask=mask)

    return call
