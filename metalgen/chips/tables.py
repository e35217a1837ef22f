"""Tables of measurements: read, checked row by row, and turned into the model's terms."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from metalgen.chips.adapters import MFA_PRODUCTS, MLX_PASS, Tile, mfa_work, mlx_work
from metalgen.chips.chip import Chip, IncompleteChip, UnknownChip, get_chip
from metalgen.chips.fitting import Sample
from metalgen.chips.model import require_figures
from metalgen.errors import MetalgenError

Value = TypeVar("Value")
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
TILE_COLUMNS = (
    "chip",
    "gpu_cores",
    "kernel",
    "dtype",
    "N",
    "D",
    "R_block",
    "C_block",
    "D_block",
    "cache_inputs",
    "cache_outputs",
    "ginstrs",
    "ms",
)
PUBLISHED_COLUMNS = (
    "kernel",
    "chip",
    "gpu_cores",
    "dtype",
    "B",
    "H",
    "Lq",
    "Lk",
    "D",
    "causal",
    "direction",
    "metric",
    "value",
    "unit",
)
INSTRUCTIONS = {"fwd": 2, "bwd_dQ": 3, "bwd_dKV": 4}
"""A launch counts as ``(n D + 5) N^2`` instructions of a lane."""
TILE_TYPES = {"FP16mixed": True, "FP32": False}


class TableError(MetalgenError):
    """A table that cannot be read; ``line`` (of the file, the header is 1) and ``column``."""

    def __init__(self, path: str, line: int, column: str, problem: str) -> None:
        self.path, self.line, self.column, self.problem = path, line, column, problem
        super().__init__(f"{path}, line {line}, column {column}: {problem}")

    def __reduce__(self) -> tuple[type, tuple[str, int, str, str]]:
        return type(self), (self.path, self.line, self.column, self.problem)


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        line: of the file; the header is line 1.
        kernel, dtype: as the table names them.
        chip: None where the model covers no such chip.
        head_dim: D; 0 where the row has none.
        sample: what is modelled, or None where the row is not covered.
        reason: why not.
        tile: the configuration, in a table of tiles.
    """

    line: int
    kernel: str
    dtype: str
    chip: Chip | None
    head_dim: int
    sample: Sample | None
    reason: str = ""
    tile: Tile | None = None


def read_tiles(path: Path) -> list[Row]:
    """A table of metal-flash-attention's tiles, columns `TILE_COLUMNS`.

    ``ms`` is a launch's time by the GPU's clock, and ``ginstrs`` its rate in 10^9 instructions a
    second; they must agree.

    Raises:
        TableError: a missing column, chip, number or unit, with its line and column.
    """
    rows = []
    for cells in _lines(path, TILE_COLUMNS):
        chip = cells.chip()
        try:
            require_figures(chip)
        except IncompleteChip as error:
            raise cells.error("chip", str(error)) from None
        kernel = cells.choice("kernel", {name: name for name in MFA_PRODUCTS})
        half = cells.choice("dtype", TILE_TYPES)
        length, head_dim = cells.count("N"), cells.count("D")
        if head_dim % 8:
            raise cells.error("D", f"expected a multiple of 8, but got {head_dim}")
        flags = {"True": True, "False": False, "1": True, "0": False}
        tile = Tile(
            kernel,
            half,
            length,
            head_dim,
            cells.count("R_block", multiple=8),
            cells.count("C_block", multiple=8),
            cells.count("D_block", multiple=8),
            cells.choice("cache_inputs", flags),
            cells.choice("cache_outputs", flags),
        )
        seconds = cells.number("ms") * 1e-3
        rate = (INSTRUCTIONS[kernel] * head_dim + 5) * length**2 / seconds / 1e9
        if not 0.95 < cells.number("ginstrs") / rate < 1.05:
            raise cells.error(
                "ginstrs",
                f"expected {rate:.0f}, which {cells['ms']} ms make at N={length}, D={head_dim}, "
                f"but got {cells['ginstrs']}: ginstrs are 10^9 a second, ms are milliseconds",
            )
        group = f"{kernel} {cells['dtype']}"
        sample = Sample(mfa_work(tile, chip), chip, seconds, group=group)
        rows.append(Row(cells.line, kernel, cells["dtype"], chip, head_dim, sample, tile=tile))
    return rows


