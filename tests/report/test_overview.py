"""Gains by model and rooflines, by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from report_samples import DEFAULT, database, final

from metalgen.database.measurement import Measurement
from metalgen.families import default_schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.report import charts
from metalgen.report.overview import by_model, bytes_of, operations, roofs, score_bytes
from metalgen.report.page import write_report
from metalgen.report.results import Result, results
from metalgen.report.sources import read_sources

LLAMA = AttentionConfig(128, heads_per_kv=4, causal=True)


def measured(problem: Problem, seconds: float, default: float, mlx: float | None) -> Measurement:
    """A final of a problem."""
    schedule = default_schedule(problem.config, family=problem.family)
    row = final(schedule, seconds, default_seconds=default, mlx_seconds=mlx)
    return dataclasses.replace(row, problem=problem)


def of(folder: Path, *rows: Measurement) -> list[Result]:
    return results(read_sources([database(folder / "some.db", list(rows))]))


def test_a_models_gain_is_the_geometric_mean_of_its_layers_results(tmp_path: Path):
    found = of(
        tmp_path,
        measured(Problem(LLAMA, 32, 2048, 2048), 1e-3, 2e-3, 1.5e-3),
        measured(Problem(LLAMA, 32, 512, 512), 1e-3, 8e-3, None),
        measured(Problem(LLAMA, 32, 1, 4096), 1e-3, 3e-3, 0.5e-3),
        measured(Problem(AttentionConfig(48), 32, 512, 512), 1e-3, 9e-3, None),  # of no model
    )
    gains = {gain.model: gain for gain in by_model(found)}
    assert {"llama-3-8b", "qwen3-8b"} <= gains.keys()
    assert "smollm2-135m" not in gains
    llama = gains["llama-3-8b"]
    assert llama.prefill == pytest.approx(4.0)  # of 2 and 8
    assert llama.decode == pytest.approx(3.0)
    assert llama.against_mlx == pytest.approx((1.5 * 0.5) ** 0.5)
    assert llama.results == 3


def test_operations_and_bytes_are_those_of_the_call(tmp_path: Path):
    problem = Problem(LLAMA, 32, 2048, 2048)
    (r,) = of(tmp_path, measured(problem, 1e-3, 2e-3, 1.5e-3))
    pairs = 2048 * 2049 // 2
    assert operations(r) == 4 * 128 * 32 * pairs
    assert bytes_of(r) == 2 * 2 * 128 * (32 + 8) * 2048
    assert score_bytes(r) == 32 * 2048 * 2048 * 2
    (roof,) = roofs([r])
    (point,) = roof.points
    assert point.rate == operations(r) / 1e-3
    assert point.mlx == operations(r) / 1.5e-3
    assert point.intensity == operations(r) / bytes_of(r)
    assert roof.bytes == pytest.approx(400e9)  # Apple's figure for the M3 Max


def test_a_roof_slopes_until_the_ridge_and_is_flat_from_there_on():
    drawn = charts.roofline([(1.0, 1e11), (1000.0, 1e13)], [], 2e13, 4e11)
    (slope, ridge, flat) = [tuple(map(float, p.split())) for p in drawn.roof[1:].split("L")]
    assert slope[0] < ridge[0] < flat[0]
    assert slope[1] > ridge[1] == flat[1]  # heights count from the top
    assert drawn.dots.count("M") == 2 and drawn.mlx == ""
    assert charts.roofline([(1.0, 1e11)], [(1.0, 2e11)], None, None).roof == ""


def test_the_page_shows_both(tmp_path: Path):
    rows = [measured(Problem(LLAMA, 32, 2048, 2048), 1e-3, 2e-3, 1.5e-3), final(DEFAULT, 1e-3)]
    source = database(tmp_path / "some.db", rows)
    write_report(tmp_path / "report.html", read_sources([source]))
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Gains by model" in text and "Roofline of M3Max" in text
    assert "llama-3-8b" in text
