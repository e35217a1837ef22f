"""Patched models give mlx-lm's own logits, over every cache, with no boolean mask on the way."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo

from metalgen.mlx_lm import adapted, patch, stats, unpatch

KINDS = ("own", "batch", "quantized", "rotating", "concatenating")
NOT_BY_MLX_LM = {
    ("gemma2", "batch"),
    ("gemma2", "quantized"),
    ("gpt_oss", "quantized"),
    ("deepseek_v3", "quantized"),
    ("glm4_moe_lite", "quantized"),
}
"""What mlx-lm refuses, or gets wrong; see `metalgen.mlx_lm.FAULTS`."""
OTHER_ROWS = {(name, "quantized") for name in ("deepseek_v2", "minicpm3", "youtu_llm")}
"""Where mlx-lm quantizes keys and values of every head, and ours the latent rows they come from."""
NEVER = {("phi", "quantized"), ("stablelm", "quantized")}
"""What no attention can mend: these models compute with the keys that the cache returns."""
CASES = [(name, kind) for name in zoo.OTHERS for kind in KINDS if (name, kind) not in NEVER]


def largest(x: mx.array) -> float:
    return float(mx.abs(x).max().item())


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_logits_are_mlx_lms_own(name: str, kind: str, own_database: Path) -> None:
    built = zoo.model(name)
    batch = 2 if kind == "batch" else 1
    valid = slice(3 if kind == "batch" else 0, None)
    own = None
    if (name, kind) not in NOT_BY_MLX_LM | OTHER_ROWS:
        own = zoo.logits(built, zoo.caches(built, kind), batch)[:, valid]
    patch(device="reference")
    ours = zoo.logits(built, zoo.caches(built, kind), batch)[:, valid]
    found = stats()
    assert found.calls == len(zoo.STEPS) * len(built.layers)
    assert found.own == {}
    assert found.boolean_masks == 0
    if own is not None:
        assert largest(ours - own) <= 1e-5 * max(1.0, largest(own))
    else:
        assert mx.isfinite(ours).all().item()


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v2", "deepseek_v3", "gpt_oss", "minicpm3"])
def test_a_quantized_cache_that_is_ours_alone_is_close_to_a_plain_one(
    name: str, own_database: Path
) -> None:
    built = zoo.model(name)
    plain = zoo.logits(built, zoo.caches(built, "own"))
    patch(device="reference")
    quantized = zoo.logits(built, zoo.caches(built, "quantized"))
    assert 0 < largest(quantized - plain) < 0.05 * largest(plain)


def test_gemma_2_in_a_padded_batch_says_what_each_sequence_says_alone(own_database: Path) -> None:
    built = zoo.model("gemma2")
    module: Any = importlib.import_module("mlx_lm.models.cache")
    mx.random.seed(3)
    tokens = mx.random.randint(0, zoo.VOCABULARY, (2, 20))
    alone = [built(tokens[:1, 5:]), built(tokens[1:])]
    patch(device="reference")
    held = [module.BatchKVCache([5, 0]) for _ in built.layers]
    both = built(tokens, cache=held)
    assert largest(both[:1, 5:] - alone[0]) < 1e-5 * largest(alone[0])
    assert largest(both[1:] - alone[1]) < 1e-5 * largest(alone[1])


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_v3"])
def test_a_cache_that_mlx_lm_filled_goes_on(name: str, own_database: Path) -> None:
    built = zoo.model(name)
    own = zoo.logits(built, zoo.caches(built, "own"))
    held = zoo.caches(built, "own")
    mx.random.seed(7)
    tokens = mx.random.randint(0, zoo.VOCABULARY, (1, sum(zoo.STEPS)))
    parts = [built(tokens[:, :17], cache=held)]
    patch(device="reference")
    parts.append(built(tokens[:, 17:26], cache=held))
    parts.append(built(tokens[:, 26:27], cache=held))
    assert adapted() == (name,)
    assert largest(mx.concatenate(parts, axis=1) - own[:, :27]) < 1e-5 * largest(own)


@pytest.mark.parametrize("name", ["deepseek_v2", "minicpm3", "youtu_llm"])
def test_a_cache_of_latent_rows_takes_the_place_of_every_heads_keys(
    name: str, own_database: Path
) -> None:
    built = zoo.model(name)
    own, ours = zoo.caches(built, "own"), zoo.caches(built, "own")
    zoo.logits(built, own)
    with patch(device="reference"):
        zoo.logits(built, ours)
    kept = [sum(x.shape[1] * x.shape[3] for x in (held[0].keys, held[0].values))
            for held in (own, ours)]  # fmt: skip
    assert kept == [4 * (64 + 32), 1 * (96 + 32)]


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_of_all_heads_together_are_read_by_head(
    bits: int, own_database: Path
) -> None:
    built = zoo.model("minicpm3")
    nn.quantize(built, group_size=32, bits=bits)
    own = zoo.logits(built, zoo.caches(built, "own"))
    patch(device="reference")
    ours = zoo.logits(built, zoo.caches(built, "own"))
    assert largest(ours - own) < 1e-5 * max(1.0, largest(own))


def test_a_layer_with_an_adapter_keeps_the_keys_of_every_head(own_database: Path) -> None:
    class Adapter(nn.Module):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__()
            self.linear = base
            self.added = 0.1 * mx.random.normal(base.weight.shape)

        def __call__(self, x: mx.array) -> mx.array:
            return self.linear(x) + x @ self.added.T

    built = zoo.model("minicpm3")
    for layer in built.layers:
        layer.self_attn.kv_b_proj = Adapter(layer.self_attn.kv_b_proj)
    own = zoo.logits(built, zoo.caches(built, "own"))
    patch(device="reference")
    held = zoo.caches(built, "own")
    assert largest(zoo.logits(built, held) - own) < 1e-5 * max(1.0, largest(own))
    assert held[0].keys.shape[1] == 4


def test_17_queries_at_once_and_then_one(own_database: Path) -> None:
    steps = (30, 17, 1)
    for name in ("gemma3_text", "deepseek_v3"):
        built = zoo.model(name)
        own = zoo.logits(built, zoo.caches(built, "own"), steps=steps)
        with patch(device="reference"):
            ours = zoo.logits(built, zoo.caches(built, "own"), steps=steps)
        assert largest(ours - own) < 1e-5 * largest(own)


def test_unpatched_models_are_as_before(own_database: Path) -> None:
    built = zoo.model("gemma2")
    before = zoo.logits(built, zoo.caches(built, "own"), steps=(9, 1))
    patch(device="reference")
    zoo.logits(built, zoo.caches(built, "own"), steps=(9, 1))
    base: Any = importlib.import_module("mlx_lm.models.base")
    llama: Any = importlib.import_module("mlx_lm.models.llama")
    assert base.scaled_dot_product_attention.__module__ == "metalgen.mlx_lm.attention"
    assert unpatch() and not unpatch()
    for module in (base, llama):
        assert module.scaled_dot_product_attention.__module__ == "mlx_lm.models.base"
        assert module.create_attention_mask.__module__ == "mlx_lm.models.base"
    after = zoo.logits(built, zoo.caches(built, "own"), steps=(9, 1))
    assert (before == after).all().item()
    assert adapted() == ()


def test_without_a_gpu_and_a_named_device_mlx_lm_computes(
    own_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("METALGEN_DEVICE", raising=False)
    if mx.default_device().type == mx.DeviceType.gpu:
        pytest.skip("this machine has a GPU")
    built = zoo.model("gemma3_text")
    own = zoo.logits(built, zoo.caches(built, "batch"), 2)
    patch()
    ours = zoo.logits(built, zoo.caches(built, "batch"), 2)
    assert (own == ours).all().item()
    assert stats().own == {"there is no GPU here": stats().calls}