def read_published(path: Path) -> list[Row]:
    """A table of published attention times, columns `PUBLISHED_COLUMNS`.

    Covered are forward times of MLX's own fused kernel in half precision, on chips before M5.

    Raises:
        TableError: a missing column, chip, number or unit, with its line and column.
    """
    rows = []
    for cells in _lines(path, PUBLISHED_COLUMNS):
        chip = cells.chip()
        value = cells["value"]
        unit = cells["unit"]
        if cells["metric"] == "time":
            factor = cells.choice("unit", SECONDS)
            seconds = cells.number("value") * factor
        elif not unit:
            raise cells.error("unit", "expected a unit, but got none")
        elif not value:
            raise cells.error("value", "expected a value, but got none")
        head_dim = int(cells["D"]) if cells["D"].isdigit() else 0
        reason = _not_covered(cells, chip, head_dim)
        sample = None
        if not reason:
            heads = cells.count("B") * cells.count("H")
            work = mlx_work(
                head_dim, cells["causal"] == "1", heads, cells.count("Lq"), cells.count("Lk")
            )
            sample = Sample(work, chip, seconds, launch=True, group=cells["kernel"])
        rows.append(
            Row(
                cells.line,
                cells["kernel"],
                cells["dtype"],
                chip,
                head_dim,
                sample,
                reason,
            )
        )
    return rows


def _not_covered(cells: _Cells, chip: Chip, head_dim: int) -> str:
    kernel = cells["kernel"]
    if cells["metric"] != "time":
        return "not a time"
    if cells["direction"] != "fwd":
        return "not a forward pass"
    if not kernel.startswith("MLX SDPA"):
        return "a kernel without an adapter"
    if "NAX" in kernel or chip.neural_accelerators:
        return "neural accelerators"
    if "steel" not in kernel:
        return "MLX without its fused kernel"
    if "mask" in kernel:
        return "an array mask, which reads memory of its own"
    if cells["dtype"] not in ("float16", "bfloat16"):
        return "not half precision"
    if head_dim not in MLX_PASS:
        return "a head dimension whose code was not counted"
    try:
        require_figures(chip)
    except IncompleteChip:
        return "a chip without enough figures"
    return ""


class _Cells:
    """The cells of one row, and errors that name them."""

    def __init__(self, path: Path, line: int, cells: Mapping[str, str | None]) -> None:
        self.path, self.line, self.cells = path, line, cells

    def __getitem__(self, column: str) -> str:
        return (self.cells.get(column) or "").strip()

    def error(self, column: str, problem: str) -> TableError:
        return TableError(str(self.path), self.line, column, problem)

    def number(self, column: str) -> float:
        try:
            value = float(self[column])
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise self.error(column, f"expected a number above 0, but got {self[column]!r}")
        return value

    def count(self, column: str, multiple: int = 1) -> int:
        text = self[column]
        if not text.isdigit() or int(text) == 0 or int(text) % multiple:
            kind = "a whole number above 0" if multiple == 1 else f"a multiple of {multiple}"
            raise self.error(column, f"expected {kind}, but got {text!r}")
        return int(text)

    def choice(self, column: str, choices: Mapping[str, Value]) -> Value:
        if self[column] not in choices:
            names = ", ".join(choices)
            raise self.error(column, f"expected one of {names}, but got {self[column]!r}")
        return choices[self[column]]

    def chip(self) -> Chip:
        """The chip of columns chip and gpu_cores; without cores, the full chip."""
        if not self["chip"]:
            raise self.error("chip", "expected a chip, but got none")
        try:
            chip = get_chip(self["chip"])
        except UnknownChip as error:
            raise self.error("chip", str(error)) from None
        if not self["gpu_cores"]:
            return chip
        cores = self.count("gpu_cores")
        try:
            return get_chip(f"{chip.family}-{cores}")
        except UnknownChip as error:
            raise self.error("gpu_cores", str(error)) from None


def _lines(path: Path, columns: tuple[str, ...]) -> Iterator[_Cells]:
    try:
        file = path.open(newline="", encoding="utf-8")
    except OSError as error:
        raise TableError(str(path), 0, "-", f"cannot be read: {error.strerror}") from None
    with file:
        try:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise TableError(
                    str(path), 1, missing[0], f"missing; expected columns {', '.join(columns)}"
                )
            found = False
            for cells in reader:
                found = True
                yield _Cells(path, reader.line_num, cells)
        except (UnicodeDecodeError, csv.Error) as error:
            raise TableError(str(path), 0, "-", f"is not a CSV file: {error}") from None
        if not found:
            raise TableError(str(path), 2, columns[0], "expected at least one row, but got none")


Reader = Callable[[Path], list[Row]]
