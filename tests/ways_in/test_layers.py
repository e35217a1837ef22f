"""Layers of metalgen.nn: MLX's weights and numbers, more options, and models exchanged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from flash_cases import Asked, attention, exact, mask_and_bias
from mlx.utils import tree_flatten

import metalgen
from metalgen import ArgumentError
from metalgen.nn import (
    FlashAttentionBenchmark,
    MLXFlashAttention,
    MultiHeadAttention,
    OptimizedMLXMultiHeadAttention,
    optimize,
)
from metalgen.testing.devices import normal

X = normal((2, 9, 64), "float32", 1)


def close(got: Any, wanted: Any, atol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=0, atol=atol)


MASKS: dict[str, Any] = {
    "none": None,
    "causal": "causal",
    "booleans": mx.arange(9) <= mx.arange(9)[:, None],
    "MLX's own": nn.MultiHeadAttention.create_additive_causal_mask(9),
}


@pytest.mark.parametrize("mask", MASKS)
def test_it_is_mlx_s_layer_with_mlx_s_weights(device: str, mask: str) -> None:
    own = nn.MultiHeadAttention(64, 4, value_dims=32, bias=True)
    ours = MultiHeadAttention(64, 4, value_dims=32, bias=True, device=device)
    names = [[name for name, _ in tree_flatten(layer.parameters())] for layer in (own, ours)]
    assert names[0] == names[1]
    ours.update(own.parameters())
    close(ours(X, X, X, MASKS[mask]), own(X, X, X, MASKS[mask]))
    assert metalgen.stats().metalgen == 1
    half = MultiHeadAttention(64, 4, device=device)
    half.set_dtype(mx.float16)
    assert half(*[X.astype(mx.float16)] * 3, MASKS[mask]).dtype == mx.float16


def by_definition(layer: Any, ask: Asked, kv_heads: int) -> Any:
    q, k, v = (
        exact(proj(X)).reshape(2, 9, heads, -1)
        for proj, heads in (
            (layer.query_proj, 4),
            (layer.key_proj, kv_heads),
            (layer.value_proj, kv_heads),
        )
    )
    found = []
    for b in range(2):
        seen, bias = mask_and_bias(ask, b, 4, 9, 9)
        found.append(attention(q[b], k[b], v[b], seen, bias, ask.softcap)[0])
    return layer.out_proj(mx.array(np.float32(found)).reshape(2, 9, -1))


def test_options_are_those_of_attention(device: str) -> None:
    layer = MultiHeadAttention(
        *(64, 4),
        num_kv_heads=2,
        causal=True,
        window=(3, None),
        softcap=2.0,
        alibi=True,
        device=device,
    )
    slopes = exact(metalgen.alibi_slopes(4))
    ask = Asked(True, (3, -1), 2.0, slopes)
    close(layer(X, X, X), by_definition(layer, ask, 2))
    dropping = MultiHeadAttention(64, 4, dropout=0.5)
    assert not mx.array_equal(dropping(X, X, X), dropping(X, X, X))
    dropping.eval()
    close(dropping(X, X, X), by_definition(dropping, Asked(), 4))
    with pytest.raises(ArgumentError, match="num_kv_heads: expected a number that divides the 4"):
        MultiHeadAttention(64, 4, num_kv_heads=3)
    with pytest.raises(ArgumentError, match="rope: expected a mlx.nn.RoPE"):
        MultiHeadAttention(64, 4, rope=10000.0)


def test_a_cache_gives_step_by_step_what_one_call_gives() -> None:
    layer = MultiHeadAttention(64, 4, causal=True, rope=nn.RoPE(16, traditional=True))
    whole = layer(X, X, X)
    cache = metalgen.KVCache()
    steps = [layer(*[X[:, s]] * 3, cache=cache) for s in (slice(0, 5), slice(5, 6), slice(6, 9))]
    close(mx.concatenate(steps, axis=1), whole)
    with pytest.raises(ArgumentError, match="cache: expected a metalgen.KVCache"):
        layer(X, X, X, cache={})


class Own(nn.Module):  # type: ignore[misc, name-defined]
    """A model's own attention, which looks MLX's function up when it is called."""

    def __call__(self, x: mx.array) -> mx.array:
        heads = x.reshape(*x.shape[:2], 4, 16).swapaxes(1, 2)
        out = mx.fast.scaled_dot_product_attention(heads, heads, heads, scale=0.25)
        return out.swapaxes(1, 2).reshape(x.shape)


class ByHandAttention(nn.Module):  # type: ignore[misc, name-defined]
    def __call__(self, x: mx.array) -> mx.array:
        return mx.softmax(x @ x.swapaxes(1, 2), axis=-1) @ x


class Model(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(2, 64, 4)
        self.rest = [Own(), ByHandAttention()]

    def __call__(self, x: mx.array) -> mx.array:
        x = self.encoder(x, "causal")
        for layer in self.rest:
            x = layer(x)
        return x


def test_a_model_is_exchanged_in_place_counted_and_put_back(device: str) -> None:
    model = Model()
    wanted = model(X)
    weights = tree_flatten(model.parameters())
    found = optimize(model, device=device)
    assert found.replaced == {"MultiHeadAttention": 2, "Own": 1}
    assert found.left == {"ByHandAttention": 1}
    assert str(found).startswith("3 attention modules compute by metalgen\n")
    close(model(X), wanted)
    assert metalgen.stats().metalgen == 3
    assert not metalgen.is_installed()
    for (name, x), (other, y) in zip(tree_flatten(model.parameters()), weights, strict=True):
        assert name == other
        assert x is y
    assert optimize(model, device=device).replaced == {}
    assert found.undo() == 3
    assert type(model.rest[0]) is Own
    close(model(X), wanted)
    assert metalgen.stats().metalgen == 3
    with optimize(model):
        assert isinstance(model.encoder.layers[0].attention, MultiHeadAttention)
    assert type(model.encoder.layers[0].attention) is nn.MultiHeadAttention  # type: ignore[attr-defined]
    with pytest.raises(ArgumentError, match="model: expected a mlx.nn.Module"):
        optimize(3)


def test_a_model_that_is_exchanged_trains_as_it_did(device: str) -> None:
    model = Model()

    def loss(model: Any) -> mx.array:
        return (model(X) ** 2).mean()

    wanted = nn.value_and_grad(model, loss)(model)[1]
    with optimize(model, device=device):
        got = nn.value_and_grad(model, loss)(model)[1]
    for (_, x), (_, y) in zip(tree_flatten(got), tree_flatten(wanted), strict=True):
        close(x, y, 1e-4)


def test_the_first_script_s_layer_attends_across_positions(device: str) -> None:
    q, k, v = (normal((2, 9, 4, 32), "float32", n) for n in range(3))
    for block in (None, 32):
        layer = MLXFlashAttention(32, block_size=block, device=device)
        for mask, ask in (
            (None, Asked()),
            ("causal", Asked(True)),
            (MASKS["booleans"], Asked(True)),
            (MASKS["MLX's own"], Asked(True)),
        ):
            out = layer(q, k, v, mask)
            for b in range(2):
                seen, bias = mask_and_bias(ask, b, 4, 9, 9)
                wanted = attention(*(exact(x)[b] for x in (q, k, v)), seen, bias)[0]
                close(out[b], wanted)
    assert metalgen.stats().metalgen == metalgen.stats().calls == 8


def test_a_block_size_pins_the_schedule(device: str) -> None:
    layer = MLXFlashAttention(64, block_size=32, device=device)
    assert "schedule: 32x32x64" in layer.explain()
    assert repr(layer) == "MLXFlashAttention(head_dim=64, block_size=32 (pinned))"
    free = MLXFlashAttention(64, device=device)
    assert (
        free.block_size
        == metalgen.get_kernel(metalgen.AttentionConfig(64), device=device).schedule.bq
    )
    assert "chosen by the tuner" in repr(free)
    with pytest.raises(ArgumentError, match=r"block_size: expected one of 8, 16, 32, 64, for"):
        MLXFlashAttention(64, block_size=48)
    with pytest.raises(ArgumentError, match="block_size: expected an integer"):
        MLXFlashAttention(64, block_size="large")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"queries: expected an array \(B, L, H, 64\)"):
        free(X, X, X)


def test_the_optimized_layer_is_the_same_with_and_without(device: str) -> None:
    ours = OptimizedMLXMultiHeadAttention(64, 4, bias=True, device=device)
    plain = OptimizedMLXMultiHeadAttention(64, 4, bias=True, use_flash_attention=False)
    plain.update(ours.parameters())
    names = {name.split(".")[0] for name, _ in tree_flatten(ours.parameters())}
    assert names == {"q_proj", "k_proj", "v_proj", "out_proj"}
    for mask in (None, "causal", MASKS["booleans"]):
        close(ours(X, mask), plain(X, mask))
    cache = metalgen.KVCache()
    steps = [ours(X[:, s], "causal", cache) for s in (slice(0, 5), slice(5, 9))]
    close(mx.concatenate(steps, axis=1), plain(X, "causal"))
    with pytest.raises(ValueError, match="num_heads: expected a number that divides dims"):
        OptimizedMLXMultiHeadAttention(64, 3)


def test_the_benchmark_compares_layers_that_compute_the_same(
    the_simulator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = FlashAttentionBenchmark(device=the_simulator)
    bench.print_summary()
    results = bench.benchmark_attention_performance([1], [16, 32], [32], 2, 2)
    assert set(results) == {(1, 16, 32), (1, 32, 32)}
    assert all(row["max_difference"] < 1e-5 for row in results.values())
    assert all(row["computed_by_metalgen"] for row in results.values())
    bench.print_summary()
    bench.save_results(tmp_path / "found.json")
    saved = json.loads((tmp_path / "found.json").read_text())
    assert set(saved) == {"system_info", "benchmark_results", "timestamp"}
    assert set(saved["benchmark_results"]) == {"1_16_32", "1_32_32"}
    assert [path.name for path in tmp_path.iterdir()] == ["found.json"]
    printed = capsys.readouterr().out
    assert "No results" in printed
    assert "metalgen's kernels computed 2 of them" in printed
