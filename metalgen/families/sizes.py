"""A config together with the size of the work: what one tuning record is about."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from metalgen.arguments import check_integer
from metalgen.families import DECODE_QUERIES as DECODE_QUERIES
from metalgen.families import choose_family, get_tuned
from metalgen.problem.config import AttentionConfig

MAX_LENGTH = 1 << 24
MAX_BATCH_HEADS = 1 << 20


def bucket(n: int) -> int:
    """The power of two that n is filed under: the smallest that is not below it."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


@dataclass(frozen=True)
class Problem:
    """A config, its kernel family, and power-of-two buckets of its sizes.

    Args:
        config: the attention to compute.
        batch_heads: batch entries times query heads.
        q_len, kv_len: number of queries and of keys.
        family: name of a family that is tuned; left empty, it is the one that takes so many queries
            of the config (`metalgen.families.choose_family`).

    A deterministic config has one problem per family, whatever the sizes.

    Sizes are rounded up to their bucket. Raises `ArgumentError` for sizes below 1.
    """

    config: AttentionConfig
    batch_heads: int
    q_len: int
    kv_len: int
    family: str = ""

    def __post_init__(self) -> None:
        for name, most in (
            ("batch_heads", MAX_BATCH_HEADS),
            ("q_len", MAX_LENGTH),
            ("kv_len", MAX_LENGTH),
        ):
            object.__setattr__(self, name, check_integer(name, getattr(self, name), 1, most))
        if not self.family:
            object.__setattr__(self, "family", choose_family(self.config, self.q_len).name)
        family = get_tuned(self.family)
        if self.config.deterministic:  # one schedule, whatever else is in the call
            for name, size in (("batch_heads", 32), ("kv_len", 4096)):
                object.__setattr__(self, name, size)
            object.__setattr__(self, "q_len", family.deterministic_q_len)
        for name in ("batch_heads", "q_len", "kv_len"):
            object.__setattr__(self, name, bucket(getattr(self, name)))

    @functools.cached_property
    def key(self) -> str:
        """Canonical JSON of family, config and buckets: the key of tuning records."""
        fields = {
            "config": self.config.to_dict(),
            "family": self.family,
            "batch_heads": self.batch_heads,
            "q_len": self.q_len,
            "kv_len": self.kv_len,
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @property
    def heads(self) -> int:
        """Query heads of a batch of one that represents the bucket (a multiple of heads_per_kv)."""
        ratio = self.config.heads_per_kv
        return ratio * max(1, self.batch_heads // ratio)

    def __str__(self) -> str:
        own = choose_family(self.config, self.q_len).name
        family = "" if self.family == own else f" {self.family}"
        return f"{self.config} BH={self.batch_heads} Lq={self.q_len} Lk={self.kv_len}{family}"
