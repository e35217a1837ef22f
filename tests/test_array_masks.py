"""Array masks by tiles: block masks of arrays, and tiles that a call finds itself."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import ArgumentError, create_block_mask, simulator
from metalgen.testing.devices import normal

BATCH, HEADS, Q_LEN, KV_LEN = 2, 4, 70, 150
SHAPES = [
    (BATCH, HEADS, Q_LEN, KV_LEN),
    (1, HEADS, Q_LEN, 1),
    (BATCH, 1, 1, KV_LEN),
    (Q_LEN, KV_LEN),
    (KV_LEN,),
]


def table(shape: tuple[int, ...]) -> Any:
    """Booleans with tiles of each kind: those with all keys, with some, and with none."""
    seen = np.random.default_rng(len(shape)).random(shape) < 0.8
    seen[..., : min(64, shape[-1] - 1)] = True
    seen[..., 96:130] = False
    return seen


def arrays(length: int = Q_LEN, keys: int = KV_LEN, heads: int = HEADS) -> list[mx.array]:
    shapes = ((BATCH, heads, length, 32), (BATCH, 2, keys, 32), (BATCH, 2, keys, 32))
    return [normal(shape, "float32", n) for n, shape in enumerate(shapes)]


def definition(q: mx.array, k: mx.array, v: mx.array, seen: Any) -> Any:
    """Attention in float64; zeros in rows that see no key."""
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) * q.shape[3] ** -0.5
    seen = np.broadcast_to(seen, scores.shape)
    weights = np.where(seen, np.exp(scores - scores.max(axis=3, keepdims=True)), 0)
    total = weights.sum(axis=3, keepdims=True)
    return (weights / np.where(total == 0, 1, total)) @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_a_block_mask_of_an_array_hides_what_the_array_hides(shape: tuple[int, ...]) -> None:
    q, k, v = arrays()
    seen = table(shape)
    mask = create_block_mask(mx.array(seen), BATCH, HEADS, Q_LEN, KV_LEN)
    expected = definition(q, k, v, seen)
    for out in (
        metalgen.attention(q, k, v, mask=mask, device="simulator"),
        metalgen.flex_attention(q, k, v, block_mask=mask, device="simulator"),
    ):
        np.testing.assert_allclose(np.array(out), expected, atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_an_array_are_those_of_a_function_that_reads_it(shape: tuple[int, ...]) -> None:
    whole = mx.array(np.broadcast_to(table(shape), SHAPES[0]))
    of_array = create_block_mask(mx.array(table(shape)), BATCH, HEADS, Q_LEN, KV_LEN)
    of_function = create_block_mask(
        lambda b, h, i, j: whole[b, h, i, j], BATCH, HEADS, Q_LEN, KV_LEN
    )
    for name in ("some", "every"):
        own = np.array(getattr(of_array, name))
        expected = np.array(getattr(of_function, name))
        np.testing.assert_array_equal(np.broadcast_to(own, expected.shape), expected)


def test_entries_of_a_block_mask_of_an_array_are_those_of_the_array() -> None:
    seen = table(SHAPES[0])
    mask = create_block_mask(mx.array(seen), BATCH, HEADS, Q_LEN, KV_LEN)[1, 2:]
    q, k, v = arrays(heads=2)
    out = metalgen.attention(q, k, v, mask=mask, device="simulator")
    np.testing.assert_allclose(np.array(out), definition(q, k, v, seen[1:, 2:]), atol=2e-6)


def test_a_block_mask_of_a_function_is_a_mask_of_attention() -> None:
    q, k, v = arrays()
    mask = create_block_mask(lambda b, h, i, j: j <= i, None, None, Q_LEN, KV_LEN)
    out = metalgen.attention(q, k, v, mask=mask, device="simulator")
    expected = definition(q, k, v, np.tri(Q_LEN, KV_LEN, dtype=bool))
    np.testing.assert_allclose(np.array(out), expected, atol=2e-6)


def test_what_is_assigned_into_the_array_later_changes_nothing() -> None:
    q, k, v = arrays()
    seen = table(SHAPES[0])
    array = mx.array(seen)
    mask = create_block_mask(array, BATCH, HEADS, Q_LEN, KV_LEN)
    array[:] = False
    out = metalgen.attention(q, k, v, mask=mask, device="simulator")
    np.testing.assert_allclose(np.array(out), definition(q, k, v, seen), atol=2e-6)


LENGTH = 2048


def products(**options: Any) -> int:
    """Multiply-accumulates of a call on one head, counted in the simulator."""
    q, k, v = (normal((1, 1, LENGTH, 64), "float16", n) for n in range(3))
    with simulator.record(checked=True, raise_on_findings=True) as runs:
        mx.eval(metalgen.attention(q, k, v, device="simulator", **options))
    return sum(run.counters.multiply_accumulates for run in runs)


def test_an_array_that_is_causal_costs_at_most_a_quarter_more_than_the_rule() -> None:
    rule = products(causal=True)
    array = mx.tri(LENGTH, dtype=mx.bool_)
    assert products(mask=array) <= 1.25 * rule
    mask = create_block_mask(array, None, None, LENGTH, LENGTH)
    assert products(mask=mask) <= 1.25 * rule


def test_an_array_of_half_of_the_keys_costs_half() -> None:
    padded = mx.arange(LENGTH) >= LENGTH // 2
    assert products(mask=padded) <= 0.55 * products()


@pytest.mark.parametrize(
    ("array", "sizes", "message"),
    [
        (mx.zeros((Q_LEN, KV_LEN)), (None, None), "mask_mod.dtype: expected bool"),
        (
            mx.zeros((Q_LEN, 7), mx.bool_),
            (2, None),
            "broadcast to (2, H, 70, 150), but got (70, 7)",
        ),
        (mx.zeros((3, 1, 1, 1), mx.bool_), (2, None), "broadcast to (2, H, 70, 150)"),
        (mx.zeros((1, 1, 1, 1, 1), mx.bool_), (None, None), "at most 4 axes"),
    ],
)
def test_arrays_that_are_no_masks_are_refused(
    array: mx.array, sizes: tuple[int | None, int | None], message: str
) -> None:
    with pytest.raises(ArgumentError) as error:
        create_block_mask(array, *sizes, Q_LEN, KV_LEN)
    assert message in str(error.value)


def test_block_masks_of_arrays_that_do_not_fit_the_call_are_refused() -> None:
    q, k, v = arrays()
    array = mx.ones((3, 1, Q_LEN, KV_LEN), mx.bool_)
    mask = create_block_mask(array, 3, None, Q_LEN, KV_LEN)
    with pytest.raises(ArgumentError, match="B=2, because its array has 3"):
        metalgen.attention(q, k, v, mask=mask, device="simulator")
    mask = create_block_mask(array[:1], None, None, Q_LEN, KV_LEN)
    with pytest.raises(ArgumentError, match="made for 70 queries and 149 keys"):
        metalgen.attention(q, k[:, :, 1:], v[:, :, 1:], mask=mask, device="simulator")
    with pytest.raises(ArgumentError, match="mask: expected None with the block mask of an array"):
        metalgen.flex_attention(q, k, v, block_mask=mask, mask=array[:1], device="simulator")
    with pytest.raises(ArgumentError, match="mask_mod: expected None with the block mask of an a"):
        metalgen.flex_attention(
            q, k, v, mask_mod=lambda b, h, i, j: j <= i, block_mask=mask, device="simulator"
        )
    with pytest.raises(ArgumentError, match="mask: expected no block mask together"):
        metalgen.flex_attention(q, k, v, block_mask=mask, mask=mask, device="simulator")
