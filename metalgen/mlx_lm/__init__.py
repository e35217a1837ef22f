"""mlx-lm's models and programs on metalgen's attention.

    import mlx_lm
    import metalgen.mlx_lm

    metalgen.mlx_lm.patch()
    model, tokenizer = mlx_lm.load("mlx-community/gemma-2-9b-it-4bit")
    print(mlx_lm.generate(model, tokenizer, prompt="..."))
    print(metalgen.mlx_lm.stats())

From a command line: ``metalgen lm generate --model ...``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from metalgen.mlx_lm.counts import Stats, reset_stats, stats
from metalgen.mlx_lm.masks import MaskRules
from metalgen.mlx_lm.models import FAULTS
from metalgen.mlx_lm.patching import NoMlxLm, Patched, adapted, is_patched, patch, unpatch

if TYPE_CHECKING:
    from metalgen.mlx_lm.caches import (
        PackedBatchKVCache,
        PackedBatchRotatingKVCache,
        PackedKVCache,
        PackedRotatingKVCache,
        make_prompt_cache,
    )

__all__ = [
    "FAULTS",
    "MaskRules",
    "NoMlxLm",
    "PackedBatchKVCache",
    "PackedBatchRotatingKVCache",
    "PackedKVCache",
    "PackedRotatingKVCache",
    "Patched",
    "Stats",
    "adapted",
    "is_patched",
    "make_prompt_cache",
    "patch",
    "reset_stats",
    "stats",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("metalgen.mlx_lm.caches"), name)  # needs mlx-lm
