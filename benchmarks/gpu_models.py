"""Whole models of mlx-lm on a GPU, with metalgen's attention and without, turn by turn.

    python -m benchmarks.gpu_models --output results.json            # every model and row
    python -m benchmarks.gpu_models --models gemma-2-9b --rows prefill --budget 500
    python -m benchmarks.gpu_models --tiny                           # a try, on any machine

Shapes are those of the named models, weights random (bfloat16), and there are as many layers as
`--layers` says, since one layer is like another. The rows of a model:

* ``prefill N``: one prompt of N tokens in pieces of 2,048, as mlx-lm makes them;
* ``padded``: four prompts of 1,024 to 4,096 tokens, padded on the left, in one batch;
* ``decode``: 256 tokens, one at a time, behind 4,096;
* ``8 bits``, ``4 bits``: a prompt of 16,384 tokens and 32 more, over quantized caches;
* ``LoRA``: a step of training on 4,096 tokens.

Both ways run alternately, each at least `--rounds` times, and more often while a row has taken
less than `--seconds`: decoding of one token at a time varies by several percent from run to run.
A row has the median of the tokens per second, their spread (half of the range over the median),
the peak of memory, and the median ratio of neighboring runs with its 95 % interval. What fails is
said, not left out. ``--twin`` compares logits: how far bfloat16 is, both ways, from a twin
in float32.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import json
import math
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from metalgen.bench.measuring import compare
from metalgen.mlx_lm import patch, stats

CHUNK = 2048
MOST_ROUNDS = 15
"""Rounds of a row at most."""
VOCABULARY = 32000
COMMON = {
    "vocab_size": VOCABULARY,  # the same for all, since attention is what is compared
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256.0,
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256.0,
        "sliding_window": 1024,
        "sliding_window_pattern": 6,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 8,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_scaling": None,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "deepseek-v2-lite": {
        "model_type": "deepseek_v2",
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_shared_experts": 2,
        "n_routed_experts": 8,
        "num_experts_per_tok": 6,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
}
"""Shapes from each model's public config.json; of the experts, fewer: they are the same work."""
TINY = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 256,
}
ROWS = ("prefill 4096", "prefill 16384", "prefill 65536", "padded", "decode", "8 bits", "4 bits")


def mlx_lm_models() -> None:
    """Make ``mlx_lm.models`` importable where what mlx-lm's programs need is not installed."""
    found = importlib.util.find_spec("mlx_lm")
    if found is None:
        sys.exit("mlx-lm is not installed: pip install mlx-lm")
    if importlib.util.find_spec("transformers") is None:
        package = types.ModuleType("mlx_lm")
        package.__path__ = list(found.submodule_search_locations or [])
        sys.modules["mlx_lm"] = package


