"""What features make up inputs with."""

from __future__ import annotations

import random
from typing import Any, Protocol

import mlx.core as mx


class Sampler(Protocol):
    """What makes up a call: sizes, the layout of its sequences, and random numbers.

    Attributes:
        config, batch, heads, q_len, kv_len, seed: of the call.
        ragged: whether lengths, pages and types are any that a call may have.
        scores: ``(B, H, Lq, Lk)`` of the call.
        choices: random choices, the same for a seed.
        layout: arrays that follow from how the sequences lie in q, k and v, by name.
    """

    config: Any
    batch: int
    heads: int
    q_len: int
    kv_len: int
    seed: int
    ragged: bool
    scores: tuple[int, int, int, int]
    choices: random.Random
    layout: dict[str, mx.array]

    def normal(self, shape: tuple[int, ...]) -> mx.array:
        """Normal numbers, of unit variance."""

    def bernoulli(self, share: float, shape: tuple[int, ...]) -> mx.array:
        """Booleans, of which a share is true."""

    def broadcast(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """A shape that broadcasts to another."""

    def functions(self) -> dict[str, Any]:
        """Captured arrays of the config's functions, and the blocks of its mask, by name."""
