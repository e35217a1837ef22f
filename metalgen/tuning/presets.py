"""Attention shapes of real models, as problems to tune.

Head counts and dimensions are those of each model's public ``config.json``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from metalgen.errors import ArgumentError, InvalidSchedule
from metalgen.families import AttentionFamily, Limits, default_schedule, get_tuned
from metalgen.families.backward import (
    BACKWARD_ALL,
    backward_config,
    backward_families,
    unsupported,
)
from metalgen.families.rules import device_kinds
from metalgen.families.sizes import DECODE_QUERIES, Problem
from metalgen.problem.config import AttentionConfig

PREFILL = (512, 2048, 8192)
"""Lengths of prompts: as many queries as keys."""
DECODE = (1024, 4096, 16384)
"""Lengths of caches that one query is compared with."""
DTYPES = ("float16", "bfloat16")


@dataclass(frozen=True)
class Layer:
    """One kind of attention layer.

    Args:
        heads, kv_heads: query heads, and the key/value heads that they share.
        head_dim: width of a query and key row.
        value_head_dim: of a value row; None means the same.
        window: keys that a query sees, its own the last of them; None: all up to its own.
        softcap: of the scores; None: none.
        sinks: whether each query head has a logit that takes part in the softmax.
        label: what tells it from the model's other layers.
        decode_only, prefill_only: whether the layer has this shape in one of the two only.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_head_dim: int | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    label: str = ""
    decode_only: bool = False
    prefill_only: bool = False


@dataclass(frozen=True)
class Model:
    """A model and its kinds of attention layers."""

    name: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True)
class Preset:
    """What `metalgen tune --preset` runs.

    Args:
        name: as the user gives it; None for a shape of your own.
        problems: each once, in order.
        models: names of the models that each problem comes from, by the problem's key.
    """

    name: str | None
    problems: tuple[Problem, ...]
    models: dict[str, tuple[str, ...]] = field(default_factory=dict, compare=False)

    def within(self, limits: Limits) -> Preset:
        """The same without problems of gradients of which a chip has no kernels."""

        def has_kernels(problem: Problem) -> bool:
            if isinstance(get_tuned(problem.family), AttentionFamily):
                return True
            if not device_kinds(limits, problem.family):
                return False
            try:
                default_schedule(problem.config, limits, problem.family)
            except InvalidSchedule:
                return False
            return True

        return replace(self, problems=tuple(filter(has_kernels, self.problems)))


def _model(name: str, heads: int, kv_heads: int, head_dim: int) -> Model:
    return Model(name, (Layer(heads, kv_heads, head_dim),))


def _gemma_2(name: str, heads: int, kv_heads: int, head_dim: int) -> Model:
    return Model(
        name,
        (
            Layer(heads, kv_heads, head_dim, softcap=50.0, label="global"),
            Layer(heads, kv_heads, head_dim, window=4096, softcap=50.0, label="local"),
        ),
    )


def _gemma_3(name: str, heads: int, kv_heads: int, head_dim: int, window: int) -> Model:
    return Model(
        name,
        (
            Layer(heads, kv_heads, head_dim, label="global"),
            Layer(heads, kv_heads, head_dim, window=window, label="local"),
        ),
    )


def _gpt_oss(name: str) -> Model:
    return Model(
        name,
        (
            Layer(64, 8, 64, sinks=True, label="full"),
            Layer(64, 8, 64, window=128, sinks=True, label="banded"),
        ),
    )


