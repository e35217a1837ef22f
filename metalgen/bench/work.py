"""What a row of a benchmark computes, and how much that is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.problem.visible import visible

Kind = Literal["attention", "layer", "cache"]
BACKWARD_FACTOR = 2.5
"""Operations of a backward pass over those of the forward pass: five matrix products for two."""
QUICK = {"batch": 2, "heads": 4, "length": 96}
"""Most batch entries, heads, and queries or keys of a quick work."""


@dataclass(frozen=True)
class Work:
    """One row: a config and sizes.

    Args:
        config: the attention.
        batch, heads: batch entries and query heads.
        q_len, kv_len: queries and keys.
        kind: ``"attention"``: the operation; ``"layer"``: with its four projections, of
            ``heads * head_dim`` columns; ``"cache"``: over caches of several layouts.
        train: forward and backward instead of forward.
        capacity: keys that a cache has room for, of which `kv_len` are live.
        page_size: keys of a page of the paged cache.
        label: what tells it from other rows, such as a model's name.
    """

    config: AttentionConfig
    batch: int
    heads: int
    q_len: int
    kv_len: int
    kind: Kind = "attention"
    train: bool = False
    capacity: int = 0
    page_size: int = 0
    label: str = ""

    def __str__(self) -> str:
        sizes = f"B={self.batch} H={self.heads} {self.q_len}x{self.kv_len}"
        if self.kind == "cache":
            sizes += f" of {self.capacity}, pages of {self.page_size}"
        ways = " forward+backward" if self.train else ""
        words = f"{self.config} {sizes}{' layer' if self.kind == 'layer' else ''}{ways}"
        return f"{self.label}: {words}" if self.label else words

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads // self.config.heads_per_kv

    @property
    def problem(self) -> Problem:
        """The tuning problem of its attention."""
        return Problem(self.config, self.batch * self.heads, self.q_len, self.kv_len)

    @property
    def operations(self) -> float:
        """Multiplications and additions of the scores that causal masks and windows keep."""
        c = self.config
        kept = visible(c, self.q_len, self.kv_len) * self.batch * self.heads
        found = 2.0 * (c.head_dim + c.v_dim) * kept
        if self.kind == "layer":
            dims = self.heads * c.head_dim
            found += 8.0 * self.batch * self.q_len * dims * dims
        return found * (1 + BACKWARD_FACTOR) if self.train else found

    @property
    def kv_bytes(self) -> float:
        """Bytes of the keys and values that some query sees, as dense arrays."""
        c = self.config
        seen = self.kv_len
        if c.window_left is not None:
            seen = min(seen, self.q_len + c.window_left)
        return self.batch * self.kv_heads * seen * c.kv_row_bytes

    @property
    def tokens(self) -> int:
        """Queries of all batch entries."""
        return self.batch * self.q_len

    @property
    def bound(self) -> str:
        """What limits it on any GPU: ``"compute"``, or few queries' ``"memory"``."""
        return "memory" if self.q_len * self.config.heads_per_kv <= 64 else "compute"

    def quick(self) -> Work:
        """The same of sizes that a CPU computes at once."""
        most = QUICK["length"]
        group = self.config.heads_per_kv
        return dataclasses.replace(
            self,
            batch=min(self.batch, QUICK["batch"]),
            heads=group * max(1, min(self.heads, QUICK["heads"]) // group),
            q_len=min(self.q_len, most),
            kv_len=max(min(self.kv_len, most), min(self.q_len, most)),
            capacity=min(self.capacity, 2 * most),
            page_size=min(self.page_size, 32),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        fields = dataclasses.asdict(dataclasses.replace(self, config=AttentionConfig(8)))
        return fields | {
            "config": self.config.to_dict(),
            "operations": self.operations,
            "kv_bytes": self.kv_bytes,
        }


@dataclass(frozen=True)
class Preset:
    """Rows that someone would compare with.

    Args:
        name: as the user gives it.
        about: in one line.
        works: its rows.
        unit: what its table shows: ``"TFLOP/s"``, ``"GB/s"`` or ``"tokens/s"``.
    """

    name: str
    about: str
    works: tuple[Work, ...] = field(repr=False)
    unit: str = "TFLOP/s"

    def quick(self) -> Preset:
        """The same rows of small sizes, each once, and few of them."""
        works = tuple(dict.fromkeys(work.quick() for work in self.works))
        return dataclasses.replace(self, works=works)
