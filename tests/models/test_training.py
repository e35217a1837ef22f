"""Patched models train to the losses that mlx-lm's own attention trains to."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
import zoo

from metalgen.mlx_lm import patch, stats, unpatch

LENGTH, STEPS = 24, 10


def lora(built: Any, kind: str) -> Any:
    """A model with LoRA or DoRA layers in its attention; ``full``: all weights train."""
    if kind == "full":
        return built
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("needs pip install mlx-lm==0.32.2, with its dependencies")
    module: Any = importlib.import_module(f"mlx_lm.tuner.{'dora' if kind == 'dora' else 'lora'}")
    wrapper = module.DoRALinear if kind == "dora" else module.LoRALinear
    if kind == "qlora":
        nn.quantize(built, group_size=32, bits=4)
    built.freeze()
    for layer in built.layers:
        for name in ("q_proj", "v_proj"):
            own = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, wrapper.from_base(own, r=4))
    return built


def losses(name: str, kind: str, checkpoint: bool = False) -> list[float]:
    """Of ten steps on one batch of random tokens."""
    built = lora(zoo.model(name), kind)
    mx.random.seed(5)
    tokens = mx.random.randint(0, zoo.VOCABULARY, (2, LENGTH + 1))
    if checkpoint:
        layer = type(built.layers[0])
        own = layer.__call__
        layer.__call__ = lambda self, *x, **y: mx.checkpoint(
            lambda p, *a, **b: (self.update(p), own(self, *a, **b))[1]
        )(self.trainable_parameters(), *x, **y)

    def loss(model: Any) -> mx.array:
        return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:]).mean()

    optimizer = optim.SGD(learning_rate=0.001)
    step = nn.value_and_grad(built, loss)
    found = []
    try:
        for _ in range(STEPS):
            value, gradients = step(built)
            optimizer.update(built, gradients)
            mx.eval(built.parameters(), optimizer.state)
            found.append(value.item())
    finally:
        if checkpoint:
            layer.__call__ = own
    return found


@pytest.mark.parametrize(
    ("name", "kind", "checkpoint"),
    [
        ("llama", "lora", False),
        ("gemma2", "full", True),
        ("gemma3_text", "full", False),
        ("qwen3", "qlora", False),
        ("olmo2", "dora", False),
        ("gpt_oss", "full", False),
        ("deepseek_v3", "full", False),
    ],
)
def test_ten_steps_have_mlx_lms_own_losses(
    name: str, kind: str, checkpoint: bool, own_database: Path
) -> None:
    own = losses(name, kind, checkpoint)
    patch(device="reference")
    ours = losses(name, kind, checkpoint)
    assert stats().calls > 0 and stats().boolean_masks == 0
    assert own[-1] < own[0]
    assert ours[:3] == pytest.approx(own[:3], abs=2e-5)
    assert ours == pytest.approx(own, abs=2e-3)  # steep losses amplify the last digits


def test_two_steps_on_the_kernels(device: str, own_database: Path) -> None:
    global STEPS
    STEPS = 2
    try:
        own = losses("gemma2", "full")
        patch(device=device)
        ours = losses("gemma2", "full")
        assert stats().paths.metalgen == stats().calls == 4
    finally:
        STEPS = 10
        unpatch()
    assert ours == pytest.approx(own, abs=1e-4)
