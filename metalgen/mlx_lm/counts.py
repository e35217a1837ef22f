"""How many calls of mlx-lm's models brought which masks, and where they were computed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from metalgen.counters import PATHS
from metalgen.counters import Stats as PathStats
from metalgen.counters import reset_stats as reset_paths
from metalgen.counters import stats as path_stats

MASKS = {
    "none": "no mask",
    "causal": "causal",
    "rules": "rules (windows, left padding)",
    "boolean": "boolean arrays, made by the model",
    "additive": "additive arrays, made by the model",
}
"""Kinds of masks that models hand over."""

masks: Counter[str] = Counter()
"""Calls by the kind of their mask: a key of `MASKS`."""
materialized: Counter[str] = Counter()
"""Rules that were turned into a boolean array, by the reason."""
left: Counter[str] = Counter()
"""Calls that mlx-lm's own function computed, by the reason."""


@dataclass(frozen=True)
class Stats:
    """Calls of attention of mlx-lm's models since `patch`, or since `reset_stats`.

    A call inside ``mx.compile`` counts once, when it is traced.

    Attributes:
        masks: calls by the kind of mask: ``"none"``, ``"causal"``, ``"rules"`` (windows and left
            padding, as numbers), ``"boolean"`` and ``"additive"`` (arrays that the model made).
        materialized: rules that became boolean arrays after all, by the reason.
        own: calls that mlx-lm's own function computed, by the reason.
        paths: all calls of attention by what computed them (`metalgen.stats`).
    """

    masks: dict[str, int] = field(default_factory=dict)
    materialized: dict[str, int] = field(default_factory=dict)
    own: dict[str, int] = field(default_factory=dict)
    paths: PathStats = field(default_factory=PathStats)

    @property
    def calls(self) -> int:
        """All calls of attention by patched models."""
        return sum(self.masks.values())

    @property
    def boolean_masks(self) -> int:
        """Boolean arrays that reached attention: the models' own, and rules that became arrays."""
        return self.masks.get("boolean", 0) + sum(self.materialized.values())

    def __str__(self) -> str:
        lines = [f"{self.calls:>9,}  calls of attention by mlx-lm's models"]
        lines += [f"{count:>9,}    {MASKS[kind]}" for kind, count in self.masks.items()]
        for title, found in (
            ("rules turned into boolean arrays", self.materialized),
            ("calls that mlx-lm's own function computed", self.own),
        ):
            if found:
                lines.append(f"{sum(found.values()):>9,}  {title}")
                lines += [f"{count:>9,}    {reason}" for reason, count in found.items()]
        if self.paths.calls:
            lines.append(str(self.paths))
        return "\n".join(lines)

    @property
    def summary(self) -> str:
        """One line: how many calls there were, and what computed them."""
        parts = [f"{getattr(self.paths, path):,} by {words}" for path, words in PATHS.items()]
        own = sum(self.own.values())
        parts = [part for part in parts if not part.startswith("0 ")]
        parts += [f"{own:,} by mlx-lm's own function"] if own else []
        return f"{self.calls:,} calls of attention: " + (", ".join(parts) or "none computed")


def stats() -> Stats:
    """How many calls of mlx-lm's models brought which masks, and what computed them."""
    return Stats(dict(masks), dict(materialized), dict(left), path_stats())


def reset_stats() -> None:
    """Start counting from zero; `metalgen.stats`, too."""
    for counter in (masks, materialized, left):
        counter.clear()
    reset_paths()
