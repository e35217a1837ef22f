"""Eight things in which the MLX port of flash-attn does not do what its README says: ours does."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from flash_cases import Asked, attention, exact, mask_and_bias, rotated

import metalgen
from metalgen.calls import resolve
from metalgen.flash_attn import (
    check_mlx_requirements,
    flash_attn_func,
    flash_attn_with_kvcache,
    update_paged_kv_cache,
    validate_paged_kv_params,
)
from metalgen.testing.devices import normal


def arrays(q_len: int = 5, kv_len: int = 24, heads: int = 2) -> tuple[mx.array, ...]:
    shapes = (2, q_len, heads, 32), (2, kv_len, heads, 32), (2, kv_len, heads, 32)
    q, k, v = (normal(shape, "float32", n) for n, shape in enumerate(shapes))
    return q, k, v


def expected(ask: Asked, q: Any, k: Any, v: Any, lengths: Any = None, pads: Any = None) -> Any:
    found = []
    for b in range(len(q)):
        stop = k.shape[1] if lengths is None else lengths[b]
        first = 0 if pads is None else pads[b]
        seen, bias = mask_and_bias(ask, b, q.shape[2], q.shape[1], stop, first)
        found.append(attention(q[b], k[b][:stop], v[b][:stop], seen, bias, ask.softcap)[0])
    return np.stack(found)


def close(got: Any, wanted: Any) -> None:
    most = float(np.abs(wanted).max(initial=1.0))
    np.testing.assert_allclose(np.array(got), wanted, rtol=0, atol=4e-5 * most)


def paged(x: mx.array) -> tuple[mx.array, mx.array]:
    """``(2, 24, H, D)`` in pages of 8, in another order, and their table."""
    pages = mx.zeros((7, 8, *x.shape[2:]), x.dtype)
    table = [[4, 0, 5], [2, 6, 1]]
    for b, row in enumerate(table):
        for n, page in enumerate(row):
            pages[page] = x[b, 8 * n : 8 * n + 8]
    return pages, mx.array(table, mx.int32)


def test_1_kernels_run_unless_plain_mlx_is_asked_for(
    the_simulator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METALGEN_DEVICE", the_simulator)
    resolve.forget_kernels()
    q, k, v = arrays()
    assert check_mlx_requirements()[0]
    (k_pages, table), (v_pages, _) = paged(k), paged(v)
    out = flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=24, block_table=table)
    close(out, expected(Asked(), *(exact(x) for x in (q, k, v))))
    assert metalgen.stats().metalgen == metalgen.stats().calls == 1
    monkeypatch.setenv("FLASH_ATTENTION_MLX_REF", "1")
    resolve.forget_kernels()
    assert not check_mlx_requirements()[0]
    again = flash_attn_with_kvcache(q, k_pages, v_pages, cache_seqlens=24, block_table=table)
    close(again, np.array(out))
    assert metalgen.stats().plain == 1


def test_2_new_rows_are_stored_in_paged_caches() -> None:
    _, k, v = arrays()
    (k_pages, table), (v_pages, _) = paged(k), paged(v)
    new_k, new_v = normal((2, 3, 2, 32), "float32", 7), normal((2, 3, 2, 32), "float32", 8)
    wanted = [exact(x) for x in (k_pages, v_pages)]
    for n, start in enumerate((6, 13)):
        for i in range(3):
            page = [[4, 0, 5], [2, 6, 1]][n][(start + i) // 8]
            for store, new in zip(wanted, (new_k, new_v), strict=True):
                store[page, (start + i) % 8] = exact(new)[n, i]
    starts = mx.array([6, 13])
    lengths = update_paged_kv_cache(k_pages, v_pages, new_k, new_v, table, starts)
    assert lengths.tolist() == [9, 16]
    close(k_pages, wanted[0])
    close(v_pages, wanted[1])
    assert validate_paged_kv_params(k_pages, v_pages, table, 2) == (8, 3)
    with pytest.raises(metalgen.ArgumentError, match=r"page_table\[1, 1\]: expected a page from 0"):
        validate_paged_kv_params(k_pages, v_pages, mx.array([[4, 0, 5], [2, 7, 1]], mx.int32), 2)


def test_3_paged_attention_sees_the_rows_that_there_are(device: str) -> None:
    q, k, v = arrays()
    (k_pages, table), (v_pages, _) = paged(k), paged(v)
    out = flash_attn_with_kvcache(
        q, k_pages, v_pages, cache_seqlens=mx.array([7, 18]), block_table=table, device=device
    )
    close(out, expected(Asked(), *(exact(x) for x in (q, k, v)), [7, 18]))


@pytest.mark.parametrize("window", [(-1, -1), (3, 0), (2, 4)])
@pytest.mark.parametrize("causal", [False, True])
def test_4_masks_are_aligned_at_the_lower_right(device: str, causal: bool, window: Any) -> None:
    q, k, v = arrays()
    out = flash_attn_func(q, k, v, causal=causal, window_size=window, device=device)
    close(out, expected(Asked(causal, window), *(exact(x) for x in (q, k, v))))


@pytest.mark.parametrize("shape", [(2,), (2, 2)])
def test_5_scores_fall_with_the_distance(device: str, shape: Any) -> None:
    q, k, v = arrays()
    slopes = np.array([0.5, 0.25]) if len(shape) == 1 else np.array([[0.5, 0.25], [0.1, 1.0]])
    ask = Asked(slopes=slopes)
    out = flash_attn_func(q, k, v, alibi_slopes=mx.array(np.float32(slopes)), device=device)
    close(out, expected(ask, *(exact(x) for x in (q, k, v))))


def test_6_nothing_is_taken_and_ignored(device: str) -> None:
    q, k, v = arrays()
    new = [normal((2, 5, 2, 32), "float32", seed) for seed in (7, 8)]
    angle = np.random.default_rng(1).random((30, 16)) * 6
    cos, sin = (mx.array(np.float32(f(angle))) for f in (np.cos, np.sin))
    caches = [mx.concatenate([x, x * 0.5]) for x in (k, v)]
    wanted = [exact(x) for x in caches]
    starts, pads, owner = [4, 17], [2, 9], [3, 1]
    rows = exact(q)
    for b, n in enumerate(owner):
        at = starts[b] + np.arange(5)
        turn = (exact(cos), exact(sin), at, False)
        wanted[0][n, at] = rotated_exactly(exact(new[0])[b], *turn)
        wanted[1][n, at] = exact(new[1])[b]
        rows[b] = rotated_exactly(rows[b], *turn)
    out = flash_attn_with_kvcache(
        *(q, *caches, *new, cos, sin),
        cache_seqlens=mx.array(starts),
        cache_batch_idx=mx.array(owner),
        cache_leftpad=mx.array(pads),
        causal=True,
        rotary_interleaved=False,
        num_splits=4,
        device=device,
    )
    kept = [x[owner] for x in wanted]
    close(out, expected(Asked(True), rows, *kept, [9, 22], pads))
    close(caches[0], wanted[0])
    close(caches[1], wanted[1])


def rotated_exactly(x: Any, cos: Any, sin: Any, at: Any, interleaved: bool) -> Any:
    return rotated(x, cos, sin, at, interleaved, "float32")


def test_7_each_call_drops_other_weights() -> None:
    q, k, v = arrays(16, 64)
    v = mx.ones_like(v)
    first, second = (flash_attn_func(q, k, v, 0.5) for _ in range(2))
    assert not mx.allclose(first, second)
    kept = np.array(mx.concatenate([first, second]))[..., 0]
    assert abs(kept.mean() - 1) < 0.05  # the others make up for what is dropped
    mx.random.seed(3)
    once = flash_attn_func(q, k, v, 0.5)
    mx.random.seed(3)
    assert mx.array_equal(once, flash_attn_func(q, k, v, 0.5))


def test_8_layers_of_one_graph_keep_their_own_log_sums_and_gradients(device: str) -> None:
    q, k, v = arrays(6, 6)

    def two(q: mx.array, on: str) -> mx.array:
        one = flash_attn_func(q, k, v, 0.0, 0.3, True, device=on)
        return (flash_attn_func(one, v, k, 0.0, 1.5, False, (2, 2), device=on) ** 2).sum()

    got, wanted = (mx.grad(two)(q, on) for on in (device, "reference"))
    close(got, np.array(wanted))
    step = normal(q.shape, "float32", 9) * 2e-3
    slope = (two(q + step, "reference") - two(q - step, "reference")).item() / 2  # type: ignore[operator]
    assert abs((got * step).sum().item() - slope) < 1e-2 * abs(slope)  # type: ignore[operator]
    lses = [flash_attn_func(q, k, v, 0.0, scale, return_attn_probs=True)[1] for scale in (0.3, 1.5)]
    for lse, scale in zip(lses, (0.3, 1.5), strict=True):
        scores = np.einsum("bihd,bjhd->bhij", exact(q), exact(k)) * scale
        close(lse, np.log(np.exp(scores).sum(-1)))
