"""What a family says of its main loop, so that any matrix kind can plan it.

A threadgroup owns rows of some operands and passes over the rows of others, a block at a time. The
products of a pass are of two forms:

    S += A B^T   A an operand whose rows are owned, B traversed: columns are contracted
    O += P B     P an accumulator such as S, B traversed: rows of the block are contracted
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Protocol

from metalgen.features.quantized import packing
from metalgen.problem.config import AttentionConfig


@dataclass(frozen=True)
class Operand:
    """An array of rows that products read.

    Args:
        name: of the array.
        rows: what its rows are: ``"query"`` or ``"key"``.
        columns: the constant that holds its width, such as ``"D"``.
        width: columns of a row that a threadgroup reads.
        itemsize: bytes per element, dequantized.
        bits: of a quantized element, or None.
        group: neighbouring elements that share a scale and a bias, where quantized.
        packing: what the constants of its bits and group begin with, such as ``"KV"``.
        page: rows that lie in one page, or None: no pages.
        head_rows: whether the owned rows are those of several heads, one head after the other.
        rotated: whether rows are rotated by their positions when they are read.
        shares: threadgroups that share out its columns; `width` is of one share.
        several_heads: whether rows of several heads are passed over, one head after the other.
    """

    name: str
    rows: str
    columns: str
    width: int
    itemsize: int
    bits: int | None = None
    group: int = 0
    page: int | None = None
    head_rows: bool = False
    rotated: bool = False
    shares: int = 1
    several_heads: bool = False
    packing: str = "KV"

    def array_bytes(self, array: str) -> int:
        """Bytes of a row of one of its arrays."""
        if self.bits is None:
            return self.width * self.itemsize
        if array == self.name:
            return self.width * self.bits // 8
        return self.width // self.group * self.itemsize

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of the arrays that make it up."""
        if self.bits is None:
            return (self.name,)
        return (self.name, f"{self.name}_scales", f"{self.name}_biases")


@functools.lru_cache(maxsize=1024)
def operand(name: str, config: AttentionConfig, value_parts: int = 1) -> Operand:
    """An array of a config as an operand.

    Args:
        name: ``"q"``, ``"k"``, ``"v"``, or ``"dout"``, the cotangent of the output.
        config: what is computed.
        value_parts: threadgroups that share the columns of the values.
    """
    wide = name in ("v", "dout")
    width = config.v_dim // value_parts if wide else config.head_dim
    rows, columns = "query" if name in ("q", "dout") else "key", "DV" if wide else "D"
    if rows == "query":
        return Operand(name, rows, columns, width, config.itemsize)
    bits, group = packing(config, name)
    return Operand(
        *(name, rows, columns, width, config.itemsize, bits, group, config.page_size),
        shares=value_parts if wide else 1,
        packing=name.upper() if config.quantized_apart else "KV",
    )


@dataclass(frozen=True)
class Accumulator:
    """A matrix that a simdgroup keeps in registers, a row for each of its own rows.

    Args:
        name: of its variable.
        fragments: the constant that holds how many fragments 8 columns wide a row has.
        first: the place of its first column among the traversed rows; empty for an output, whose
            columns are those of an operand.
        columns: of an output, the constant that holds its width.
        shared: of an output, whether threadgroups share out its columns.
    """

    name: str
    fragments: str
    first: str = ""
    columns: str = ""
    shared: bool = False


@dataclass(frozen=True)
class Product:
    """One product of a pass: `into` += `left` `right`.

    Args:
        into: name of an accumulator.
        left: name of an owned operand, whose columns are contracted, or of an accumulator.
        right: name of a traversed operand.
    """

    into: str
    left: str
    right: str


@dataclass(frozen=True)
class Added:
    """A product that contracts owned rows, A += P^T B, to whose rows several threadgroups add.

    Args:
        product: A is an output in floats, which begins with zeros, P an accumulator, B an owned
            operand; rows of A are those of a pass.
        first_row: the row of A that the first traversed row is, by the kernel's names.
        factor: what the product is multiplied by, likewise.
    """

    product: Product
    first_row: str
    factor: str


