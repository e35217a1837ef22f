"""Putting our attention into mlx-lm's models, and taking it out."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from metalgen.chips import get_chip
from metalgen.devices import get_device
from metalgen.errors import MetalgenError
from metalgen.mlx_lm import attention
from metalgen.mlx_lm.attention import Where, scaled_dot_product_attention
from metalgen.mlx_lm.counts import reset_stats
from metalgen.mlx_lm.masks import Mask, knows, rules_of
from metalgen.mlx_lm.models import TOUCHING, Replacement, replacements, takes_rules

BASE = "mlx_lm.models.base"
MODELS = "mlx_lm.models."


class NoMlxLm(MetalgenError, ImportError):
    """mlx-lm, or something that it needs, is not installed."""


class Patched:
    """What `patch` returns; as a context manager it unpatches at its end."""

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *error: object) -> None:
        unpatch()


def patch(*, device: str | None = None, chip: str | None = None) -> Patched:
    """Make mlx-lm's models compute attention with metalgen, those imported later, too.

    ``scaled_dot_product_attention`` and ``create_attention_mask`` of ``mlx_lm.models.base`` are
    replaced, in every module that holds them; windows and left padding then reach attention as
    numbers in place of boolean arrays. Models that compute attention by hand are changed when they
    first run (`metalgen.mlx_lm.adapted` names them). Weights, caches and results stay as they are.
    As everywhere, MLX's own function keeps each call that it has a fused kernel for and for which
    ours was not measured as faster on this chip. On a machine without a GPU mlx-lm's own
    operations compute everything, unless a device is named.

    Patching again changes device and chip, and counts from zero.

    Args:
        device: as in `metalgen.attention`; None: ``METALGEN_DEVICE``, or this machine's GPU.
        chip: whose tuning records to use; None: this machine's.

    Returns:
        A context manager that calls `unpatch` at its end; it need not be used as one.

    Raises:
        NoMlxLm: mlx-lm is not installed.
        ArgumentError: an unknown device or chip.
        DeviceError: the device is not available here.
    """
    if device is not None:
        get_device(device)
    if chip is not None:
        get_chip(chip)
    try:
        base = importlib.import_module(BASE)
    except ImportError as error:
        raise NoMlxLm(f"mlx-lm cannot be imported ({error}): pip install 'mlx-lm>=0.32'") from error
    if attention.active is None:
        attention.original = base.scaled_dot_product_attention
        _own["create_attention_mask"] = base.create_attention_mask
        _exchange(attention.original, scaled_dot_product_attention)
        _exchange(base.create_attention_mask, create_attention_mask)
        _add_caches()
    attention.active = Where(device, chip)
    reset_stats()
    return Patched()


def unpatch() -> bool:
    """Put mlx-lm's own functions back; says whether ours were there.

    Caches go on, but for one kind: what a patched DeepSeek V3, GLM 4.7 Flash, Kimi Linear, LongCat
    or Ling 2.5 put into a cache, its own attention cannot read.
    """
    if attention.active is None:
        return False
    attention.active = None
    _exchange(scaled_dot_product_attention, attention.original)
    _exchange(create_attention_mask, _own["create_attention_mask"])
    for holder, name, own in _without:
        delattr(holder, name) if own is None else setattr(holder, name, own)
    _without.clear()
    while _changed:
        for holder, name, own in reversed(_changed.popitem()[1]):
            setattr(holder, name, own)
    return True


def is_patched() -> bool:
    """Whether `patch` has put our attention into mlx-lm's models."""
    return attention.active is not None


def adapted() -> tuple[str, ...]:
    """Names of models whose own attention ours has replaced so far; sorted."""
    return tuple(sorted(name for name, changes in _changed.items() if changes))


def seen_models() -> tuple[str, ...]:
    """Names of models that have run since `patch`; sorted."""
    return tuple(sorted(_changed))


_own: dict[str, Any] = {}
_changed: dict[str, list[Replacement]] = {}
"""What was changed in models' modules, by name, with the values that stood there."""


_without: list[Replacement] = []
"""What mlx-lm's caches had where ours was put; None: nothing."""


def _add_caches() -> None:
    """Let mlx-lm's caches be quantized by ours, and prompt caches of ours be loaded."""
    from metalgen.mlx_lm import caches

    module: Any = importlib.import_module("mlx_lm.models.cache")
    for name in ("RotatingKVCache", "BatchKVCache", "BatchRotatingKVCache"):
        kind = getattr(module, name)
        _without.append((kind, "to_quantized", vars(kind).get("to_quantized")))
        kind.to_quantized = caches.to_quantized
    for twin in caches.TWINS.values():
        _without.append((module, twin.__name__, None))
        setattr(module, twin.__name__, twin)


def _exchange(old: Any, new: Any) -> None:
    """Put a function where another one stands, in every module."""
    modules: list[Any] = list(sys.modules.values())
    for module in modules:
        if not isinstance(module, ModuleType):  # what programs put there in place of a module
            continue
        for name in (old.__name__, new.__name__):
            if module.__dict__.get(name) is old and not module.__name__.startswith("metalgen."):
                setattr(module, name, new)


def create_attention_mask(
    h: Any, cache: Any = None, window_size: int | None = None, return_array: bool = False
) -> Mask:
    """The mask of new tokens, in the place of ``mlx_lm.models.base``'s function.

    Args:
        h: what the model computes with, ``(B, L, ...)``.
        cache: the cache of the layers that it is for, or None.
        window_size: keys of a sliding window.
        return_array: whether the model asks for an array of booleans.
    """
    caller = sys._getframe(1).f_globals
    name = _model(caller)
    if name is not None:
        _adapt(name, sys.modules.get(caller["__name__"]))
    rules = attention.active is not None and name is not None and name not in TOUCHING
    if return_array:
        rules = rules and name is not None and takes_rules(name) and attention.is_ours()
    if not rules or not knows(cache or None):
        own = _own["create_attention_mask"]
        return own(h, cache, window_size=window_size, return_array=return_array)  # type: ignore[no-any-return]
    return rules_of(cache or None, h.shape[1], window_size)


def _model(caller: dict[str, Any]) -> str | None:
    """The name of mlx-lm's model that calls; None for code that is not mlx-lm's."""
    name = str(caller.get("__name__", ""))
    return name.removeprefix(MODELS) if name.startswith(MODELS) else None


def _adapt(name: str, module: ModuleType | None) -> None:
    if name in _changed or module is None or attention.active is None:
        return
    changes = replacements(name, module)
    _changed[name] = [(holder, what, getattr(holder, what)) for holder, what, _ in changes]
    for holder, what, new in changes:
        setattr(holder, what, new)
