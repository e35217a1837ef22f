"""Masks that are intervals, and what follows from them for rows, tiles and loops.

A causal mask, a window, a number of keys: each bounds one number of a pair of a query and a key
that see each other. From that follow the keys that a query sees and the queries that see a key, so
that one declaration serves kernels that own rows of queries and kernels that own rows of keys.
Expressions are the text of integers in a kernel. Queries and keys count from 0 in their sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Side = Literal["query", "key"]


class Bound(NamedTuple):
    """Pairs of a query and a key see each other only where ``least <= of <= most``.

    Args:
        of: the number that is bounded: the key's, the query's, or ``"distance"``, the key's less
            the place of the query among the keys, which is the query's number plus ``offset``.
        least, most: expressions of what is the same throughout a threadgroup, for distances a name
            or a number, with a minus before it or none; None: no bound.
    """

    of: Side | Literal["distance"]
    least: str | None = None
    most: str | None = None


class Interval(NamedTuple):
    """Columns of the scores, from `low` on and before `past`, which are expressions.

    `low` is None where the first column of all is the first one; it may be negative, or behind the
    end of an interval that is empty.
    """

    low: str | None
    past: str


@dataclass(frozen=True)
class Bounds:
    """The intersection of several bounds, for a kernel that owns rows and passes over others.

    Args:
        each: what must hold.
        owned: whether the owned rows are queries or keys; the others are columns of the scores.
    """

    each: tuple[Bound, ...]
    owned: Side = "query"

    @property
    def by_row(self) -> bool:
        """Whether owned rows differ in what they see."""
        return any(bound.of in (self.owned, "distance") for bound in self.each)

    @property
    def has_low(self) -> bool:
        """Whether what a row sees may begin behind the first column."""
        return self.any("", "", "").low is not None

    @property
    def by_distance(self) -> bool:
        """Whether some bound is one of the distance."""
        return any(bound.of == "distance" for bound in self.each)

    def place(self, row: str) -> str:
        """Where a row stands among the columns: what distances count from."""
        if self.owned == "key":
            return f"{row} - offset"
        return "offset" if row == "0" else f"{row} + offset"

    def row(self, row: str, count: str, lane: str) -> Interval:
        """Of `count` columns those that a row sees, counted from the column `lane`.

        The row's place among them, counted likewise, is ``place``.
        """
        return self._interval((row, "place"), (row, "place"), count, lane)

    def any(self, first: str, last: str, count: str) -> Interval:
        """Those from the first to the last that any of the rows `first` to `last` sees.

        More, where some of the rows see none.
        """
        return self._interval((first, self.place(first)), (last, self.place(last)), count)

    def all(self, first: str, last: str, count: str) -> Interval:
        """Those that each of the rows `first` to `last` sees."""
        return self._interval((last, self.place(last)), (first, self.place(first)), count)

    def _interval(
        self, lows: tuple[str, str], pasts: tuple[str, str], count: str, lane: str = ""
    ) -> Interval:
        """The columns that begin where one row says, and end where another says.

        Of both rows the number, and the place among the columns. What a later row sees begins no
        earlier, and ends no earlier.
        """
        less = f" - {lane}" if lane else ""
        low, past, own = list[str](), [count + less], list[str]()
        for bound in self.each:
            least, most = bound.least, bound.most
            if bound.of == self.owned:
                own += [] if least is None else [f"{pasts[0]} >= {least}"]
                own += [] if most is None else [f"{lows[0]} <= {most}"]
            elif bound.of == "distance":
                if self.owned == "key":  # query = key - distance
                    least, most = _negated(most), _negated(least)
                low += [] if least is None else [_sum(lows[1], least)]
                past += [] if most is None else [f"{_sum(pasts[1], most)} + 1"]
            else:
                low += [] if least is None else [least + less]
                past += [] if most is None else [f"{most} + 1{less}"]
        end = _nested("min", past)
        end = f"({' && '.join(own)} ? {end} : 0)" if own else end
        return Interval(_nested("max", low) if low else None, end)


def _sum(x: str, y: str) -> str:
    return x if y == "0" else f"{x} - {y[1:]}" if y.startswith("-") else f"{x} + {y}"


def _negated(x: str | None) -> str | None:
    if x is None or x == "0":
        return x
    return x[1:] if x.startswith("-") else f"-{x}"


def _nested(function: str, values: Sequence[str]) -> str:
    """The smallest or largest of values, by a function of two."""
    *before, found = values
    for value in reversed(before):
        found = f"{function}({value}, {found})"
    return found
