"""Rotary embedding, as users describe it."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from metalgen.arguments import as_integer, as_number
from metalgen.errors import ArgumentError
from metalgen.features.conversions import integers
from metalgen.features.rotary import ROPES, rotated
from metalgen.problem.config import MAX_HEAD_DIM


@dataclass(frozen=True, eq=False)
class Rope:
    """How rows rotate with their position, as ``mx.fast.rope`` does (Su et al., 2021).

    Column pair c of a row at position p rotates by ``p * scale / base ** (2 c / dims)`` radians, or
    by ``p * scale / freqs[c]``, or by row p of two tables: (x, y) becomes ``(x cos - y sin,
    x sin + y cos)``, whatever the table's cosines and sines are, so they may be scaled.

    Args:
        dims: number of columns that rotate, from the first on; even. None: all.
        base: base of the periods; not used if `freqs` is given.
        freqs: ``(dims / 2,)``, the periods themselves, in positions a radian: exactly what
            ``mx.fast.rope`` and mlx-lm call `freqs` (most other libraries name the inverse so).
        tables: the cosines and the sines, two arrays ``(positions, dims / 2)``, such as other
            libraries precompute. A row whose position lies outside of them rotates by the nearest
            row inside. `base`, `freqs` and `scale` must then have their defaults.
        style: ``"half"``: columns c and c + dims / 2 rotate together (GPT-NeoX, Llama;
            ``traditional=False`` in MLX); ``"pairs"``: columns 2 c and 2 c + 1 (GPT-J;
            ``traditional=True``).
        scale: factor of the positions.
        offset: position of the first row: a number, or an array of them, ``()`` or one for each
            sequence, ``(N,)``, of integers. None: `metalgen.attention` puts the queries at the end
            of the keys, at ``kv_len - q_len``.
        one_position: all rows of a sequence rotate as its first one does, such as the queries of
            several candidates for one token. For queries only.

    Raises:
        ArgumentError: a value of the wrong type or out of range.
    """

    dims: int | None = None
    base: float = 10000.0
    freqs: mx.array | None = None
    style: str = "half"
    scale: float = 1.0
    offset: int | mx.array | None = None
    one_position: bool = False
    tables: tuple[mx.array, mx.array] | None = None

    def __post_init__(self) -> None:
        dims = as_integer(self.dims)
        if self.dims is not None and (dims is None or not 2 <= dims <= MAX_HEAD_DIM):
            expected = f"an integer from 2 to {MAX_HEAD_DIM}, or None"
            raise ArgumentError("rope.dims", expected, self.dims)
        if dims is not None and dims % 2:
            raise ArgumentError("rope.dims", "an even number of columns, or None", dims)
        object.__setattr__(self, "dims", dims)
        if not isinstance(self.style, str) or self.style not in ROPES:
            raise ArgumentError("rope.style", f"one of {', '.join(ROPES)}", self.style)
        for name, value in (("base", self.base), ("scale", self.scale)):
            number = as_number(value)
            if number is None or not 0 < number < math.inf:
                raise ArgumentError(f"rope.{name}", "a finite number above 0", value)
            object.__setattr__(self, name, number)
        freqs: object = self.freqs
        if isinstance(freqs, mx.array):
            if freqs.ndim != 1 or not mx.issubdtype(freqs.dtype, mx.floating):
                got = f"{freqs.dtype} {freqs.shape}"
                raise ArgumentError("rope.freqs", "1 axis of floating-point periods", got)
        elif freqs is not None:
            raise ArgumentError("rope.freqs", "an mlx.core.array of periods, or None", freqs)
        if self.tables is not None:
            self._check_tables()
        if not isinstance(self.one_position, bool):
            raise ArgumentError("rope.one_position", "True or False", self.one_position)
        offset = self.offset
        if offset is None or isinstance(offset, mx.array):
            return
        position = as_integer(offset)
        if position is None or not 0 <= position < 1 << 31:
            expected = "a position from 0, an mlx.core.array of them, or None"
            raise ArgumentError("rope.offset", expected, offset)
        object.__setattr__(self, "offset", position)

    def _check_tables(self) -> None:
        tables: Any = self.tables
        if not isinstance(tables, (tuple, list)) or len(tables) != 2:
            expected = "two arrays, of cosines and of sines, or None"
            raise ArgumentError("rope.tables", expected, type(tables).__name__)
        pairs = None if self.dims is None else self.dims // 2
        for n, table in enumerate(tables):
            expected = f"2 axes of floating-point numbers, (positions, {pairs or 'dims / 2'})"
            if not isinstance(table, mx.array):
                raise ArgumentError(f"rope.tables[{n}]", f"an mlx.core.array: {expected}", table)
            is_table = table.ndim == 2 and table.size and pairs in (None, table.shape[1])
            if not is_table or not mx.issubdtype(table.dtype, mx.floating):
                raise ArgumentError(f"rope.tables[{n}]", expected, f"{table.dtype} {table.shape}")
        if tables[0].shape != tables[1].shape:
            expected = f"{tables[0].shape}, as the table of cosines"
            raise ArgumentError("rope.tables[1].shape", expected, tables[1].shape)
        own = {f.name: f.default for f in dataclasses.fields(self)}
        for name in ("base", "freqs", "scale"):
            value = getattr(self, name)
            if isinstance(value, mx.array) or value != own[name]:
                raise ArgumentError(
                    f"rope.{name}", "its default with rope.tables, which give the angles", value
                )
        object.__setattr__(self, "dims", 2 * tables[0].shape[1])
        object.__setattr__(self, "tables", tuple(table.astype(mx.float32) for table in tables))

    def moved(self, by: int | mx.array) -> Rope:
        """The same for rows that stand so many positions further on, where it has an offset."""
        if self.offset is None:
            return self
        offset: Any = self.offset
        if isinstance(offset, mx.array):  # of any width, which the sum may not fit
            offset = integers("rope.offset", offset, 0, 1)
        return dataclasses.replace(self, offset=offset + by)

    def turns(self, head_dim: int) -> mx.array:
        """Radians a position of each pair of columns, ``(dims / 2,)`` float32."""
        if self.freqs is not None:
            return self.scale / self.freqs.astype(mx.float32)
        return _turns(head_dim if self.dims is None else self.dims, self.base, self.scale)

    def arrays(self, head_dim: int) -> dict[str, mx.array]:
        """What kernels read of it but the offsets, by the names of `metalgen.problem.inputs`."""
        if self.tables is None:
            return {"rope_freqs": self.turns(head_dim)}
        return {"rope_cos": self.tables[0], "rope_sin": self.tables[1]}

    def turned(self, x: mx.array, first: int | mx.array) -> mx.array:
        """Rows ``(B, H, L, D)`` turned by plain MLX operations.

        Args:
            x: the rows.
            first: position of the first row, ``()`` or ``(B,)``, in addition to `offset`.
        """
        offset = first if self.offset is None else first + self.offset
        if self.tables is None:
            return mx.fast.rope(
                x,
                x.shape[-1] if self.dims is None else self.dims,
                traditional=self.style == "pairs",
                base=None if self.freqs is not None else self.base,
                scale=self.scale,
                offset=offset,
                freqs=self.freqs,
            )
        position = mx.array(offset)[..., None] + mx.arange(x.shape[2])
        inside = mx.clip(position, 0, self.tables[0].shape[0] - 1)
        cos, sin = (mx.expand_dims(table[inside], -3) for table in self.tables)
        return rotated(x, cos, sin, self.style)


@functools.lru_cache(maxsize=32)
def _turns(dims: int, base: float, scale: float) -> mx.array:
    """In Python's float64, rounded once: kept, so that a call makes no array of its own."""
    return mx.array([scale * base ** (-2 * c / dims) for c in range(dims // 2)], mx.float32)
