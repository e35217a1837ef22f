"""Tables of measurements: what is read, and what is said of a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest

from metalgen.chips.tables import (
    PUBLISHED_COLUMNS,
    TILE_COLUMNS,
    TableError,
    read_published,
    read_tiles,
)

TILE = {
    "chip": "M1 Max",
    "gpu_cores": "32",
    "kernel": "fwd",
    "dtype": "FP32",
    "N": "8192",
    "D": "64",
    "R_block": "32",
    "C_block": "64",
    "D_block": "32",
    "cache_inputs": "False",
    "cache_outputs": "True",
    "ginstrs": "3570",  # 133 * 8192^2 in 2.5 milliseconds
    "ms": "2.5",
}
PUBLISHED = {
    "kernel": "MLX SDPA steel fused",
    "chip": "M3 Max",
    "gpu_cores": "",
    "dtype": "float16",
    "B": "1",
    "H": "32",
    "Lq": "1024",
    "Lk": "1024",
    "D": "64",
    "causal": "0",
    "direction": "fwd",
    "metric": "time",
    "value": "0.784",
    "unit": "ms",
}


def write(path: Path, *rows: dict[str, str]) -> Path:
    """A table with the columns of the first row."""
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_tile_is_read(tmp_path: Path) -> None:
    (row,) = read_tiles(write(tmp_path / "t.csv", TILE))
    assert (row.line, row.kernel, row.dtype, row.head_dim) == (2, "fwd", "FP32", 64)
    assert row.chip is not None and row.chip.name == "M1Max"
    assert row.sample is not None and row.sample.seconds == pytest.approx(2.5e-3)
    assert not row.sample.launch
    assert row.tile is not None and (row.tile.cache_inputs, row.tile.cache_outputs) == (False, True)


@pytest.mark.parametrize(
    ("change", "column", "problem"),
    [
        ({"chip": ""}, "chip", "expected a chip, but got none"),
        ({"chip": "M17"}, "chip", "one that `metalgen chips` lists"),
        ({"gpu_cores": "31"}, "gpu_cores", "nearest: M1Max"),
        ({"chip": "H200", "gpu_cores": ""}, "chip", "model of an Apple GPU core"),
        ({"kernel": "forward"}, "kernel", "one of fwd, bwd_dQ, bwd_dKV"),
        ({"dtype": "FP8"}, "dtype", "one of FP16mixed, FP32"),
        ({"D": "60"}, "D", "multiple of 8"),
        ({"N": "-1"}, "N", "whole number above 0"),
        ({"C_block": "12"}, "C_block", "multiple of 8"),
        ({"cache_inputs": "maybe"}, "cache_inputs", "one of True, False"),
        ({"ms": ""}, "ms", "a number above 0, but got ''"),
        ({"ms": "nan"}, "ms", "a number above 0"),
        ({"ms": "0.0025"}, "ginstrs", "ms are milliseconds"),
        ({"ms": "2500"}, "ginstrs", "ms are milliseconds"),
    ],
)
def test_a_bad_cell_is_named_by_line_and_column(
    change: dict[str, str], column: str, problem: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "t.csv", TILE, TILE | change)
    with pytest.raises(TableError) as raised:
        read_tiles(path)
    assert (raised.value.line, raised.value.column) == (3, column)
    assert problem in str(raised.value)
    assert f"{path}, line 3, column {column}: " in str(raised.value)


@pytest.mark.parametrize("missing", TILE_COLUMNS)
def test_a_missing_column_of_tiles_is_named(missing: str, tmp_path: Path) -> None:
    row = {name: value for name, value in TILE.items() if name != missing}
    with pytest.raises(TableError, match=f"line 1, column {missing}: missing"):
        read_tiles(write(tmp_path / "t.csv", row))


@pytest.mark.parametrize("missing", PUBLISHED_COLUMNS)
def test_a_missing_column_of_published_times_is_named(missing: str, tmp_path: Path) -> None:
    row = {name: value for name, value in PUBLISHED.items() if name != missing}
    with pytest.raises(TableError, match=f"line 1, column {missing}: missing"):
        read_published(write(tmp_path / "t.csv", row))


def test_an_empty_table_and_what_is_no_table_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(",".join(TILE_COLUMNS) + "\n", encoding="utf-8")
    with pytest.raises(TableError, match="at least one row"):
        read_tiles(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TableError, match="is not a CSV file"):
        read_tiles(path)
    with pytest.raises(TableError, match="cannot be read"):
        read_tiles(tmp_path / "none.csv")


def test_published_times_are_read_in_their_units(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", PUBLISHED, PUBLISHED | {"value": "784", "unit": "us"})
    rows = read_published(path)
    assert [row.sample.seconds for row in rows if row.sample] == pytest.approx([784e-6, 784e-6])
    assert all(row.sample.launch for row in rows if row.sample)


@pytest.mark.parametrize(
    ("change", "column"),
    [({"unit": ""}, "unit"), ({"unit": "TFLOPS"}, "unit"), ({"value": "fast"}, "value")],
)
def test_a_published_time_without_unit_or_value_is_refused(
    change: dict[str, str], column: str, tmp_path: Path
) -> None:
    with pytest.raises(TableError) as raised:
        read_published(write(tmp_path / "t.csv", PUBLISHED | change))
    assert (raised.value.line, raised.value.column) == (2, column)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"metric": "speedup", "unit": "x"}, "not a time"),
        ({"direction": "bwd"}, "not a forward pass"),
        ({"kernel": "mlx-mfa STEEL causal"}, "a kernel without an adapter"),
        ({"kernel": "MLX SDPA NAX", "chip": "M5 Max"}, "neural accelerators"),
        ({"kernel": "MLX SDPA unfused"}, "MLX without its fused kernel"),
        ({"kernel": "MLX SDPA steel (array mask)"}, "an array mask, which reads memory of its own"),
        ({"dtype": "float32"}, "not half precision"),
        ({"D": "80"}, "a head dimension whose code was not counted"),
    ],
)
def test_rows_that_are_not_covered_say_why(
    change: dict[str, str], reason: str, tmp_path: Path
) -> None:
    (row,) = read_published(write(tmp_path / "t.csv", PUBLISHED | change))
    assert row.sample is None
    assert row.reason == reason
