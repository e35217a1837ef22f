"""Fits and scores, on tables that were made up from the model itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from metalgen.chips import get_chip, report, scoring
from metalgen.chips.adapters import Tile, mfa_work
from metalgen.chips.coefficients import DEFAULT, FITTED, PRIOR, Coefficients
from metalgen.chips.fitting import Sample, as_module, fit, modelled, rounded
from metalgen.chips.tables import Row
from metalgen.cli.chips import command
from metalgen.errors import ArgumentError

DIMENSIONS = (32, 64, 96, 128, 192)
TILES = [
    Tile(kernel, half, 8192, dim, 32, keys, columns, inputs, outputs)
    for kernel in ("fwd", "bwd_dQ", "bwd_dKV")
    for half in (False, True)
    for dim in DIMENSIONS
    for keys, columns in ((32, 16), (64, 32), (80, 32), (80, 24))
    for inputs, outputs in ((False, False), (False, True), (True, True))
]


def rows(truth: Coefficients, *chips: str) -> list[Row]:
    """A table that the model with some coefficients would have measured."""
    found = []
    for name in chips:
        chip = get_chip(name)
        for tile in TILES:
            work = mfa_work(tile, chip)
            kind = "FP16mixed" if tile.half else "FP32"
            sample = Sample(work, chip, 1.0, group=f"{tile.kernel} {kind}")
            sample = sample._replace(seconds=modelled(sample, truth))
            found.append(Row(0, tile.kernel, kind, chip, tile.head_dim, sample, tile=tile))
    return found


TRUTH = PRIOR._replace(matrix=18.0, alu=0.7, stage_wait=420.0, leak=0.12, saturation=0.5)


def test_a_fit_finds_the_coefficients_that_made_a_table_and_does_so_again() -> None:
    samples = [row.sample for row in rows(TRUTH, "M1Max", "M4") if row.sample]
    got = fit(samples)
    assert rounded(got) == rounded(fit(samples))
    for name in ("matrix", "stage_wait", "leak"):
        assert getattr(got, name) == pytest.approx(getattr(TRUTH, name), rel=0.2), name
    wrong = [abs(modelled(s, got) / s.seconds - 1) for s in samples]
    assert max(wrong) < 0.05
    before = [abs(modelled(s, PRIOR) / s.seconds - 1) for s in samples]
    assert max(before) > 0.15


def test_a_fit_changes_at_most_twelve_coefficients_and_is_shipped() -> None:
    assert len(FITTED) <= 12
    changed = {n for n in Coefficients._fields if getattr(DEFAULT, n) != getattr(PRIOR, n)}
    assert changed <= set(FITTED)
    namespace: dict[str, object] = {}
    exec(as_module({"matrix": 17.5}), namespace)
    assert namespace["VALUES"] == {"matrix": 17.5}


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(ArgumentError, match=f"at least {len(FITTED)} rows"):
        fit([row.sample for row in rows(TRUTH, "M4")[:5] if row.sample])


def test_errors_ranks_and_regrets_are_those_by_hand() -> None:
    table = rows(PRIOR, "M1Max")
    same = [
        (i, row)
        for i, row in enumerate(table)
        if (row.kernel, row.dtype, row.head_dim) == ("fwd", "FP32", 64)
    ]
    assert len(same) == 12
    picked = [row for _, row in same]
    measured = [row.sample.seconds for row in picked if row.sample]
    truth = scoring.overall(picked, dict(enumerate(measured)))
    assert (truth.median_error, truth.p90_error) == (0.0, 0.0)
    assert truth.rank_correlation == pytest.approx(1.0)
    assert (truth.median_regret, truth.worst_regret) == (0.0, 0.0)
    # Backwards: the slowest is preferred.
    reversed_ = scoring.overall(picked, {i: 1 / seconds for i, seconds in enumerate(measured)})
    assert reversed_.rank_correlation == pytest.approx(-1.0)
    assert reversed_.worst_regret == pytest.approx(1 - min(measured) / max(measured))
    # All 10 % too slow: an error, and no regret.
    slow = scoring.overall(picked, {i: 1.1 * seconds for i, seconds in enumerate(measured)})
    assert slow.median_error == pytest.approx(0.1)
    assert slow.worst_regret == 0.0


def test_quantiles_are_linear_between_neighbours() -> None:
    assert scoring.quantile([0.0, 1.0, 2.0, 3.0], 0.5) == 1.5
    assert scoring.quantile([5.0], 0.9) == 5.0
    assert scoring.quantile([0.0, 10.0], 0.9) == pytest.approx(9.0)


def test_what_is_left_out_is_not_seen() -> None:
    table = rows(TRUTH, "M1Max")
    spoilt = []
    for row in table:
        assert row.sample is not None
        factor = 3.0 if row.head_dim == 96 else 1.0
        sample = row.sample._replace(seconds=factor * row.sample.seconds)
        spoilt.append(Row(0, row.kernel, row.dtype, row.chip, row.head_dim, sample, tile=row.tile))
    found = scoring.unseen(spoilt, scoring.by_dimension)
    wrong = [seconds / spoilt[i].sample.seconds for i, seconds in found.items()]  # type: ignore[union-attr]
    odd = [w for i, w in enumerate(wrong) if table[list(found)[i]].head_dim == 96]
    assert all(w == pytest.approx(1 / 3, rel=0.1) for w in odd)  # no knowledge of the factor
    assert scoring.unseen(spoilt, scoring.by_chip) == {}  # one chip only


def test_interpolation_lies_between_its_neighbours() -> None:
    table = rows(PRIOR, "M1Max")
    found = scoring.interpolation(table)
    index = next(i for i, row in enumerate(table) if row.head_dim == 64)

    def rate(dim: int) -> float:
        tile = table[index].tile
        assert tile is not None
        row = next(r for r in table if r.tile == tile._replace(head_dim=dim))
        assert row.sample is not None
        return (2 * dim + 5) * 8192**2 / row.sample.seconds

    between = (rate(32) + rate(96)) / 2
    assert found[index] == pytest.approx((2 * 64 + 5) * 8192**2 / between)


def test_a_constant_fraction_is_the_others_median() -> None:
    table = [row for row in rows(PRIOR, "M1Max", "M4") if row.head_dim in (64, 128)]
    found = scoring.constant_fraction(table, scoring.by_chip)
    assert len(found) == len(table)
    rates = {"M1Max": 5.308e12, "M4": 1.789e12}  # instructions of a lane a second at the peak
    fractions = []
    for row in table:
        assert row.chip is not None and row.sample is not None
        if row.chip.name == "M4":
            count = {"fwd": 2, "bwd_dQ": 3, "bwd_dKV": 4}[row.kernel] * row.head_dim + 5
            fractions.append(count * 8192**2 / row.sample.seconds / rates["M4"])
    fractions.sort()
    middle = (fractions[len(fractions) // 2] + fractions[(len(fractions) - 1) // 2]) / 2
    first = table[0]
    assert first.chip is not None and first.chip.name == "M1Max"
    count = 2 * first.head_dim + 5
    assert found[0] == pytest.approx(count * 8192**2 / (rates["M1Max"] * middle), rel=1e-3)


def as_table(path: Path, table: list[Row]) -> Path:
    """The rows as a file of tiles."""
    lines = [
        "chip,gpu_cores,kernel,dtype,N,D,R_block,C_block,D_block,cache_inputs,cache_outputs,"
        "ginstrs,ms"
    ]
    for row in table:
        assert row.tile is not None and row.chip is not None and row.sample is not None
        t = row.tile
        n = {"fwd": 2, "bwd_dQ": 3, "bwd_dKV": 4}[t.kernel]
        rate = (n * t.head_dim + 5) * t.length**2 / row.sample.seconds / 1e9
        lines.append(
            f"{row.chip.generation} {row.chip.tier},{row.chip.cores},{t.kernel},{row.dtype},"
            f"{t.length},{t.head_dim},{t.rows},{t.keys},{t.columns},{t.cache_inputs},"
            f"{t.cache_outputs},{rate},{row.sample.seconds * 1e3}"
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_validate_prints_fitted_and_unseen_scores_and_both_baselines(tmp_path: Path) -> None:
    path = as_table(tmp_path / "tiles.csv", rows(DEFAULT, "M1Max", "M4"))
    done = CliRunner().invoke(command, ["validate", "--tiles", str(path)])
    assert done.exit_code == 0, done.output
    for title in ("As shipped", "without the row's head dim", "without the row's chip"):
        assert title in done.output
    assert "constant fraction of peak" in done.output
    assert "interpolation between neighbouring dimensions" in done.output


def test_validate_writes_one_object_a_chip_kernel_and_type(tmp_path: Path) -> None:
    path = as_table(tmp_path / "tiles.csv", rows(DEFAULT, "M1Max"))
    done = CliRunner().invoke(command, ["validate", "--tiles", str(path), "--json"])
    assert done.exit_code == 0, done.output
    scores = json.loads(done.stdout)
    assert len(scores) == 6
    assert list(scores[0]) == [
        "chip",
        "kernel",
        "dtype",
        "rows",
        "covered",
        "median_error",
        "p90_error",
        "rank_correlation",
        "median_regret",
        "worst_regret",
    ]
    for one in scores:
        assert one["rows"] == one["covered"] == 60
        assert one["median_error"] == pytest.approx(0.0, abs=1e-9)
        assert one["rank_correlation"] == pytest.approx(1.0)
        assert one["worst_regret"] == pytest.approx(0.0, abs=1e-9)


def test_fit_prints_and_writes_its_values(tmp_path: Path) -> None:
    path = as_table(tmp_path / "tiles.csv", rows(TRUTH, "M1Max"))
    output = tmp_path / "fitted.py"
    arguments = ["fit", "--tiles", str(path), "--output", str(output), "--json"]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    values = json.loads(done.stdout)
    assert set(values) == set(FITTED)
    assert all(math.isfinite(value) and value > 0 for value in values.values())
    assert output.read_text(encoding="utf-8") == as_module(values)


def test_a_report_without_a_fit_says_so() -> None:
    few = rows(PRIOR, "M4")[:4]
    text = "\n".join(report.lines(few, PRIOR))
    assert "nothing: too few rows remain to fit" in text
