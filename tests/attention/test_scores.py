"""What changes or hides a score, as users call it, against MLX's own attention."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from attention_calls import (
    SCALE,
    WIDTH,
    arrays,
    assert_close,
    sdpa,
    seen_by,
)

import metalgen
from metalgen import alibi_slopes, attention
from metalgen.testing.devices import normal


@pytest.mark.parametrize("shape", [(21, 37), (1, 37), (2, 1, 1, 37), (1, 4, 21, 1), (2, 4, 21, 37)])
def test_a_mask_of_booleans_with_fewer_axes_or_ones(where: str, shape: tuple[int, ...]) -> None:
    q, k, v = arrays()
    mask = normal(shape, seed=5) > -0.8
    mask = mask | (mx.arange(shape[-1]) == 0) if shape[-1] > 1 else mx.ones(shape, mx.bool_)
    assert_close(attention(q, k, v, mask=mask, device=where), sdpa(q, k, v, mask=mask))


def test_a_mask_named_causal_is_the_causal_one(where: str) -> None:
    q, k, v = arrays()
    expected = sdpa(q, k, v, mask="causal")
    assert_close(attention(q, k, v, mask="causal", device=where), expected)
    assert_close(attention(q, k, v, causal=True, mask="causal", device=where), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_mask_of_floats_is_a_bias_and_any_float_will_do(where: str, dtype: str) -> None:
    q, k, v = arrays(dtype="bfloat16")
    bias = normal((4, 1, 37), dtype, 5)
    for name in ("mask", "bias"):
        out = attention(q, k, v, device=where, **{name: bias})  # type: ignore[arg-type]
        assert out.dtype == mx.bfloat16
        assert_close(out, sdpa(q, k, v, mask=bias))


def test_bias_mask_causal_and_softcap_together(where: str) -> None:
    q, k, v = arrays()
    bias, mask = normal((1, 4, 1, 37), seed=5), normal((2, 1, 21, 37), seed=6) > -1
    mask = mask | (mx.arange(37) == 0)
    out = attention(
        q, k, v, softcap=2.0, bias=bias, mask=mask, causal=True, scale=0.3, device=where
    )
    repeated = (mx.repeat(x, 2, axis=1) for x in (k, v))
    k, v = repeated
    scores = 2 * mx.tanh(0.3 * q @ k.swapaxes(-1, -2) / 2) + bias
    scores = mx.where(mask & seen_by(21, 37), scores, -mx.inf)
    assert_close(out, mx.softmax(scores, axis=-1) @ v)


def test_the_slopes_of_alibi_are_those_of_its_authors() -> None:
    halves = [2.0**-n for n in range(1, 9)]
    np.testing.assert_allclose(np.array(alibi_slopes(8)), halves, rtol=1e-6)
    twelve = [*halves, 2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
    np.testing.assert_allclose(np.array(alibi_slopes(12)), twelve, rtol=1e-6)
    np.testing.assert_allclose(np.array(alibi_slopes(1)), [2.0**-8], rtol=1e-6)
    with pytest.raises(metalgen.ArgumentError, match="heads: expected an integer from 1"):
        alibi_slopes(0)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_alibi_lowers_scores_by_the_distance(where: str, dtype: str) -> None:
    q, k, v = arrays()
    slopes = alibi_slopes(4).astype(getattr(mx, dtype))
    distance = mx.abs(mx.arange(21)[:, None] + 16 - mx.arange(37))
    expected = sdpa(q, k, v, mask=-slopes.astype(mx.float32)[:, None, None] * distance)
    assert_close(attention(q, k, v, alibi_slopes=slopes, device=where), expected)


@pytest.mark.parametrize("q_len", [1, 70])
def test_each_sequence_may_have_slopes_of_its_own(where: str, q_len: int) -> None:
    q, k, v = arrays(q_len, 80)
    slopes = mx.stack([alibi_slopes(4), mx.array([0.0, 1.0, 0.3, 2.0])])
    distance = mx.abs(mx.arange(q_len)[:, None] + 80 - q_len - mx.arange(80))
    out = attention(q, k, v, alibi_slopes=slopes, device=where)
    assert_close(out, sdpa(q, k, v, mask=-slopes[:, :, None, None] * distance))


def test_sinks_take_part_in_the_softmax_and_in_the_log_sum_exp(where: str) -> None:
    q, k, v = arrays()
    sinks = normal((4,), "bfloat16", 7) + 2
    out, lse = attention(q, k, v, sinks=sinks, causal=True, return_lse=True, device=where)
    assert_close(out, sdpa(q, k, v, mask="causal", sinks=sinks))
    _, without = attention(q, k, v, causal=True, return_lse=True, device=where)
    expected = np.logaddexp(np.array(without), np.array(sinks.astype(mx.float32))[:, None])
    np.testing.assert_allclose(np.array(lse), expected, rtol=1e-5, atol=1e-5)


def test_dropout_drops_its_share_and_divides_by_the_rest(where: str) -> None:
    q, k, _ = arrays(64, 32)
    v = mx.broadcast_to(mx.eye(32), (2, 2, 32, 32))  # the output is the matrix of weights
    whole = np.array(attention(q, k, v, device=where))
    key = mx.random.key(11)
    got = np.array(attention(q, k, v, dropout=0.25, dropout_key=key, device=where))
    dropped = got == 0
    np.testing.assert_allclose(got[~dropped], whole[~dropped] / 0.75, rtol=1e-4)
    # 16,384 draws: four standard deviations are 0.0135.
    assert abs(dropped.mean() - 0.25) < 0.0135
    again = attention(q, k, v, dropout=0.25, dropout_key=key, device=where)
    np.testing.assert_array_equal(np.array(again) == 0, dropped)
    other = attention(q, k, v, dropout=0.25, dropout_key=mx.random.key(12), device=where)
    both = (np.array(other) == 0) & dropped
    assert abs(both.mean() - 0.0625) < 0.0076  # independent: 0.25 squared
    np.testing.assert_array_equal(
        np.array(attention(q, k, v, dropout_key=key, device=where)), whole
    )  # nothing is dropped without a probability


def test_dropout_without_a_key_follows_the_seed_of_mlx() -> None:
    q, k, v = arrays()

    def drawn(seed: int | None) -> list[Any]:
        if seed is not None:
            mx.random.seed(seed)
        return np.array(attention(q, k, v, dropout=0.5, device="reference")).tolist()

    first = drawn(3)
    assert drawn(None) != first
    assert drawn(3) == first


def test_every_device_drops_the_same_weights(device: str) -> None:
    q, k, v = arrays()
    keywords: dict[str, Any] = {"dropout": 0.5, "dropout_key": mx.random.key(4)}
    expected = attention(q, k, v, device="reference", **keywords)
    assert_close(attention(q, k, v, device=device, **keywords), expected)


def test_gradients_reach_everything_that_adds_to_scores(where: str) -> None:
    q, k, v = arrays(5, 9)
    given = [q, k, v, normal((4, 5, 9), seed=5), alibi_slopes(4), normal((4,), seed=6)]
    distance = mx.abs(mx.arange(5)[:, None] + 4 - mx.arange(9))

    def loss(q: mx.array, k: mx.array, v: mx.array, b: mx.array, a: mx.array, s: mx.array) -> Any:
        out, lse = attention(
            q, k, v, bias=b, alibi_slopes=a, sinks=s, return_lse=True, device=where
        )
        return (out * out).sum() + lse.sum()

    def plain(q: mx.array, k: mx.array, v: mx.array, b: mx.array, a: mx.array, s: mx.array) -> Any:
        k, v = (mx.repeat(x, 2, axis=1) for x in (k, v))
        scores = q @ k.swapaxes(-1, -2) * SCALE - a[:, None, None] * distance + b
        sink = mx.broadcast_to(s[:, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, sink], axis=-1)
        out = mx.softmax(scores, axis=-1)[..., :-1] @ v
        return (out * out).sum() + mx.logsumexp(scores, axis=-1).sum()

    got = mx.grad(loss, argnums=tuple(range(6)))(*given)
    wanted = mx.grad(plain, argnums=tuple(range(6)))(*given)
    for a, b in zip(got, wanted, strict=True):
        assert np.abs(np.array(b)).max() > 1e-3
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-4, atol=2e-5)


def test_gradients_go_through_dropout_where_the_output_did(where: str) -> None:
    q, k, v = arrays(6, 9)
    keywords: dict[str, Any] = {"dropout": 0.4, "dropout_key": mx.random.key(5), "device": where}
    eye = mx.broadcast_to(mx.eye(9, WIDTH), (2, 2, 9, WIDTH))
    kept = attention(q, k, eye, **keywords)[..., :9] != 0
    assert 0.3 < kept.mean().item() < 0.9  # type: ignore[operator]

    def loss(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (attention(q, k, v, **keywords) ** 2).sum()

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        k, v = (mx.repeat(x, 2, axis=1) for x in (k, v))
        weights = mx.softmax(q @ k.swapaxes(-1, -2) * SCALE, axis=-1)
        return ((mx.where(kept, weights / 0.6, 0.0) @ v) ** 2).sum()

    got, wanted = (mx.grad(f, argnums=(0, 1, 2))(q, k, v) for f in (loss, plain))
    for a, b in zip(got, wanted, strict=True):
        assert np.abs(np.array(b)).max() > 1e-2
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=2e-4, atol=2e-5)