def built(name: str, layers: int, tiny: bool, dtype: mx.Dtype = mx.bfloat16) -> Any:
    """A model of random weights, of unit variance behind every layer; the same for a name."""
    config = COMMON | MODELS[name] | {"num_hidden_layers": layers}
    if tiny:
        config |= TINY
        dtype = mx.float32  # MLX has no products of experts in 16 bits on CPUs
        if "sliding_window_pattern" in config:
            config["sliding_window_pattern"] = 2
    if config["model_type"] == "gpt_oss":
        config["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
    module: Any = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))

    def drawn(x: mx.array) -> mx.array:
        if x.ndim < 2:
            return x.astype(dtype)
        fresh = mx.random.normal(x.shape, mx.bfloat16) * x.shape[-1] ** -0.5
        fresh = fresh.astype(dtype)
        mx.eval(fresh)
        return fresh

    model.update(tree_map(drawn, model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def caches(model: Any, bits: int | None = None, padding: list[int] | None = None) -> list[Any]:
    """Caches as mlx-lm's programs make them: plain, quantized, or of a padded batch."""
    module: Any = importlib.import_module("mlx_lm.models.cache")
    found = module.make_prompt_cache(model)
    if bits is not None:
        found = [c.to_quantized(group_size=64, bits=bits) for c in found]
    if padding is not None:
        found = [
            module.BatchRotatingKVCache(c.max_size, padding)
            if isinstance(c, module.RotatingKVCache)
            else module.BatchKVCache(padding)
            for c in found
        ]
    return found


def prompt(model: Any, held: list[Any], tokens: mx.array) -> mx.array:
    """The logits of the last token of prompts, evaluated piece by piece."""
    out = None
    for start in range(0, tokens.shape[1], CHUNK):
        out = model(tokens[:, start : start + CHUNK], cache=held)[:, -1:]
        mx.eval(out, [c.state for c in held])
    assert out is not None
    return out


def steps(model: Any, held: list[Any], out: mx.array, count: int) -> None:
    """So many tokens behind a prompt, each the likeliest."""
    for _ in range(count):
        out = model(mx.argmax(out[:, -1:], axis=-1), cache=held)
        mx.eval(out)


class Adapted(nn.Module):  # type: ignore[misc, name-defined]
    """A linear layer with an adapter of rank 8."""

    def __init__(self, own: Any) -> None:
        super().__init__()
        rows, columns = own.weight.shape
        self.own = own
        self.a = mx.random.normal((columns, 8), own.weight.dtype) * columns**-0.5
        self.b = mx.zeros((8, rows), own.weight.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        out: mx.array = self.own(x) + (x @ self.a) @ self.b
        return out


def adapted(model: Any) -> Any:
    """A model whose attention has adapters, which alone are trained."""
    model.freeze()
    for layer in model.layers:
        for name in ("q_proj", "v_proj", "kv_b_proj"):
            if (own := getattr(layer.self_attn, name, None)) is not None:
                setattr(layer.self_attn, name, Adapted(own))
    model.train()
    return model


def row_of(model: Any, row: str, scale: int) -> tuple[int, Callable[[], float]]:
    """Tokens of a row, and what runs it and returns its seconds.

    `scale` divides all lengths, for a try on a small machine.
    """
    kind, _, number = row.partition(" ")

    def tokens(batch: int, length: int) -> mx.array:
        mx.random.seed(1)
        return mx.random.randint(0, 200, (batch, length))

    def seconds(begin: float) -> float:
        mx.synchronize()
        return time.perf_counter() - begin

    if kind == "prefill":
        length = int(number) // scale
        given = tokens(1, length)

        def prefill() -> float:
            begin = time.perf_counter()
            prompt(model, caches(model), given)
            return seconds(begin)

        return length, prefill
    if kind == "padded":
        length = 4096 // scale
        padding = [0, length // 4, length // 2, 3 * length // 4]
        given = tokens(4, length)

        def padded() -> float:
            begin = time.perf_counter()
            prompt(model, caches(model, padding=padding), given)
            return seconds(begin)

        return 4 * length - sum(padding), padded
    if kind == "decode":
        count, given = 256 // scale, tokens(1, 4096 // scale)

        def decode() -> float:
            held = caches(model)
            out = prompt(model, held, given)
            mx.synchronize()
            begin = time.perf_counter()
            steps(model, held, out, count)
            return seconds(begin)

        return count, decode
    if kind in ("8", "4"):
        length, count = 16384 // scale, 32 // min(scale, 8)
        given = tokens(1, length)

        def quantized() -> float:
            begin = time.perf_counter()
            held = caches(model, bits=int(kind))
            steps(model, held, prompt(model, held, given), count)
            return seconds(begin)

        return length + count, quantized
    raise AssertionError(row)


def lora_row(model: Any, scale: int) -> tuple[int, Callable[[], float]]:
    """A step of training of an `adapted` model."""
    mx.random.seed(1)
    given = mx.random.randint(0, 200, (1, 4096 // scale + 1))

    def loss(model: Any) -> mx.array:
        found: mx.array = nn.losses.cross_entropy(model(given[:, :-1]), given[:, 1:]).mean()
        return found

    step = nn.value_and_grad(model, loss)  # type: ignore[attr-defined]

    def once() -> float:
        begin = time.perf_counter()
        mx.eval(step(model))
        mx.synchronize()
        return time.perf_counter() - begin

    return given.shape[1] - 1, once


WAYS = ("mlx-lm", "metalgen")


@contextlib.contextmanager
def way(name: str, device: str | None) -> Iterator[None]:
    """mlx-lm as it is, or patched."""
    if name == "mlx-lm":
        yield
        return
    with patch(device=device):
        yield


def measured(
    make: Callable[[], tuple[int, Callable[[], float]]],
    rounds: int,
    seconds_of_row: float,
    device: str | None,
) -> dict[str, Any]:
    """Tokens per second, spread and peak memory of both ways, which take turns."""
    start = time.perf_counter()
    count, once = make()
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    peaks: dict[str, float] = {}
    failures: dict[str, str] = {}
    summary = ""
    begin = math.inf
    for number in range(MOST_ROUNDS + 1):  # the first round compiles
        if number > rounds and time.perf_counter() - begin > seconds_of_row:
            break
        if number == 1:
            begin = time.perf_counter()
        for name in WAYS if number % 2 else WAYS[::-1]:
            if name in failures:
                continue
            mx.clear_cache()
            mx.reset_peak_memory()
            try:
                with way(name, device):
                    seconds = once()
                    if name == "metalgen":
                        summary = stats().summary
            except Exception as error:
                failures[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                continue
            peaks[name] = max(peaks.get(name, 0.0), mx.get_peak_memory() / 1e9)
            if number:
                times[name].append(seconds)
    found: dict[str, Any] = {"tokens": count, "calls": summary}
    for name in WAYS:
        if name in failures or not times[name]:
            found[name] = {"failed": failures.get(name, "")}
            continue
        rates = [count / x for x in times[name]]
        middle = statistics.median(rates)
        found[name] = {
            "tokens_per_second": middle,
            "spread": (max(rates) - min(rates)) / 2 / middle,
            "peak_gb": peaks[name],
        }
    found["ratio"] = None
    if len(times[WAYS[0]]) == len(times[WAYS[1]]) > 0:
        ratio = compare(times[WAYS[1]], times[WAYS[0]])
        found["ratio"] = {"value": ratio.value, "low": ratio.low, "high": ratio.high}
    found["seconds"] = time.perf_counter() - start
    return found


def twin(name: str, layers: int, tiny: bool, device: str | None) -> dict[str, float]:
    """How far logits in bfloat16 are from those of a twin in float32, without metalgen and with."""
    length = 128 if tiny else 2048
    mx.random.seed(2)
    tokens = mx.random.randint(0, 200, (1, length))
    exact = built(name, layers, tiny, mx.float32)(tokens).astype(mx.float32)
    mx.eval(exact)
    model = built(name, layers, tiny)
    found = {}
    for own in WAYS:
        with way(own, device):
            logits = model(tokens).astype(mx.float32)
            mx.eval(logits)
        error = mx.linalg.norm(logits - exact) / mx.linalg.norm(exact)
        found[own] = float(error.item())
    return found


def line(model: str, row: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    cells = []
    for name in WAYS:
        own = found[name]
        if "failed" in own:
            cells += [f"fails: {own['failed']}", "-"]
        else:
            rate, spread = own["tokens_per_second"], own["spread"]
            cells += [f"{rate:,.0f} ±{spread:.0%}", f"{own['peak_gb']:.2f}"]
    ratio = "-"
    if (own := found["ratio"]) is not None:
        ratio = f"{own['value']:.2f}x [{own['low']:.2f}, {own['high']:.2f}]"
    return f"| {model} | {row} | " + " | ".join([*cells, ratio]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description="mlx-lm's models with metalgen and without")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rows", nargs="*", help="beginnings of rows' names; default: all")
    parser.add_argument("--layers", type=int, default=6, help="an even number; default: 6")
    parser.add_argument("--rounds", type=int, default=4, help="at least; default: 4")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a row, at least; default: 4")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds; then it ends")
    parser.add_argument("--device", help="what computes metalgen's attention; default: the GPU")
    parser.add_argument("--output", type=Path, help="a JSON file, written after each row")
    parser.add_argument("--twin", action="store_true", help="compare logits, and nothing else")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a try")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds: expected 2 or more, but got {arguments.rounds}")
    mlx_lm_models()
    begin = time.perf_counter()
    scale = 64 if arguments.tiny else 1
    results: dict[str, Any] = {}
    if not arguments.twin:
        print("| model | row | mlx-lm, tokens/s | GB | metalgen, tokens/s | GB | ratio |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in arguments.models:
        if arguments.twin:
            found: Any = twin(name, arguments.layers, arguments.tiny, arguments.device)
            results[name] = found
            print(f"{name}: " + ", ".join(f"{own} {x:.2e}" for own, x in found.items()), flush=True)
            continue
        model = built(name, arguments.layers, arguments.tiny)
        for row in (*ROWS, "LoRA"):
            if arguments.rows and not any(row.startswith(own) for own in arguments.rows):
                continue
            if time.perf_counter() - begin > arguments.budget:
                print("the budget is spent: what follows was not measured", file=sys.stderr)
                return 0
            if row == "LoRA":
                model = adapted(model)
                make = functools.partial(lora_row, model, scale)
            else:
                make = functools.partial(row_of, model, row, scale)
            found = measured(make, arguments.rounds, arguments.seconds, arguments.device)
            results.setdefault(name, {})[row] = found
            print(line(name, row, found), flush=True)
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n")
        del model
        mx.clear_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
