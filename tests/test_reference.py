"""The definition of attention against MLX's own operations, and plain MLX against it."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from metalgen.calls.verify import TOLERANCE, lse_fault, lse_tolerance, relative_error
from metalgen.dsl.trace import trace
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import Inputs, check_call
from metalgen.problem.samples import sample_call
from metalgen.reference import (
    attention_float64,
    attention_mlx,
    config_features,
    gradients_float64,
    gradients_mlx,
    plain_gradients,
)
from metalgen.testing.cases import FEATURES
from metalgen.testing.fuzz import functions

SCALE = 0.3


def normal(*shape: int, seed: int = 0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed))


def qkv(batch: int = 2, heads: int = 4, kv_heads: int = 2) -> tuple[mx.array, mx.array, mx.array]:
    shapes = (batch, heads, 13, 32), (batch, kv_heads, 21, 32), (batch, kv_heads, 21, 32)
    q, k, v = (normal(*shape, seed=n) for n, shape in enumerate(shapes))
    return q, k, v


def float64(
    q: mx.array, k: mx.array, v: mx.array, config: AttentionConfig, **inputs: Any
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    features = config_features(config) | {"inputs": Inputs(**inputs)}
    check_call(config, q, k, v, features["inputs"])
    return attention_float64(q, k, v, scale=SCALE, **features)


def config(**fields: Any) -> AttentionConfig:
    return AttentionConfig(32, "float32", heads_per_kv=2, return_lse=True, **fields)


def mlx_fused(q: mx.array, k: mx.array, v: mx.array, **options: Any) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=SCALE, **options)


def near(found: NDArray[np.float64], expected: mx.array) -> None:
    np.testing.assert_allclose(found, np.array(expected), rtol=2e-5, atol=2e-6)


def test_sinks_are_those_of_mlx() -> None:
    q, k, v = qkv()
    sinks = normal(4, seed=9)
    out, lse = float64(q, k, v, config(sinks=True), sinks=sinks)
    near(out, mlx_fused(q, k, v, sinks=sinks))
    scores = SCALE * (q @ mx.repeat(k, 2, axis=1).swapaxes(2, 3))
    more = mx.broadcast_to(sinks[:, None, None], (2, 4, 13, 1))
    near(lse, mx.logsumexp(mx.concatenate([scores, more], axis=3), axis=3))


@pytest.mark.parametrize("shape", [(2, 4, 13, 21), (1, 4, 1, 21), (2, 1, 13, 1), (1, 1, 1, 1)])
def test_bias_and_array_mask_are_the_masks_of_mlx(shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    whole = (2, 4, 13, 21)
    bias, mask = normal(*shape, seed=4), normal(*shape, seed=5) > -2
    out, _ = float64(q, k, v, config(bias=True), bias=bias)
    near(out, mlx_fused(q, k, v, mask=mx.broadcast_to(bias, whole)))
    out, _ = float64(q, k, v, config(array_mask=True), array_mask=mask)
    near(out, mlx_fused(q, k, v, mask=mx.broadcast_to(mask, whole)))


def test_alibi_is_a_bias_of_distances() -> None:
    q, k, v = qkv()
    slopes = mx.array([0.5, 0.25, 0.0, -0.1])
    out, _ = float64(q, k, v, config(alibi=True), alibi_slopes=slopes)
    distance = mx.abs(mx.arange(13)[:, None] + 8 - mx.arange(21)[None])
    near(
        out,
        mlx_fused(q, k, v, mask=mx.broadcast_to(-slopes[:, None, None] * distance, (2, 4, 13, 21))),
    )


def test_what_changes_scores_comes_before_what_masks_them() -> None:
    q, k, v = qkv()
    bias, slopes = normal(2, 4, 13, 21, seed=4), mx.array([0.5, 0.25, 0.1, 0.3])
    both = config(alibi=True, bias=True, softcap=1.5, causal=True)
    out, _ = float64(q, k, v, both, alibi_slopes=slopes, bias=bias)
    scores = SCALE * (q @ mx.repeat(k, 2, axis=1).swapaxes(2, 3))
    distance = mx.arange(13)[:, None] + 8 - mx.arange(21)[None]
    scores = 1.5 * mx.tanh(scores / 1.5) - slopes[:, None, None] * mx.abs(distance) + bias
    scores = mx.where(distance >= 0, scores, -mx.inf)
    near(out, mx.softmax(scores, axis=-1) @ mx.repeat(v, 2, axis=1))


@pytest.mark.parametrize("causal", [False, True])
def test_each_packed_sequence_is_by_itself(causal: bool) -> None:
    q, k, v = qkv(batch=1)
    cu_q, cu_k = [0, 5, 5, 12], [0, 9, 15, 20]
    packed = config(varlen=True, causal=causal)
    out, lse = float64(q, k, v, packed, cu_q=mx.array(cu_q), cu_k=mx.array(cu_k))
    for n in (0, 2):
        own_q = q[:, :, cu_q[n] : cu_q[n + 1]]
        own_k, own_v = (x[:, :, cu_k[n] : cu_k[n + 1]] for x in (k, v))
        rows = slice(cu_q[n], cu_q[n + 1])
        if not causal or n == 0:
            near(out[:, :, rows], mlx_fused(own_q, own_k, own_v, mask="causal" if causal else None))
    if causal:  # 7 queries and 5 keys: the first two see none
        assert not out[:, :, 5:7].any() and np.isneginf(lse[:, :, 5:7]).all()
        assert np.isfinite(lse[:, :, 7:12]).all()
    assert not out[:, :, 12:].any() and np.isneginf(lse[:, :, 12:]).all()


def test_lengths_cut_the_keys_and_align_masks() -> None:
    q, k, v = qkv()
    out, lse = float64(q, k, v, config(kv_lens=True, causal=True), kv_lens=mx.array([17, 0]))
    near(out[:1], mlx_fused(q[:1], k[:1, :, :17], v[:1, :, :17], mask="causal"))
    assert not out[1].any() and np.isneginf(lse[1]).all()


def test_pages_are_found_by_the_table_and_missing_ones_are_not_seen() -> None:
    q, _, _ = qkv()
    k, v = normal(6, 2, 8, 32, seed=1), normal(6, 2, 8, 32, seed=2)
    table, lengths = mx.array([[3, 0, 5], [1, -1, 2]]), mx.array([20, 24])
    out, _ = float64(q, k, v, config(page_size=8), block_table=table, kv_lens=lengths)
    for n, pages in enumerate(([3, 0, 5], [1, 2])):
        own_k, own_v = (mx.concatenate([x[p] for p in pages], axis=1)[None] for x in (k, v))
        if n == 0:
            own_k, own_v = own_k[:, :, :20], own_v[:, :, :20]
        near(out[n : n + 1], mlx_fused(q[n : n + 1], own_k, own_v))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64])
def test_quantized_keys_are_what_mlx_dequantizes(bits: int, group: int) -> None:
    """In float32, where MLX rounds as the definition does."""
    q, k, v = (normal(1, 2, 9, 64, seed=n) for n in range(3))
    k4, v4 = (mx.quantize(x, group_size=group, bits=bits) for x in (k, v))
    c = AttentionConfig(64, "float32", kv_bits=bits, kv_group=group)
    names = ("k_scales", "k_biases", "v_scales", "v_biases")
    inputs = dict(zip(names, (*k4[1:], *v4[1:]), strict=True))
    out, _ = float64(q, k4[0], v4[0], c, **inputs)
    near(out, mlx_fused(q, *(mx.dequantize(*x, group_size=group, bits=bits) for x in (k4, v4))))


@pytest.mark.parametrize("style", ["half", "pairs"])
@pytest.mark.parametrize("dims", [None, 16])
def test_queries_turn_as_in_mlx(style: str, dims: int | None) -> None:
    q, k, v = qkv()
    c = config(rope=style, rope_dims=dims)
    freqs = 100.0 ** (-mx.arange(0, c.rotary_dim, 2) / c.rotary_dim)
    out, _ = float64(q, k, v, c, rope_freqs=freqs, rope_offset=mx.array([0, 33]))
    for n, offset in enumerate((0, 33)):
        turned = mx.fast.rope(
            q[n : n + 1],
            c.rotary_dim,
            traditional=style == "pairs",
            base=None,
            scale=1.0,
            offset=offset,
            freqs=1 / freqs,
        )
        near(out[n : n + 1], mlx_fused(turned, k[n : n + 1], v[n : n + 1]))


def test_dropout_zeroes_weights_after_the_softmax_and_leaves_the_sum() -> None:
    q, k, v = qkv(heads=2)
    k, v = k[:, :, :, :], mx.broadcast_to(mx.eye(21)[:, :16], (2, 2, 21, 16))
    c = AttentionConfig(32, "float32", value_head_dim=16, dropout=0.4)
    out, lse = float64(q, k, v, c, dropout_key=mx.random.key(3))
    scores = SCALE * (q @ k.swapaxes(2, 3))
    near(lse, mx.logsumexp(scores, axis=3))
    weights = np.array(mx.softmax(scores, axis=3))[..., :16]  # the values are unit vectors
    kept = out != 0
    np.testing.assert_allclose(out[kept], weights[kept] / 0.6, rtol=2e-5)
    assert 0.5 < kept.mean() < 0.7


COMBINED: dict[str, dict[str, Any]] = {
    "packed": {"varlen": True, "causal": True, "sinks": True, "alibi": True},
    "packed pages": {"varlen": True, "page_size": 16, "window_left": 9, "rope": "half"},
    "packed, quantized": {"varlen": True, "kv_bits": 8, "kv_group": 32, "dropout": 0.2},
    "packed, quantized pages": {"varlen": True, "kv_bits": 4, "page_size": 8, "kv_group": 32},
    "pages": {"page_size": 8, "causal": True, "sinks": True, "softcap": 3.0},
    "quantized pages": {"page_size": 8, "kv_bits": 4, "kv_group": 32, "rope": "pairs"},
    "lengths": {"kv_lens": True, "bias": True, "window_right": 2, "dropout": 0.5},
    "quantized": {"kv_bits": 8, "kv_group": 64, "array_mask": True, "causal": True},
    "turned in part": {"rope": "pairs", "rope_dims": 12, "alibi": True, "bias": True},
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", COMBINED)
def test_plain_mlx_computes_what_is_defined(name: str, dtype: str) -> None:
    """Over NaN wherever nothing is to be looked at; the fuzzer has many more."""
    for seed in range(4):
        c = AttentionConfig(64, dtype, heads_per_kv=1 + seed % 2, **COMBINED[name])
        q, k, v, inputs = sample_call(c, batch=4, q_len=18, kv_len=35, seed=seed)
        check_call(c, q, k, v, inputs)
        features = config_features(c) | {"inputs": inputs}
        out, lse = attention_mlx(q, k, v, scale=SCALE, **features)
        expected, expected_lse = attention_float64(q, k, v, scale=SCALE, **features)
        assert out.dtype == q.dtype
        assert relative_error(out, expected) <= TOLERANCE[dtype]
        assert not lse_fault(lse, expected_lse, lse_tolerance(c))


GRADIENTS: dict[str, tuple[AttentionConfig, tuple[str, ...]]] = {
    "scores": (
        AttentionConfig(8, "float32", alibi=True, bias=True, sinks=True, causal=True, softcap=2.0),
        ("alibi_slopes", "bias", "sinks"),
    ),
    "packed": (AttentionConfig(8, "float32", varlen=True, sinks=True, rope="half"), ("sinks",)),
    "lengths": (AttentionConfig(8, "float32", kv_lens=True, alibi=True), ("alibi_slopes",)),
    "pages": (AttentionConfig(8, "float32", page_size=8, rope="pairs", dropout=0.3), ()),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_of_plain_mlx_are_slopes_of_the_definition(name: str) -> None:
    """Along any direction: a central difference in float64. Dead rows and NaN leave no NaN."""
    c, names = GRADIENTS[name]
    q, k, v, inputs = sample_call(c, batch=3, q_len=9, kv_len=20, seed=2)
    weights = normal(*q.shape, seed=77)
    lse_weights = normal(*q.shape[:3], seed=78)

    def total(arrays: list[mx.array]) -> mx.array:
        given: dict[str, Any] = dict(zip(names, arrays[3:], strict=True))
        features = config_features(c) | {"inputs": dataclasses.replace(inputs, **given)}
        out, lse = attention_mlx(*arrays[:3], scale=SCALE, **features)
        return (out * weights).sum() + mx.where(mx.isfinite(lse), lse * lse_weights, 0.0).sum()

    arrays = [q, k, v, *(getattr(inputs, n) for n in names)]
    gradients = mx.grad(total)(arrays)

    def exact(step: float, place: int, direction: NDArray[np.float64]) -> float:
        moved: list[Any] = [np.array(a, dtype=np.float64) for a in arrays]
        moved[place] = moved[place] + step * direction
        given: dict[str, Any] = dict(zip(names, moved[3:], strict=True))
        features = config_features(c) | {"inputs": dataclasses.replace(inputs, **given)}
        out, lse = attention_float64(*moved[:3], scale=SCALE, **features)
        finite = np.where(np.isfinite(lse), lse * np.array(lse_weights), 0.0)
        return float((out * np.array(weights)).sum() + finite.sum())

    for place, gradient in enumerate(gradients):
        assert np.isfinite(np.array(gradient)).all()
        direction = np.array(normal(*gradient.shape, seed=50 + place), dtype=np.float64)
        slope = (exact(1e-3, place, direction) - exact(-1e-3, place, direction)) / 2e-3
        found = float((np.array(gradient, dtype=np.float64) * direction).sum())
        assert found == pytest.approx(slope, rel=1e-3, abs=1e-3)


def test_captured_places_have_no_gradient_and_what_lies_there_has() -> None:
    """A kernel's gradient asks for those of all captured arrays, of integers too."""
    table, which = normal(5, seed=4), mx.array([4, 0, 1, 0, 2, 4, 3, 0, 1])
    graph = trace(lambda s, b, h, i, j: s + table[which[i]] * j, "score_mod")
    c = AttentionConfig(8, "float32", score_mod=graph.graph.text)
    q, k, v = (normal(1, 1, 9, 8, seed=n) for n in range(3))

    def total(q: mx.array, *arrays: mx.array) -> mx.array:
        features = config_features(c) | {"inputs": Inputs(score=arrays)}
        return attention_mlx(q, k, v, scale=SCALE, **features)[0].square().sum()

    _, gradients = mx.vjp(total, [q, *graph.arrays], [mx.array(1.0)])
    shown = {a.shape: np.array(g) for a, g in zip(graph.arrays, gradients[1:], strict=True)}
    assert not shown[(9,)].any() and np.abs(shown[(5,)]).max() > 1e-3


