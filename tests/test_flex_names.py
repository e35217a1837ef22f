"""FlexAttention's names and orders of arguments, and block masks as PyTorch describes them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen import (
    ArgumentError,
    AuxRequest,
    BlockMask,
    create_block_mask,
    create_mask,
    flex_attention,
    noop_mask,
)
from metalgen.testing.devices import normal

TABLE = mx.array(np.random.default_rng(3).random((3, 4, 50, 70)) < 0.3)


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return j <= i


def any_mask(b: Any, h: Any, i: Any, j: Any) -> Any:
    return TABLE[b, h, i, j]


def inputs(batch: int = 2, heads: int = 4, kv_heads: int = 2) -> list[mx.array]:
    shapes = ((batch, heads, 50, 32), (batch, kv_heads, 70, 32), (batch, kv_heads, 70, 32))
    return [normal(shape, "float32", n) for n, shape in enumerate(shapes)]


def plain(q: mx.array, k: mx.array, v: mx.array, seen: Any, scale: float = 32**-0.5) -> Any:
    """The definition in float64; zeros in rows that see no key."""
    q, k, v = (np.array(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.where(np.array(seen), q @ k.swapaxes(-1, -2) * scale, -np.inf)
    most = scores.max(axis=-1, keepdims=True)
    likely = np.exp(scores - np.where(np.isfinite(most), most, 0))
    total = likely.sum(axis=-1, keepdims=True)
    return likely / np.where(total == 0, 1, total) @ v


def test_a_block_mask_and_the_scale_may_stand_where_flex_attention_has_them() -> None:
    q, k, v = inputs()
    mask = create_block_mask(causal, None, None, 50, 70, device="cuda", BLOCK_SIZE=16)
    assert mask.block_size == (16, 16)
    seen = np.arange(70) <= np.arange(50)[:, None]
    for given in (
        flex_attention(q, k, v, None, mask, 0.3),  # type: ignore[arg-type]
        flex_attention(q, k, v, None, None, mask, 0.3),
        flex_attention(q, k, v, block_mask=mask, scale=0.3, enable_gqa=True),
    ):
        np.testing.assert_allclose(np.array(given), plain(q, k, v, seen, 0.3), atol=2e-6)
    only_scale = flex_attention(q, k, v, None, None, 0.3)  # type: ignore[arg-type]
    np.testing.assert_allclose(np.array(only_scale), plain(q, k, v, True, 0.3), atol=2e-6)


def test_what_else_is_asked_for_is_returned() -> None:
    q, k, v = inputs()
    out, lse = flex_attention(q, k, v, return_lse=True)
    same, aux = flex_attention(q, k, v, return_aux=AuxRequest(lse=True))
    assert aux.lse is not None and mx.array_equal(lse, aux.lse) and mx.array_equal(out, same)
    assert flex_attention(q, k, v, return_aux=AuxRequest())[1].lse is None


def test_a_block_masks_density_is_that_of_its_blocks() -> None:
    mask = create_block_mask(causal, None, None, 64, 64, 16)
    assert mask.shape == (1, 1, 64, 64)
    assert mask.to_dense().tolist() == [[[[int(j <= i) for j in range(4)] for i in range(4)]]]
    assert mask.sparsity() == pytest.approx(100 * 6 / 16)
    assert create_block_mask(noop_mask, None, None, 40, 30).sparsity() == 0


@pytest.mark.parametrize(
    "index",
    [1, -1, slice(0, 2), [2, 0], (slice(None), 1), (1, slice(1, 3)), ([0, 2], [3, 1, 1]), (0, -1)],
    ids=str,
)
def test_a_slice_is_the_mask_of_those_entries_and_heads(index: Any) -> None:
    whole = create_block_mask(any_mask, 3, 4, 50, 70, 16)
    part = whole[index]
    parts = index if isinstance(index, tuple) else (index, slice(None))
    entries, heads = (
        np.atleast_1d(np.arange(size)[each]) for size, each in zip((3, 4), parts, strict=True)
    )
    seen = np.array(TABLE)[entries][:, heads]
    assert part.shape[:2] == seen.shape[:2]
    for got, of in ((part.some, whole.some), (part.every, whole.every)):
        np.testing.assert_array_equal(np.array(got), np.array(of)[entries][:, heads])
    q, k, v = inputs(len(entries), len(heads), len(heads))
    out = flex_attention(q, k, v, block_mask=part)
    np.testing.assert_allclose(np.array(out), plain(q, k, v, seen), atol=2e-6)


def test_a_slice_runs_in_a_kernel() -> None:
    part = create_block_mask(any_mask, 3, 4, 50, 70)[[2, 0], [1, 3]]
    q, k, v = inputs(2, 2, 1)
    out = flex_attention(q, k, v, block_mask=part, device="simulator")
    seen = np.array(TABLE)[[2, 0]][:, [1, 3]]
    np.testing.assert_allclose(np.array(out), plain(q, k, v, seen), atol=2e-6)


def listed(masked: bool) -> tuple[BlockMask, Any]:
    """Blocks of 16 x 16 of 50 queries and 70 keys, some listed, some full; and what is seen."""
    counts = mx.array([[[2, 1, 0, 3]]])
    indices = mx.array([[[[4, 1, 9, 9, 9], [0, 9, 9, 9, 9], [9] * 5, [3, 2, 0, 9, 9]]]])
    full = mx.array([[[1, 0, 0, 1]]]), mx.array([[[[0, 9, 9, 9, 9], [9] * 5, [9] * 5, [4] * 5]]])
    mod = (lambda b, h, i, j: (i + j) % 3 != 0) if masked else None
    mask = BlockMask.from_kv_blocks(counts, indices, *full, 16, mod, (50, 70))
    i, j = np.arange(50)[:, None], np.arange(70)
    state = np.zeros((4, 5), int)
    for row, columns in enumerate([[4, 1], [0], [], [3, 2, 0]]):
        state[row, columns] = 1
    state[0, 0] = state[3, 4] = 2
    here = state[i // 16, j // 16]
    return mask, (here == 2) | ((here == 1) & (((i + j) % 3 != 0) if masked else True))


@pytest.mark.parametrize("masked", [False, True])
def test_listed_blocks_are_seen_as_listed(masked: bool) -> None:
    mask, seen = listed(masked)
    assert int(mask.to_dense().sum()) == 6 + 2
    q, k, v = inputs()
    for device in ("reference", "simulator"):  # of other tiles than 16 x 16
        out = flex_attention(q, k, v, block_mask=mask, device=device)
        np.testing.assert_allclose(np.array(out), plain(q, k, v, seen), atol=2e-6)


def test_a_mask_as_an_array() -> None:
    found = create_mask(causal, None, None, 5, 7)
    assert found.shape == (1, 1, 5, 7) and found.dtype == mx.bool_
    assert found[0, 0].tolist() == (np.arange(7) <= np.arange(5)[:, None]).tolist()
    assert mx.array_equal(create_mask(any_mask, 3, 4, 50, 70), TABLE)
    scored = create_mask(lambda s, b, h, i, j: mx.where(j < i, -mx.inf, s + h), 2, 3, 4, 4)
    assert scored.shape == (2, 3, 4, 4)
    assert scored[1, 2].tolist() == (np.arange(4) >= np.arange(4)[:, None]).tolist()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m, q, k, v: flex_attention(q, k, v, None, m, m), "block_mask: expected one block"),
        (lambda m, q, k, v: flex_attention(q, k, v, None, m, 0.1, 0.2), "scale: expected one"),
        (lambda m, q, k, v: flex_attention(q, k, v, enable_gqa=False), "enable_gqa: expected True"),
        (lambda m, q, k, v: flex_attention(q, k, v, enable_gqa=3), "enable_gqa: expected True, F"),
        (lambda m, q, k, v: flex_attention(q, k, v, return_aux=True), "return_aux: expected a met"),
        (
            lambda m, q, k, v: flex_attention(q, k, v, return_aux=AuxRequest(max_scores=True)),
            "return_aux.max_scores: expected False",
        ),
        (
            lambda m, q, k, v: create_block_mask(causal, None, None, 9, 9, 4, BLOCK_SIZE=4),
            "BLOCK_SIZE: expected None with block_size",
        ),
        (lambda m, q, k, v: m[1], r"block_mask\[...\]: expected integers from -1 to 0 for b"),
        (lambda m, q, k, v: m[0, 0, 0], r"expected at most two indices"),
        (lambda m, q, k, v: m[2:], "expected at least one entry of b"),
        (
            lambda m, q, k, v: BlockMask.from_kv_blocks(
                mx.zeros((1, 1, 2)), mx.zeros((1, 1, 2, 2))
            ),
            "kv_num_blocks: expected an mlx.core.array of integers",
        ),
        (
            lambda m, q, k, v: BlockMask.from_kv_blocks(
                mx.array([[[1]]]), mx.array([[[[0, 1]]]]), BLOCK_SIZE=16, seq_lengths=(16, 70)
            ),
            "seq_lengths: expected lengths of 1 x 2 blocks",
        ),
        (
            lambda m, q, k, v: BlockMask.from_kv_blocks(
                mx.array([[[1]]]), mx.array([[[[0, 1]]]]), mx.array([[[1]]])
            ),
            "full_kv_indices: expected an array",
        ),
    ],
)
def test_bad_input_is_named(call: Any, words: str) -> None:
    mask = create_block_mask(causal, None, None, 50, 70)
    with pytest.raises(ArgumentError, match=words):
        call(mask, *inputs())