@dataclass(frozen=True)
class Extent:
    """Which rows of an array there are, by the kernel's names: from `least` on, and below `count`.

    `least` is empty where the first row is the array's.
    """

    count: str
    least: str = ""

    def there(self, row: str) -> str:
        """Whether a row is one of them."""
        return f"{row} < {self.count}" + (f" && {row} >= {self.least}" if self.least else "")

    def all_there(self, start: str, rows: str) -> str:
        """Whether so many rows from `start` on all are."""
        first = f" && {start} >= {self.least}" if self.least else ""
        return f"{start} + {rows} <= {self.count}{first}"

    def nearest(self, row: str) -> str:
        """The one that is nearest to a row."""
        return f"min({f'max({row}, {self.least})' if self.least else row}, {self.count} - 1)"


@dataclass(frozen=True)
class Passes:
    """The loop over the traversed rows, by the names that the kernel's text has for them.

    Args:
        index: the first row of a pass.
        begin, end: the first row of all, and the one behind the last; ``begin`` is a multiple of
            the block.
        block: the constant that holds the rows of a pass.
        count: how many rows there are.
        own: where a simdgroup's own rows of a block begin, with a plus behind it, or empty: it
            reads the whole block.
        listed: whether a list names the blocks to visit, rather than all from ``begin`` to ``end``.
        least: the first row that there is, by the kernel's name for it; empty: the array's first.
        whole: whether masks other than bounds may leave passes in which nothing is masked.
    """

    index: str
    begin: str
    end: str
    block: str
    count: str
    own: str = ""
    listed: bool = False
    least: str = ""
    whole: bool = False

    @property
    def extent(self) -> Extent:
        """Which of the rows there are."""
        return Extent(self.count, self.least)

    @property
    def number(self) -> str:
        """How many passes went before."""
        return "pass" if self.listed else f"{self.index} / {self.block}"


@dataclass(frozen=True)
class Operands:
    """The main loop of a family for one config and schedule.

    Args:
        own: operands whose rows are owned.
        traversed: operands whose rows are passed over.
        accumulators: what products add to.
        products: of one pass, those that contract columns first.
        passes: the loop over the traversed rows.
        ordered_heads: where threadgroups start in the order of their blocks of rows, the heads that
            read the same traversed rows; 0: they start in any order.
        own_start, own_count: the threadgroup's first owned row, and how many rows there are, by the
            names that the kernel's text has for them.
        together: whether the rows of a pass are fetched together, of all traversed operands.
        added: one more product of a pass.
    """

    own: tuple[Operand, ...]
    traversed: tuple[Operand, ...]
    accumulators: tuple[Accumulator, ...]
    products: tuple[Product, ...]
    passes: Passes
    own_start: str
    own_count: str
    ordered_heads: int = 0
    together: bool = False
    added: Added | None = None

    @property
    def own_extent(self) -> Extent:
        """Which of the owned rows there are."""
        return Extent(self.own_count)

    @property
    def scores(self) -> tuple[Accumulator, ...]:
        """Accumulators that begin anew in every pass."""
        return tuple(each for each in self.accumulators if each.first)

    @property
    def shares_columns(self) -> bool:
        """Whether several threadgroups have the same rows."""
        return any(each.shared for each in self.accumulators)

    @property
    def traversed_arrays(self) -> list[tuple[Operand, str]]:
        """The arrays of traversed operands, each with its operand: scales and biases last."""
        found = [(each, array) for each in self.traversed for array in each.arrays]
        return sorted(found, key=lambda pair: pair[1] != pair[0].name)

    def operand(self, name: str) -> Operand:
        """The operand of a name."""
        return next(each for each in (*self.own, *self.traversed) if each.name == name)

    def accumulator(self, name: str) -> Accumulator:
        """The accumulator of a name."""
        return next(each for each in self.accumulators if each.name == name)

    def contracts_columns(self, product: Product) -> bool:
        """Whether a product's left side is an operand, not an accumulator."""
        return all(each.name != product.left for each in self.accumulators)


class Plan(Protocol):
    """What the templates of a matrix kind substitute; each kind has a type of its own."""

    @property
    def operands(self) -> Operands:
        """What was planned."""

    @property
    def constants(self) -> dict[str, int]:
        """Named numbers of the kernel's text, besides those of the family."""
