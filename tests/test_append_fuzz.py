"""Append kernels of configs, schedules, sizes, layouts and tables drawn at random.

CI runs a sample; ``pytest -m slow tests/test_append_fuzz.py`` runs hundreds.
"""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen import simulator
from metalgen.append.launch import kernel_rows, plain_rows
from metalgen.devices import get_device
from metalgen.errors import InvalidSchedule
from metalgen.families import Schedule, check_schedule
from metalgen.families.append import ELEMENTS, THREADS, append_schedule, inputs, operands
from metalgen.problem.config import AttentionConfig

BOUND = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 4e-2}
"""Largest error of a turned element; those drawn are below 6."""
EXTREME = (-(2**31), 2**31 - 1, -1)


def draw_config(rng: random.Random) -> AttentionConfig:
    bits, group = rng.choice([None, None, 4, 8]), rng.choice([32, 64, 128])
    width, value_width = rng.choice([8, 9, 20, 64, 72, 128, 576]), rng.choice([8, 13, 64, 512])
    if bits is not None:
        width, value_width = (group * rng.randint(1, 576 // group) for _ in range(2))
    rope = rng.choice([None, "half", "pairs"])
    places: list[dict[str, Any]] = [
        {},
        {"kv_lens": True},
        {"page_size": rng.choice([8, 16, 56, 256])},
        {"page_size": 8, "varlen": True},
    ]
    config = AttentionConfig(
        width,
        rng.choice(list(BOUND)),
        value_head_dim=value_width,
        kv_bits=bits,
        kv_group=group,
        rope=rope,
        rope_dims=None if rope is None else 2 * rng.randint(1, width // 2),
        **rng.choice(places),
    )
    return config if operands(config) else draw_config(rng)


def draw_schedule(rng: random.Random, config: AttentionConfig) -> Schedule:
    schedule = append_schedule(rng.choice(THREADS.choices), rng.choice(ELEMENTS.choices))
    try:
        check_schedule(config, schedule)
    except InvalidSchedule:
        return draw_schedule(rng, config)
    return schedule


def draw_rows(rng: random.Random, batch: int, heads: int, length: int, config: Any) -> Any:
    """Keys and values in layouts of their own."""
    found = {}
    for name, width in (("k", config.head_dim), ("v", config.v_dim)):
        layout = rng.choice(["plain", "heads last", "gaps", "transposed"])
        shape = {
            "plain": (batch, heads, length, width),
            "heads last": (batch, length, heads, width),
            "gaps": (batch, heads, length, 2 * width),
            "transposed": (batch, heads, width, length + 3),
        }[layout]
        x = mx.random.normal(shape, key=mx.random.key(rng.randrange(1 << 30)))
        x = mx.clip(x, -4, 4).astype(getattr(mx, config.dtype))
        found[name] = {
            "plain": lambda x: x,
            "heads last": lambda x: x.swapaxes(1, 2),
            "gaps": lambda x: x[..., ::2],
            "transposed": lambda x: x.swapaxes(2, 3)[:, :, 1:-2],
        }[layout](x)
    return found


def fuzz(seed: int, device: str) -> None:
    rng = random.Random(seed)
    config = draw_config(rng)
    schedule = draw_schedule(rng, config)
    batch = 1 if config.varlen else rng.randint(1, 3)
    heads, length = rng.randint(1, 3), rng.randint(1, 9)
    sequences = rng.randint(1, 4) if config.varlen else batch
    page, columns, pages = config.page_size or 8, rng.randint(1, 3), rng.randint(1, 6)
    hostile = rng.random() < 0.3

    def integers(low: int, high: int, *shape: int) -> mx.array:
        size = int(np.prod(shape))
        choices = [rng.choice([*EXTREME, low, high]) for _ in range(size)]
        drawn = choices if hostile else [rng.randint(low, high) for _ in range(size)]
        # Every second element of a longer array: strides count.
        return mx.array(np.repeat(np.array(drawn, np.int32), 2).reshape(*shape, 2))[..., 0]

    limit = pages if config.page_size else 12
    given = draw_rows(rng, batch, heads, length, config) | {
        "cu_seqlens": mx.array(sorted(rng.randint(0, length) for _ in range(sequences + 1))),
        "offset": integers(0, page * columns, sequences),
        "limit": mx.array([limit]),
        "table": integers(-1, pages, sequences, columns),
        "rope_freqs": mx.array([rng.random() for _ in range(max(1, config.rotary_dim // 2))]),
        "rope_offset": integers(0, 5000, sequences),
    }
    given = {name: given[name] for name in inputs(config)}
    what = f"seed {seed}: {config}, {schedule}, B={batch} H={heads} T={length}"
    with simulator.record(checked=True) as runs:
        got = kernel_rows(config, get_device(device), schedule)(given)
        mx.eval(got)
    for run in runs:
        assert run.findings is not None
        assert not list(run.findings), f"{what}\n{run.findings.report()}"
    expected = plain_rows(config, given)
    for name, array in got.items():
        other = expected[name]
        if name == "places" and hostile:
            slots = limit * heads * (page if config.page_size else batch)
            places = np.array(array)
            assert places.min() >= 0 and places.max() < slots, what
        elif name == "places" or (device == "simulator" and (name[0] == "v" or not config.rope)):
            assert mx.array_equal(array.view(mx.uint8), other.view(mx.uint8)), f"{name}, {what}"
        elif name == "k_rows" and not hostile:
            error = mx.max(mx.abs(array.astype(mx.float32) - other.astype(mx.float32)))
            assert float(error) <= BOUND[config.dtype], f"{name}, {what}"


@pytest.mark.parametrize("seed", range(12))
def test_any_append_is_right_and_stays_in_bounds(device: str, seed: int) -> None:
    fuzz(seed, device)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 400))
def test_many_appends_are_right_and_stay_in_bounds(device: str, seed: int) -> None:
    fuzz(seed, device)
