"""Six architectures, one for each class of cache, on a device's kernels (by default simulated)."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
import zoo

from metalgen.mlx_lm import patch, stats

STEPS = (13, 6, 1)
CASES = [
    ("llama", "own"),  # KVCache
    ("gpt_oss", "own"),  # RotatingKVCache, sinks
    ("olmo2", "batch"),  # BatchKVCache
    ("exaone4", "batch"),  # BatchRotatingKVCache
    ("qwen3", "quantized"),  # QuantizedKVCache
    ("gemma2", "concatenating"),  # ConcatenateKVCache, softcap
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_kernels_give_mlx_lms_own_logits(
    name: str, kind: str, device: str, own_database: Path
) -> None:
    built = zoo.model(name)
    batch, valid = (2, slice(3, None)) if kind == "batch" else (1, slice(None))
    own = zoo.logits(built, zoo.caches(built, kind), batch, STEPS)[:, valid]
    patch(device=device)
    ours = zoo.logits(built, zoo.caches(built, kind), batch, STEPS)[:, valid]
    found = stats()
    assert found.paths.metalgen == found.calls == len(STEPS) * len(built.layers)
    assert found.boolean_masks == 0 and found.own == {}
    assert mx.abs(ours - own).max().item() < 1e-5 * max(1.0, mx.abs(own).max().item())


def test_latent_attention_runs_in_both_forms(device: str, own_database: Path) -> None:
    built = zoo.model("deepseek_v3")
    own = zoo.logits(built, zoo.caches(built, "own"), 1, (70, 1))
    patch(device=device)
    ours = zoo.logits(built, zoo.caches(built, "own"), 1, (70, 1))
    assert stats().paths.metalgen == 4
    assert mx.abs(ours - own).max().item() < 1e-5 * mx.abs(own).max().item()
