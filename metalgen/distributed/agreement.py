"""What processes must agree on before they send each other anything that depends on it."""

from __future__ import annotations

import hashlib
from typing import Any

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.problem.rope import Rope

_agreed: set[tuple[Any, ...]] = set()
"""What all processes of a group were found to agree on."""


def place(group: Any) -> tuple[int, int]:
    """This process's number in a group of ``mx.distributed`` (None: all), and the group's size."""
    own = mx.distributed.init() if group is None else group
    return own.rank(), own.size()


def words_of(options: dict[str, Any]) -> tuple[Any, ...]:
    """What processes must agree on, of options: values, shapes of arrays, graphs of functions."""
    found: list[Any] = []
    for name in sorted(options):
        value = options[name]
        if isinstance(value, mx.array):
            value = (value.shape, str(value.dtype))
        elif isinstance(value, Rope):
            value = (value.dims, value.base, value.style, value.scale, value.one_position)
        elif callable(value):
            from metalgen.dsl.trace import trace

            value = trace(value, name).graph.text
        if value is not None and name not in ("device", "chip"):
            found.append((name, value))
    return tuple(found)


def agree(name: str, words: tuple[Any, ...], shape: tuple[int, ...], group: Any) -> None:
    """Compare what processes are about to compute, once for each call of a kind.

    The message has one size whatever they call, so that those that disagree still meet.
    """
    rank, size = place(group)
    key = (id(group), size, words)
    if size == 1 or key in _agreed:
        return
    digest = hashlib.sha256(repr(words).encode()).digest()
    own = [int.from_bytes(digest[n : n + 4], "little") >> 1 for n in range(0, 32, 4)]
    own += [*shape, *(0,) * (4 - len(shape))][:4]
    every: Any = mx.distributed.all_gather(mx.array([own], mx.int32), group=group).tolist()
    different = [n for n, other in enumerate(every) if other[:8] != own[:8]]
    if different:
        shapes = {n: tuple(other[8 : 8 + len(shape)]) for n, other in enumerate(every)}
        raise ArgumentError(
            name,
            "the same on every process",
            f"others on {', '.join(map(str, different))} than on {rank}; shapes {shapes}",
        )
    _agreed.add(key)