MODELS = (
    _model("llama-3-8b", 32, 8, 128),
    _model("llama-3-70b", 64, 8, 128),
    _model("llama-3.2-1b", 32, 8, 64),
    _model("llama-3.2-3b", 24, 8, 128),
    _model("qwen2.5-0.5b", 14, 2, 64),
    _model("qwen2.5-1.5b", 12, 2, 128),
    _model("qwen2.5-3b", 16, 2, 128),
    _model("qwen2.5-7b", 28, 4, 128),
    _model("qwen2.5-14b", 40, 8, 128),
    _model("qwen2.5-32b", 40, 8, 128),
    _model("qwen2.5-72b", 64, 8, 128),
    _model("qwen3-0.6b", 16, 8, 128),
    _model("qwen3-1.7b", 16, 8, 128),
    _model("qwen3-4b", 32, 8, 128),
    _model("qwen3-8b", 32, 8, 128),
    _model("qwen3-14b", 40, 8, 128),
    _model("qwen3-32b", 64, 8, 128),
    _model("qwen3-30b-a3b", 32, 4, 128),
    _model("qwen3-235b-a22b", 64, 4, 128),
    Model("mistral-7b-v0.1", (Layer(32, 8, 128, window=4096),)),
    _model("mistral-7b-v0.3", 32, 8, 128),
    _gemma_2("gemma-2-2b", 8, 4, 256),
    _gemma_2("gemma-2-9b", 16, 8, 256),
    _gemma_2("gemma-2-27b", 32, 16, 128),
    _gemma_3("gemma-3-270m", 4, 1, 256, 512),
    _gemma_3("gemma-3-1b", 4, 1, 256, 512),
    _gemma_3("gemma-3-4b", 8, 4, 256, 1024),
    _gemma_3("gemma-3-12b", 16, 8, 256, 1024),
    _gemma_3("gemma-3-27b", 32, 16, 128, 1024),
    Model("phi-3-mini-4k", (Layer(32, 32, 96, window=2047),)),
    _model("phi-3.5-mini", 32, 32, 96),
    _model("phi-3-medium-128k", 40, 10, 128),
    _model("phi-4", 40, 10, 128),
    _model("phi-4-mini", 24, 8, 128),
    _model("tinyllama-1.1b", 32, 4, 64),
    _model("smollm2-135m", 9, 3, 64),
    _model("smollm2-360m", 15, 5, 64),
    _model("smollm2-1.7b", 32, 32, 64),
    _gpt_oss("gpt-oss-20b"),
    _gpt_oss("gpt-oss-120b"),
    Model(
        "deepseek-v3",
        (
            Layer(128, 128, 192, 128, label="expanded", prefill_only=True),
            Layer(128, 1, 576, 512, label="absorbed", decode_only=True),
        ),
    ),
)
"""Every model that has a preset of its own name; ``all`` is all of them."""

DEFAULT_MODELS: dict[str, tuple[str, ...]] = {
    "llama-3.2-1b": DTYPES,
    "llama-3-8b": DTYPES,
    "gemma-2-9b": ("bfloat16",),
    "gemma-3-4b": ("bfloat16",),
    "gpt-oss-20b": ("bfloat16",),
    "smollm2-135m": DTYPES,
}
"""Current models of the usual shapes, with a softcap, windows and sinks where they have them; and
types: the published one, and for the commonest also float16."""
DEFAULT_PREFILL, DEFAULT_DECODE = (2048,), (4096,)
DEFAULT_QUANTIZED = {"llama-3.2-1b": (8, 4), "llama-3-8b": (8, 4)}
"""Bits of quantized keys and values that the default preset has problems of, by model."""
KV_GROUP = 64
"""Elements of a group of quantized keys, as in mlx-lm."""


def preset_names() -> tuple[str, ...]:
    """What `preset` takes: ``default``, ``all``, families such as ``qwen3``, and models."""
    return ("default", "all", *_FAMILIES, *(m.name for m in MODELS))


_FAMILIES = (
    *("llama-3", "qwen2.5", "qwen3", "mistral", "gemma-2", "gemma-3", "phi", "tinyllama"),
    *("smollm2", "gpt-oss", "deepseek"),
)


