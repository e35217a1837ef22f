"""What a model of mlx-lm calls, found without its weights: MLX is lazy, and nothing is computed."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from metalgen.calls.recording import record
from metalgen.errors import ArgumentError
from metalgen.families.sizes import Problem
from metalgen.mlx_lm import attention
from metalgen.mlx_lm.patching import patch, unpatch
from metalgen.tuning.presets import DECODE, PREFILL

CHUNK = 2048
"""Tokens of a prompt that mlx-lm's programs process at once."""


def problems_of(path: Path) -> tuple[str, tuple[Problem, ...]]:
    """The model's name, and the problems that its prompts and steps are, the costliest first.

    The model is built from its ``config.json`` with weights that are never made, and called with
    prompts (`metalgen.tuning.presets.PREFILL`, in pieces as mlx-lm makes them) and single tokens
    behind (`DECODE`), over the caches that it makes: so windows, sinks, softcaps and the widths of
    each layer are those that it will call with.

    Args:
        path: a model's folder, or its ``config.json``.

    Raises:
        ArgumentError: no such model, or one that this version of mlx-lm does not know.
        NoMlxLm: mlx-lm is not installed.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config: Any = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        expected = f"a model's folder or its config.json ({error})"
        raise ArgumentError("model", expected, str(path)) from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ArgumentError("model", "a config.json with a model_type", str(path))
    was = attention.active
    patch(device="reference")
    try:
        with record() as recording, mx.stream(mx.cpu):
            built = _built(config, path)
            _run(built)
    finally:
        unpatch()
        if was is not None:
            patch(device=was.device, chip=was.chip)
    name = path.resolve().name if path.is_dir() else path.resolve().parent.name
    problems = recording.problems
    if not problems:
        raise ArgumentError("model", "a model that calls attention", config["model_type"])
    return name or config["model_type"], problems


def _built(config: dict[str, Any], path: Path) -> Any:
    try:
        model_class, arguments = _classes(config)
        built = model_class(arguments.from_dict(config))
    except (ImportError, ValueError, TypeError, KeyError, AttributeError) as error:
        expected = f"a model that this version of mlx-lm knows ({error})"
        raise ArgumentError("model", expected, f"{config['model_type']} in {path}") from None
    dtype = config.get("torch_dtype") or config.get("dtype") or "bfloat16"
    built.set_dtype(getattr(mx, str(dtype), mx.bfloat16))
    return built


def _classes(config: dict[str, Any]) -> tuple[Any, Any]:
    try:
        utils: Any = importlib.import_module("mlx_lm.utils")
        remapping = utils.MODEL_REMAPPING
    except ImportError:  # what downloads and tokenizers need is missing, and not needed here
        remapping = {}
    kind = remapping.get(config["model_type"], config["model_type"])
    if not kind.replace("_", "").replace("-", "").isalnum():
        raise ValueError(f"model_type {kind!r}")
    module: Any = importlib.import_module(f"mlx_lm.models.{kind}")
    return module.Model, module.ModelArgs


def _run(built: Any) -> None:
    caches: Any = importlib.import_module("mlx_lm.models.cache")
    for length, step in (*((n, 0) for n in PREFILL), *((n, 1) for n in DECODE)):
        held = caches.make_prompt_cache(built)
        for start in range(0, length - step, CHUNK):
            built(mx.zeros((1, min(CHUNK, length - step - start)), mx.int32), cache=held)
        if step:
            built(mx.zeros((1, 1), mx.int32), cache=held)
