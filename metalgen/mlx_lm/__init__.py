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

from metalgen.mlx_lm.counts import Stats, reset_stats, stats
from metalgen.mlx_lm.masks import MaskRules
from metalgen.mlx_lm.models import FAULTS
from metalgen.mlx_lm.patching import NoMlxLm, Patched, adapted, is_patched, patch, unpatch

__all__ = [
    "FAULTS",
    "MaskRules",
    "NoMlxLm",
    "Patched",
    "Stats",
    "adapted",
    "is_patched",
    "patch",
    "reset_stats",
    "stats",
    "unpatch",
]
