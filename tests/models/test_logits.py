"""Patched models give mlx-lm's own logits, over every cache, with no boolean mask on the way."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
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
    if (name, kind) not in NOT_BY_MLX_LM:
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


@pytest.mark.parametrize("name", ["gemma2", "deepseek_v3", "gpt_oss"])
def test_where_mlx_lm_fails_a_quantized_cache_is_close_to_a_plain_one(
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


def test_a_cache_that_mlx_lm_filled_goes_on(own_database: Path) -> None:
    built = zoo.model("deepseek_v3")
    own = zoo.logits(built, zoo.caches(built, "own"))
    held = zoo.caches(built, "own")
    mx.random.seed(7)
    tokens = mx.random.randint(0, zoo.VOCABULARY, (1, sum(zoo.STEPS)))
    parts = [built(tokens[:, :17], cache=held)]
    patch(device="reference")
    parts.append(built(tokens[:, 17:26], cache=held))
    parts.append(built(tokens[:, 26:27], cache=held))
    assert adapted() == ("deepseek_v3",)
    assert largest(mx.concatenate(parts, axis=1) - own[:, :27]) < 1e-5 * largest(own)


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
