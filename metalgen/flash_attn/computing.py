"""What all functions of flash-attn's interface come down to: one call of metalgen's attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from metalgen.ops.attention import attention
from metalgen.problem.config import MIN_HEAD_DIM

PROBABILITY_COLUMNS = 512
"""Keys whose probabilities one call returns: as many as a row of values may be wide."""


@dataclass(frozen=True)
class Call:
    """Attention with heads first, and what flash-attn's arguments ask of it.

    Args:
        q: ``(B, H, Lq, D)``, k: ``(B, Hkv, Lk, D)``, v: ``(B, Hkv, Lk, Dv)``; packed sequences:
            B is 1; pages: k and v are ``(pages, Hkv, page_size, D)``.
        options: of `metalgen.attention`.
        scale: None means ``1 / sqrt(D)``.
        slopes: of ALiBi, ``(H,)`` or ``(N, H)``.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    options: dict[str, Any]
    scale: float | None = None
    slopes: mx.array | None = None

    def run(self) -> tuple[mx.array, mx.array]:
        """Output ``(B, H, Lq, Dv)`` and log-sum-exp ``(B, H, Lq)``."""
        width, v_width = self.q.shape[3], self.v.shape[3]
        scale = width**-0.5 if self.scale is None and width else self.scale
        q, k, v = (_wide_enough(x) for x in (self.q, self.k, self.v))
        options = dict(self.options)
        if self.slopes is not None:
            options["alibi_slopes"] = self.slopes
        out, lse = attention(q, k, v, scale=scale, return_lse=True, **options)
        return (out[..., :v_width] if out.shape[3] > v_width else out), lse

    def probabilities(self, keys: int) -> mx.array:
        """The weights of the keys, ``(B, H, Lq, keys)``; negative where dropout drops them.

        Each call computes those of some keys as its output, with rows of the identity as values:
        so they are those of the very same computation.
        """
        heads, dtype = self.v.shape[1], self.v.dtype
        rate = self.options.get("dropout", 0.0)
        found = []
        for first in range(0, keys, PROBABILITY_COLUMNS):
            columns = mx.arange(first, min(first + PROBABILITY_COLUMNS, keys))
            unit = (mx.arange(keys)[:, None] == columns).astype(dtype)
            v = mx.broadcast_to(unit, (self.k.shape[0], heads, *unit.shape))
            kept = replace(self, v=v).run()[0]
            if rate:
                options = self.options | {"dropout": 0.0, "dropout_key": None}
                whole = replace(self, v=v, options=options).run()[0]
                kept = mx.where(kept > 0, whole, -whole)
            found.append(kept)
        return mx.concatenate(found, axis=-1) if found else mx.zeros((*self.q.shape[:3], 0), dtype)


def _wide_enough(x: mx.array) -> mx.array:
    """Rows of zeros behind, where they are narrower than metalgen's kernels take; as flash-attn."""
    missing = MIN_HEAD_DIM - x.shape[3]
    return mx.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing > 0 else x