def preset(name: str) -> Preset:
    """The problems of a preset.

    ``default`` is what most users need first: prefill and decode of `DEFAULT_MODELS`, and the same
    over quantized keys and values for some of them. All others are the named models in prefill and
    decode lengths.

    Raises:
        ArgumentError: an unknown name, with the nearest ones.
    """
    models = {m.name: m for m in MODELS}
    if name == "default":
        chosen = [models[m] for m in DEFAULT_MODELS]
        found = _collect(name, chosen, DEFAULT_PREFILL, DEFAULT_DECODE, DEFAULT_QUANTIZED)
        return _of_types(found, DEFAULT_MODELS)
    if name == "all":
        return _collect(name, MODELS, PREFILL, DECODE)
    if name in models:
        return _collect(name, [models[name]], PREFILL, DECODE)
    if name in _FAMILIES:
        members = [m for m in MODELS if m.name.startswith(name)]
        return _collect(name, members, PREFILL, DECODE)
    near = difflib.get_close_matches(str(name).lower(), preset_names(), n=3, cutoff=0.4)
    hint = f"; the nearest: {', '.join(near)}" if near else ""
    families = ", ".join(_FAMILIES)
    raise ArgumentError("preset", f"default, all, a family ({families}) or a model{hint}", name)


def of_gradients(chosen: Preset) -> Preset:
    """The problems of backward kernels that training with the problems of a preset has.

    Three for each problem of many queries: gradients of queries, of keys and values, and all of
    them at once, which not every chip has kernels for (`Preset.within`). (What LoRA and full
    fine-tuning differ in, the gradients of weights, is no attention.)

    Raises:
        ArgumentError: backward kernels support none of them.
    """
    sources: dict[Problem, tuple[str, ...]] = {}
    for problem in chosen.problems:
        bare = backward_config(problem.config)
        if problem.q_len <= DECODE_QUERIES or unsupported(bare):
            continue
        families = backward_families(bare)
        for family in (*families, BACKWARD_ALL)[: 3 if len(families) > 1 else 1]:
            own = replace(problem, config=bare, family=family.name)
            labels = chosen.models.get(problem.key, ())
            sources[own] = tuple(dict.fromkeys((*sources.get(own, ()), *labels)))
    if not sources:
        expected = "problems of more than 64 queries that backward kernels support"
        raise ArgumentError("backward", expected, ", ".join(map(str, chosen.problems)))
    return Preset(
        chosen.name,
        tuple(sources),
        {problem.key: labels for problem, labels in sources.items() if labels},
    )


def _collect(
    name: str,
    models: Iterable[Model],
    prefill: tuple[int, ...],
    decode: tuple[int, ...],
    quantized: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
) -> Preset:
    sources: dict[Problem, list[str]] = {}
    for model in models:
        for layer in model.layers:
            label = f"{model.name} {layer.label}".rstrip()
            bits = quantized.get(model.name, ())
            for problem in _problems(layer, prefill, decode, bits):
                sources.setdefault(problem, []).append(label)
    return Preset(
        name,
        tuple(sources),
        {problem.key: tuple(dict.fromkeys(labels)) for problem, labels in sources.items()},
    )


def _of_types(preset: Preset, dtypes: Mapping[str, tuple[str, ...]]) -> Preset:
    """The problems of a preset in the types that their models are wanted in."""
    kept = tuple(
        p
        for p in preset.problems
        if any(p.config.dtype in dtypes[label.split(" ")[0]] for label in preset.models[p.key])
    )
    return replace(preset, problems=kept, models={p.key: preset.models[p.key] for p in kept})


def _problems(
    layer: Layer, prefill: tuple[int, ...], decode: tuple[int, ...], quantized: tuple[int, ...]
) -> Iterable[Problem]:
    for dtype in DTYPES:
        config = AttentionConfig(
            head_dim=layer.head_dim,
            dtype=dtype,
            value_head_dim=layer.value_head_dim,
            heads_per_kv=layer.heads // layer.kv_heads,
            causal=True,
            window_left=None if layer.window is None else layer.window - 1,
            softcap=layer.softcap,
            sinks=layer.sinks,
        )
        packed = [replace(config, kv_bits=bits, kv_group=KV_GROUP) for bits in quantized]
        if not layer.decode_only:
            for n in prefill:
                yield from (Problem(each, layer.heads, n, n) for each in (config, *packed))
        if not layer.prefill_only:
            for n in decode:
                yield from (Problem(each, layer.heads, 1, n) for each in (config, *packed))
