"""mlx-lm's models on metalgen's attention: `metalgen.mlx_lm.patch` is all that a program needs.

    pip install mlx-lm
    python examples/patch_mlx_lm.py            # in the simulator, or: ... patch_mlx_lm.py metal

This compares the logits of a small Llama with random weights, over each of mlx-lm's caches, and
says which masks reached attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import mlx.core as mx

import metalgen.mlx_lm


def logits(model: Any, make_cache: Callable[[], Any]) -> mx.array:
    """Those of a prompt of 40 tokens, and of three steps behind it."""
    cache = [make_cache() for _ in model.layers]
    tokens = mx.arange(43)[None]
    parts = [model(tokens[:, :40], cache=cache)]
    parts += [model(tokens[:, n : n + 1], cache=cache) for n in (40, 41, 42)]
    return mx.concatenate(parts, axis=1)


def main() -> int:
    try:
        cache: Any = import_module("mlx_lm.models.cache")
        llama: Any = import_module("mlx_lm.models.llama")
    except ModuleNotFoundError as missing:
        sys.exit(f"mlx-lm and what it needs are not installed ({missing}): pip install mlx-lm")

    mx.random.seed(0)
    shape = llama.ModelArgs(
        model_type="llama",
        hidden_size=256,
        num_hidden_layers=2,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=64,
    )
    model = llama.Model(shape)
    model.set_dtype(mx.float16)
    caches: dict[str, Callable[[], Any]] = {
        "KVCache": cache.KVCache,
        "RotatingKVCache": lambda: cache.RotatingKVCache(max_size=24),
        "QuantizedKVCache": lambda: cache.QuantizedKVCache(group_size=64, bits=8),
    }
    own = {name: logits(model, make) for name, make in caches.items()}
    mx.eval(own)
    metalgen.mlx_lm.patch(device=sys.argv[1] if len(sys.argv) > 1 else "simulator")
    errors = []
    for name, make in caches.items():
        difference = mx.linalg.norm((logits(model, make) - own[name]).astype(mx.float32))
        error: Any = (difference / mx.linalg.norm(own[name].astype(mx.float32))).item()
        print(f"{name}: {own[name].shape}, {error:.1e} from mlx-lm's own attention")
        errors.append(error)
    print(metalgen.mlx_lm.stats())
    return 0 if all(0 < error < 5e-3 for error in errors) else 1


if __name__ == "__main__":
    sys.exit(main())
