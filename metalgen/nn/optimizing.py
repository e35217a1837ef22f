"""Exchanging the attention of a model that is there already."""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.nn as nn

from metalgen.devices import get_device
from metalgen.errors import ArgumentError
from metalgen.nn.multi_head import MultiHeadAttention, Options
from metalgen.ops.installing import Routed

_NAME = "scaled_dot_product_attention"


@dataclass
class Optimized:
    """What `optimize` exchanged; as a context manager it undoes that at its end.

    Attributes:
        replaced: how many modules of each class compute by metalgen now.
        left: how many modules whose class is named an attention do not, for they call no function
            that could be replaced.
    """

    replaced: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)
    _before: list[tuple[Any, type]] = field(default_factory=list, repr=False)

    def undo(self) -> int:
        """Give every module its own class back; says how many there were."""
        count = len(self._before)
        while self._before:
            module, own = self._before.pop()
            module.__class__ = own
        return count

    def __str__(self) -> str:
        lines = [f"{sum(self.replaced.values())} attention modules compute by metalgen"]
        lines += [f"  {count} {name}" for name, count in self.replaced.items()]
        lines += [f"  {count} {name} left: computes by hand" for name, count in self.left.items()]
        return "\n".join(lines)

    def __enter__(self) -> Optimized:
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def optimize(model: Any, *, device: str | None = None) -> Optimized:
    """Make the attention modules of any model of MLX's compute by metalgen, in place.

    A ``mlx.nn.MultiHeadAttention`` becomes a `MultiHeadAttention`; any other module that calls
    ``scaled_dot_product_attention`` in its own methods (mlx-lm's do) calls metalgen's while it
    runs.
    Weights, names and the module objects stay what they are.

    Args:
        model: a ``mlx.nn.Module``.
        device: as in `metalgen.attention`.

    Returns:
        What was exchanged, how many modules of each class, and the way back.

    Raises:
        ArgumentError: it is no module, or the device is unknown.
        DeviceError: the device is not available here.
    """
    if not isinstance(model, nn.Module):  # type: ignore[attr-defined]
        raise ArgumentError("model", "a mlx.nn.Module", type(model).__name__)
    if device is not None:
        get_device(device)
    replaced: Counter[str] = Counter()
    left: Counter[str] = Counter()
    found = Optimized()
    for module in {id(m): m for _, m in model.named_modules()}.values():
        own = type(module)
        if issubclass(own, MultiHeadAttention) or getattr(own, "_metalgen_routed", False):
            continue
        if own is nn.MultiHeadAttention:  # type: ignore[attr-defined]
            module.__class__ = MultiHeadAttention
            module._options = Options(device=device)
        elif _NAME in set(_names(own)):
            module.__class__ = _routed(own, device)
        else:
            if "Attention" in own.__name__:
                left[own.__name__] += 1
            continue
        replaced[own.__name__] += 1
        found._before.append((module, own))
    found.replaced, found.left = dict(replaced), dict(left)
    return found


def _routed(own: type, device: str | None) -> type:
    """A subclass whose calls find metalgen's function in ``mx.fast``."""
    routed = Routed(device)

    def __call__(self: Any, *args: Any, **keywords: Any) -> Any:
        with routed:
            return own.__call__(self, *args, **keywords)

    members = {"__call__": __call__, "_metalgen_routed": True, "__module__": own.__module__}
    return type(own.__name__, (own,), members)


def _names(own: type) -> Iterator[str]:
    """Names that the methods of a module's class mention."""
    for base in own.__mro__:
        if base is nn.Module or base is object:  # type: ignore[attr-defined]
            continue
        for member in vars(base).values():
            if isinstance(member, types.FunctionType):
                yield from _names_of(member.__code__)


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
