"""Cases of other projects' tests, of which a sample runs by default, and values in float64."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from metalgen.calls.verify import relative_error
from metalgen.testing.devices import normal

Values = NDArray[np.float64]
TOLERANCE = {"float32": 3e-6, "float16": 1e-3, "bfloat16": 8e-3}


def sampled(cases: Iterable[Any], every: int, first: int = 0) -> list[Any]:
    """All cases; but for each `every`-th one, from `first` on, they are marked as slow."""
    slow = pytest.mark.slow
    return [
        pytest.param(case, id=_name(case), marks=() if n % every == first else slow)
        for n, case in enumerate(cases)
    ]


def _name(case: Any) -> str:
    if isinstance(case, dict):
        return ", ".join(f"{name} {_name(x)}" for name, x in case.items()) or "-"
    return " ".join(map(_name, case)) if isinstance(case, (tuple, list)) else str(case)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call.

    Args:
        batch, heads, kv_heads, q_len, kv_len: as of `metalgen.attention`.
        width, value_width: of rows of queries and keys, and of values.
        dtype: of all.
    """

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    width: int = 64
    value_width: int | None = None
    dtype: str = "float32"

    def __str__(self) -> str:
        widths = f"D{self.width}" + (f"/{self.value_width}" if self.value_width else "")
        heads = f"{self.heads}:{self.kv_heads}"
        return f"B{self.batch} H{heads} {self.q_len}x{self.kv_len} {widths} {self.dtype}"

    def arrays(self, *, rows_first: bool = False, seed: int = 0) -> list[mx.array]:
        """Queries, keys and values; with `rows_first` views of arrays (B, L, H, D)."""
        widths = (self.width, self.width, self.value_width or self.width)
        places = ((self.heads, self.q_len), *[(self.kv_heads, self.kv_len)] * 2)
        found = []
        for n, ((heads, rows), width) in enumerate(zip(places, widths, strict=True)):
            axes = (rows, heads) if rows_first else (heads, rows)
            x = normal((self.batch, *axes, width), self.dtype, seed + n)
            found.append(x.swapaxes(1, 2) if rows_first else x)
        return found


def wide(x: mx.array) -> Values:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def at_the_end(q_len: int, kv_len: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The key at each query's own position, the last at the last, and all keys."""
    return np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len)[None]


def exact(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    *,
    scale: float | None = None,
    seen: Any = True,
    bias: Any = 0.0,
    softcap: float | None = None,
    sinks: Any = None,
) -> tuple[Values, Values]:
    """Output and log-sum-exp by the definition, in float64; rows without a key are zeros."""
    queries, keys, values = (wide(x) for x in (q, k, v))
    group = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(x, group, axis=1) for x in (keys, values))
    scores = queries @ keys.swapaxes(-1, -2)
    scores *= queries.shape[3] ** -0.5 if scale is None else scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen, scores + bias, -np.inf)
    logits = scores
    if sinks is not None:
        logit = np.broadcast_to(np.asarray(sinks)[:, None, None], (*scores.shape[:3], 1))
        logits = np.concatenate([scores, logit], axis=-1)
    peak = logits.max(axis=-1, keepdims=True, initial=-np.inf)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    total = np.exp(logits - peak).sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (peak + np.log(total))[..., 0]
    total[total == 0] = 1
    return np.exp(scores - peak) @ values / total, lse


def assert_right(out: mx.array, expected: Values) -> None:
    error = relative_error(out, expected)
    allowed = TOLERANCE[str(out.dtype).removeprefix("mlx.core.")]
    assert error <= allowed, f"{error:.1e} of {allowed:.0e}"
