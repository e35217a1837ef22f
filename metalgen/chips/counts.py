"""Which configs the counts of kernels hold for, so that the chip model prices all of them."""

from __future__ import annotations

import functools

from metalgen.problem.config import AttentionConfig, declared, field_names


@functools.lru_cache(maxsize=1024)
def covers(config: AttentionConfig) -> str | None:
    """Why the counts do not hold for a config, or None where they do.

    Such a config is counted as if the fields that are named had their defaults. What user functions
    compute and read is in no count; the model prices it (`metalgen.chips.functions`).
    """
    unknown = [
        f"{name}={getattr(config, name)}"
        for name in field_names()
        if not declared(name).counted and getattr(config, name) != declared(name).default
    ]
    return f"the model ignores {', '.join(unknown)}" if unknown else None