def test_no_contents_are_looked_at() -> None:
    """While mx.compile traces arrays have no contents: a look at one raises."""
    for fields in COMBINED.values():
        c = AttentionConfig(64, "float32", **fields)
        q, k, v, inputs = sample_call(c, batch=2, q_len=9, kv_len=20)

        def call(*arrays: mx.array, c: AttentionConfig = c, inputs: Inputs = inputs) -> mx.array:
            features = config_features(c) | {"inputs": inputs.replaced(arrays[3:])}
            return attention_mlx(*arrays[:3], scale=SCALE, **features)[0]

        assert mx.compile(call)(q, k, v, *inputs.arrays).shape == (*q.shape[:3], c.v_dim)


def test_the_test_before_would_notice_a_look() -> None:
    with pytest.raises(ValueError, match="eval"):
        mx.compile(lambda x: x * x.sum().item())(mx.ones(3))


def v_width(c: AttentionConfig) -> int:
    return c.v_dim


BY_FORMULA: dict[str, dict[str, Any]] = {
    **FEATURES,
    **{
        f"function {n}": {"score_mod": score, "mask_mod": mask}
        for n, (score, mask) in enumerate(zip(*functions(), strict=True))
    },
}


@pytest.mark.parametrize("blocks", [1, 2], ids=["whole", "in blocks"])
@pytest.mark.parametrize("name", BY_FORMULA)
def test_gradients_in_plain_mlx_are_those_of_the_formulas_in_float64(
    name: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and in blocks of queries, the second of which is smaller."""
    if blocks > 1:
        monkeypatch.setattr(plain_gradients, "MOST_SCORES", 16)  # 16 rows is the least
    config = AttentionConfig(64, "float32", heads_per_kv=2, return_lse=True, **BY_FORMULA[name])
    q, k, v, inputs = sample_call(config, batch=3, q_len=21, kv_len=37, seed=1)
    features = config_features(config) | {"inputs": inputs}
    dout, dlse = normal(*q.shape[:3], 64, seed=2), normal(*q.shape[:3], seed=3)
    out, lse = attention_mlx(q, k, v, scale=SCALE, **features)
    dlse = mx.where(mx.isfinite(lse), dlse, 0.0)
    exact = gradients_float64(q, k, v, (dout, dlse), scale=SCALE, **features)
    found = gradients_mlx(q, k, v, (out, lse), (dout, dlse), scale=SCALE, **features)
    names = ["q", "k", "v", *(f"score[{n}]" for n in range(len(inputs.score)))]
    names += [*("" for _ in inputs.mask), *inputs.named]
    compared = set(exact) - ({"k", "v"} if config.page_size or config.kv_bits else set())
    assert compared >= {"q"} | ({"sinks"} if config.sinks else set())
    for name, array in zip(names, found, strict=True):
        if name in compared and exact[name].any():  # integers have none
            own = mx.where(mx.isnan(array), 0.0, array)  # of what no kernel may look at
            assert relative_error(own, exact[name]) <= 2e-5, name


def test_memory_of_gradients_in_blocks_grows_with_the_length_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plain_gradients, "MOST_SCORES", 1 << 17)

    def peak(length: int) -> int:
        config = AttentionConfig(8, "float32", score_mod=functions()[0][1], causal=True)
        q, k, v, inputs = sample_call(config, q_len=length, kv_len=length, ragged=False)
        lse = mx.full(q.shape[:3], 5.0)
        mx.eval(q, k, v, lse, *inputs.score)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        features = config_features(config) | {"inputs": inputs}
        mx.eval(gradients_mlx(q, k, v, (q, lse), (q, None), scale=SCALE, **features))
        return mx.get_peak_memory() - before

    assert peak(2048) < 2.5 * peak(1024)
