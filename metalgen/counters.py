"""How many calls took which path."""

from __future__ import annotations

from dataclasses import dataclass, field

PATHS = {
    "metalgen": "metalgen's kernels",
    "mlx": "MLX's own attention",
    "plain": "plain MLX operations",
}


class Tally:
    """The calls of one path, for one reason. Adding to `calls` is all that a call does."""

    __slots__ = ("calls", "path", "reason")

    def __init__(self, path: str, reason: str) -> None:
        self.path, self.reason, self.calls = path, reason, 0


_tallies: dict[tuple[str, str], Tally] = {}


def tally(path: str, reason: str = "") -> Tally:
    """The tally of a path (``"metalgen"``, ``"mlx"`` or ``"plain"``) and a reason."""
    return _tallies.setdefault((path, reason), Tally(path, reason))


@dataclass(frozen=True)
class Stats:
    """Calls of attention since the start, or since `metalgen.reset_stats`.

    Attributes:
        metalgen: calls that one of metalgen's kernels computed.
        mlx: calls that ``mx.fast.scaled_dot_product_attention`` computed.
        plain: calls that plain MLX operations computed.
        reasons: of the last two, how many calls for which reason.
    """

    metalgen: int = 0
    mlx: int = 0
    plain: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """All calls."""
        return self.metalgen + self.mlx + self.plain

    def __str__(self) -> str:
        lines = [f"{getattr(self, path):>9,}  {words}" for path, words in PATHS.items()]
        ordered = sorted(self.reasons.items(), key=lambda item: -item[1])
        lines += [f"{count:>9,}    {reason}" for reason, count in ordered]
        return "\n".join(lines)


def stats() -> Stats:
    """How many calls of attention took which path, and why.

    A call inside ``mx.compile`` counts when it is traced, not each time the compiled function runs.
    The counters are plain Python integers: where several threads call at once, a few calls may be
    missing.
    """
    found = dict.fromkeys(PATHS, 0)
    reasons: dict[str, int] = {}
    for one in list(_tallies.values()):
        found[one.path] += one.calls
        if one.reason and one.calls:
            reasons[one.reason] = reasons.get(one.reason, 0) + one.calls
    return Stats(**found, reasons=reasons)


def reset_stats() -> None:
    """Start counting from zero."""
    for one in list(_tallies.values()):
        one.calls = 0
