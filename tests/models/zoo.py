"""Tiny models of mlx-lm's architectures, with random weights."""

from __future__ import annotations

import importlib
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map

pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install --no-deps mlx-lm==0.32.2")

VOCABULARY = 64
COMMON = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "vocab_size": VOCABULARY,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "rope_scaling": None,
}
YARN = {
    "rope_scaling": {
        "type": "yarn",
        "factor": 2,
        "original_max_position_embeddings": 256,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
}
OTHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "phi": {"num_key_value_heads": 4},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16.0},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 12,
        "sliding_window_pattern": 3,
        "query_pre_attn_scalar": 16.0,
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": None,
    },
    "deepseek_v2": LATENT | YARN,
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
    "minicpm3": LATENT
    | {
        "dim_model_base": 128,
        "scale_depth": 1.4,
        "scale_emb": 1,
        "rope_scaling": {
            "original_max_position_embeddings": 256,
            "short_factor": [1.0] * 16,
            "long_factor": [1.0] * 16,
        },
    },
    "youtu_llm": LATENT | {"rope_traditional": True},
    "olmo2": {},
    "cohere2": {"sliding_window": 12, "sliding_window_pattern": 2},
    "exaone4": {
        "rope_scaling": None,
        "sliding_window": 12,
        "sliding_window_pattern": "LG",
    },
    "starcoder2": {},
    "stablelm": {
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.25,
        "use_qkv_bias": False,
        "qk_layernorm": False,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
    },
    "granite": {
        "logits_scaling": 1.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
    },
    "ministral3": {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "rope_theta": 10000.0,
            "type": "default",
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 256,
        },
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "helium": {},
    "olmo3": {
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "seed_oss": {"rope_scaling": None, "attention_out_bias": False},
}
"""What each architecture's config says beyond, or unlike, `COMMON`."""


def model(name: str, seed: int = 0, dtype: mx.Dtype = mx.float32) -> Any:
    """A tiny model of an architecture."""
    module: Any = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    config = module.ModelArgs.from_dict(COMMON | {"model_type": name} | OTHERS[name])
    made = module.Model(config)
    made.update(
        tree_map(
            lambda x: x if x.ndim < 2 else mx.random.normal(x.shape) * x.shape[-1] ** -0.5,
            made.parameters(),
        )
    )
    made.set_dtype(dtype)
    mx.eval(made.parameters())
    return made


def caches(built: Any, kind: str) -> list[Any]:
    """Caches of a kind for all layers of a model, as mlx-lm's programs make them."""
    module: Any = importlib.import_module("mlx_lm.models.cache")
    own = module.make_prompt_cache(built)
    if kind == "own":
        return own
    if kind == "quantized":
        return [
            module.QuantizedKVCache(group_size=32, bits=8) if type(c) is module.KVCache else c
            for c in own
        ]
    if kind == "batch":
        return [_batched(module, c, [3, 0]) for c in own]
    if kind == "rotating":
        return [module.RotatingKVCache(max_size=20, keep=4) for _ in own]
    if kind == "concatenating":
        return [module.ConcatenateKVCache() for _ in own]
    raise AssertionError(kind)


def _batched(module: Any, cache: Any, padding: list[int]) -> Any:
    if type(cache) is module.KVCache:
        return module.BatchKVCache(padding)
    return module.BatchRotatingKVCache(cache.max_size, padding)


STEPS = (17, 9, 1, 1, 4, 1)
"""Tokens of each call: a prompt in two pieces, steps of one, and one that checks four drafts."""


def logits(built: Any, held: list[Any] | None, batch: int = 1, steps: Any = STEPS) -> mx.array:
    """Those of all tokens, ``(B, L, vocabulary)``, over the calls of `steps`."""
    total = sum(steps)
    mx.random.seed(7)
    tokens = mx.random.randint(0, VOCABULARY, (batch, total))
    found, done = [], 0
    for count in steps:
        out = built(tokens[:, done : done + count], cache=held)
        out = out[0] if isinstance(out, tuple) else out
        mx.eval(out)
        found.append(out)
        done += count
    return mx.concatenate(found, axis=1)
