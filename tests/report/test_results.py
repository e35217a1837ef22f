"""What a report reckons from rows: winners, progress, importance, heat maps."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from pathlib import Path

import pytest
from report_samples import (
    CONFIG,
    DEFAULT,
    OTHER,
    PROBLEM,
    THIRD,
    database,
    final,
    modelled,
    records,
    results_of,
    row,
)

from metalgen.chips import get_chip
from metalgen.chips.model import predict
from metalgen.errors import ArgumentError
from metalgen.families import Schedule, enumerate_valid
from metalgen.report import charts
from metalgen.report.results import drawn, heat_maps, importances, milestones, results, steps
from metalgen.report.sources import Notes, read_sources
from metalgen.tuning.sessions.modelled import model_version


def test_the_winner_is_the_best_checked_final_and_is_compared_within_its_own_race(tmp_path):
    race = {"default_seconds": 1.2e-3, "mlx_seconds": 0.8e-3}
    rows = [
        row(OTHER, 0.5e-3),  # quicker, but of the search and never checked
        row(THIRD, None, status="runtime", detail="no"),
        final(OTHER, 1.0e-3, **race),
        final(DEFAULT, 1.2e-3, **race),
    ]
    [result] = results_of(records(tmp_path / "r.jsonl", rows))
    assert (result.winner.schedule, result.winner.seconds) == (OTHER, 1.0e-3)
    assert result.gain == pytest.approx(1.2)
    assert result.against_mlx == pytest.approx(0.8)
    assert result.times == {OTHER: 1.0e-3, DEFAULT: 1.2e-3}
    assert result.failed == {"runtime": 1}
    assert (len(result.finals), len(result.searched)) == (2, 2)


def test_a_final_that_leads_the_default_by_noise_alone_does_not_win(tmp_path):
    rows = [final(OTHER, 0.999e-3, detail="within the noise"), final(DEFAULT, 1e-3)]
    [result] = results_of(records(tmp_path / "r.jsonl", rows))
    assert result.winner.schedule == DEFAULT
    assert [m.schedule for m in result.finals] == [OTHER, DEFAULT]


def test_without_a_checked_row_the_best_that_ran_stands_there_as_unchecked(tmp_path):
    [result] = results_of(records(tmp_path / "r.jsonl", [row(OTHER, 2e-3), row(DEFAULT, 3e-3)]))
    assert result.winner == row(OTHER, 2e-3)
    assert not result.winner.verified
    assert result.gain == pytest.approx(1.5)  # the default's own row of the search
    assert result.mlx_seconds is None and result.against_mlx is None


def test_measured_and_modelled_rows_of_one_problem_never_share_a_result(tmp_path):
    rows = [modelled(OTHER, 0.1e-3, verified=True), final(DEFAULT, 1e-3), final(OTHER, 2e-3)]
    measured, predicted = results_of(records(tmp_path / "r.jsonl", rows))
    assert (measured.provenance, predicted.provenance) == ("measured", "modelled")
    assert measured.winner.seconds == 1e-3
    assert predicted.winner.seconds == 0.1e-3
    assert predicted.default_seconds is None  # never the measured one


def test_other_software_other_templates_and_other_core_counts_are_results_of_their_own(tmp_path):
    rows = [
        final(OTHER, 1e-3),
        final(OTHER, 2e-3, policy='{"mlx":"0.33"}'),
        final(OTHER, 3e-3, template_hash="0123456789abcdef"),
        final(OTHER, 4e-3, chip="M3Max-30", cores=30),
    ]
    found = results_of(records(tmp_path / "r.jsonl", rows))
    assert sorted(r.winner.seconds for r in found) == [1e-3, 2e-3, 3e-3, 4e-3]
    assert [r.winner.seconds for r in found if not r.current] == [3e-3]


def test_a_search_is_told_in_the_order_in_which_its_rows_were_committed(tmp_path):
    rows = [
        row(THIRD, None, status="compile"),
        row(DEFAULT, 3e-3),
        row(OTHER, 4e-3),
        row(dataclasses.replace(OTHER, load_width=4), 2e-3),
        final(OTHER, 1e-3),
    ]
    [result] = results_of(database(tmp_path / "d.db", rows))
    assert [(s.number, s.seconds, s.best) for s in steps(result)] == [
        (1, None, None),
        (2, 3e-3, 3e-3),
        (3, 4e-3, 3e-3),
        (4, 2e-3, 2e-3),
    ]


def test_the_order_of_sorted_records_and_of_merged_rows_is_not_taken_for_a_search(tmp_path):
    rows = [row(DEFAULT, 3e-3), row(OTHER, 4e-3)]
    [result] = results_of(records(tmp_path / "r.jsonl", rows))
    assert steps(result) == [] and len(result.searched) == 2
    merged = tmp_path / "merged.db"
    from metalgen.database import exchange
    from metalgen.database.store import Store

    with Store.open(merged) as store:
        exchange.merge(store, [tmp_path / "r.jsonl"])
    [result] = results_of(merged)
    assert steps(result) == [] and len(result.searched) == 2


def test_drawing_at_random_agrees_with_every_draw_there_is():
    times = [5.0, None, 1.0, 4.0, None, 2.0, 3.0]

    def quantile(number: int, share: float) -> float | None:
        found = sorted(
            min((t for t in draw if t is not None), default=math.inf)
            for draw in itertools.combinations(times, number)
        )
        best = next(t for n, t in enumerate(found, 1) if n >= share * len(found) - 1e-9)
        return None if best == math.inf else best

    for number in range(1, 8):
        [draw] = drawn(times, [number])
        assert draw.low == quantile(number, 0.1), number
        assert draw.middle == quantile(number, 0.5), number
        assert draw.high == quantile(number, 0.9), number


def test_milestones_end_with_the_last_measurement():
    assert milestones(3) == [1, 3]
    assert milestones(100) == [1, 5, 15, 25, 50, 100]


@pytest.mark.parametrize("name", ["bk", "load_width", "simdgroups"])
def test_the_parameter_that_alone_decides_is_the_most_important(name: str):
    valid = list(enumerate_valid(CONFIG))
    random.Random(0).shuffle(valid)
    values = sorted({getattr(s, name) for s in valid})
    times = {s: 1e-3 * (1 + values.index(getattr(s, name))) + 1e-9 * n for n, s in enumerate(valid)}
    shares = importances(times)
    assert shares[0][0] == name and shares[0][1] > 0.75
    assert sum(share for _, share in shares) == pytest.approx(1.0)


def test_too_few_times_make_no_parameter_important():
    valid = enumerate_valid(CONFIG)[:19]
    assert importances(dict.fromkeys(valid, 0.001)) == []
    assert importances({}) == []


def test_a_heat_map_has_the_best_time_of_each_pair_and_counts_failures(tmp_path):
    a = Schedule(bq=32, bk=16, bd=64, simdgroups=4)
    b = dataclasses.replace(a, load_width=4)
    c = dataclasses.replace(a, load_width=2)
    d = dataclasses.replace(a, bk=32)
    rows = [row(a, 3e-3), row(b, 2e-3), row(c, None, status="runtime")]
    rows += [row(d, None, status="compile"), row(DEFAULT, 4e-3)]
    [result] = results_of(records(tmp_path / "r.jsonl", rows))
    [heat] = heat_maps(result)
    assert (heat.row, heat.column) == ("bq", "bk")
    assert heat.rows == (32, DEFAULT.bq) and heat.columns == (16, 32)
    cells = {place: (c.seconds, c.tried, c.failed) for place, c in heat.cells.items()}
    assert cells == {(32, 16): (2e-3, 3, 1), (32, 32): (None, 1, 1), (64, 32): (4e-3, 1, 0)}
    assert heat.cells[(32, 16)].schedule == b


def test_predictions_of_the_present_model_show_the_whole_space(tmp_path):
    policy = json.dumps({"model": model_version(), "ranked": 4185})
    [result] = results_of(records(tmp_path / "r.jsonl", [modelled(DEFAULT, 1e-3, policy=policy)]))
    assert result.whole and set(result.landscape) == set(enumerate_valid(CONFIG))
    assert result.landscape[OTHER] == predict(PROBLEM, OTHER, get_chip("M3Max")).seconds
    [old] = results_of(records(tmp_path / "old.jsonl", [modelled(DEFAULT, 1e-3)]))
    assert not old.whole and old.landscape == {DEFAULT: 1e-3}


def test_the_notes_of_a_run_are_read_and_bad_ones_are_not(tmp_path):
    notes = {PROBLEM.key: {"noise_floor": 0.004, "drift": [0.01, "x", -0.02], "outliers": 3}}
    path = database(tmp_path / "a.db", [row()], notes | {"trials": 100})
    assert results_of(path)[0].notes == Notes(0.004, (0.01, -0.02), 3)
    notes = {PROBLEM.key: {"noise_floor": "<b>", "drift": {}, "outliers": 1.5}}
    path = database(tmp_path / "b.db", [row()], notes)
    assert results_of(path)[0].notes == Notes()


def test_the_same_measurement_in_two_files_counts_once(tmp_path):
    first = database(tmp_path / "a.db", [row(OTHER, 3e-3), row(DEFAULT, 4e-3)])
    second = records(tmp_path / "b.jsonl", [row(DEFAULT, 4e-3), row(THIRD, 5e-3)])
    sources = read_sources([first, second])
    assert [m.schedule for m in sources.rows] == [OTHER, DEFAULT, THIRD]
    assert [bool(m.run) for m in sources.rows] == [True, True, False]


def test_rows_of_one_chip_can_be_asked_for(tmp_path):
    path = records(tmp_path / "r.jsonl", [row(), row(chip="M1", cores=8)])
    assert [m.chip for m in read_sources([path], "M1").rows] == ["M1"]
    with pytest.raises(
        ArgumentError, match=r"--chip: expected .*r\.jsonl: M1, M3Max, but got 'M2'"
    ):
        read_sources([path], "M2")


def test_a_database_may_hold_nonsense_beside_good_rows(tmp_path):
    path = records(tmp_path / "r.jsonl", [row()])
    path.write_text(path.read_text() + "nonsense\n")
    sources = read_sources([path])
    assert len(sources.rows) == 1 and sources.summary.rejected == 1


@pytest.mark.parametrize("text", ["", "nonsense\n", "SQLite format 3\0" + "x" * 200])
def test_a_file_without_rows_is_refused_by_name(tmp_path: Path, text: str):
    path = tmp_path / "bad.db"
    path.write_text(text)
    with pytest.raises(ArgumentError, match=r"^FILE: expected .*bad\.db"):
        read_sources([path])


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (0.39, 0.66, [0.4, 0.45, 0.5, 0.55, 0.6, 0.65]),
        (1.0, 1.001, [1.0, 1.0002, 1.0004, 1.0006, 1.0008, 1.001]),
        (999.0, 5001.0, [1000, 2000, 3000, 4000, 5000]),
    ],
)
def test_ticks_are_round_and_within_their_axis(low: float, high: float, expected: list[float]):
    assert charts.ticks(low, high) == expected


def test_a_picture_places_its_marks_in_proportion():
    picture = charts.chart(
        [(1, 4e-3), (2, 2e-3), (3, 2e-3)],
        step=True,
        end=3,
        dots=[(1, 4e-3), (2, 2e-3), (3, 90e-3)],
        failed=[2],
        default=3e-3,
        mlx=50e-3,
    )
    left, right = charts.LEFT, charts.WIDTH - charts.RIGHT
    top, bottom = charts.TOP, charts.HEIGHT - charts.BOTTOM
    margin = 0.1 * (1.05 * 4e-3 - 2e-3)
    low, high = 2e-3 - margin, 4e-3 + margin

    def y(seconds: float) -> str:
        return f"{round(bottom + (seconds - low) / (high - low) * (top - bottom), 1):g}"

    middle = f"{(left + right) / 2:g}"
    assert picture.line == f"M{left:g} {y(4e-3)}H{middle}V{y(2e-3)}H{right:g}"
    assert picture.dots == f"M{left:g} {y(4e-3)}h0M{middle} {y(2e-3)}h0"
    assert picture.far.startswith(f"M{right - 2.5:g} ") and picture.far.count("M") == 1
    assert picture.failed.startswith(f"M{float(middle) - 2:g} ")
    assert f"{picture.default:g}" == y(3e-3)
    assert picture.mlx is None  # beyond the upper edge


def test_half_of_the_measurements_are_within_the_picture_even_where_none_is_better():
    dots = [(1, 1e-3), (2, 1.2e-3), (3, 1.5e-3), (4, 9e-3)]
    picture = charts.chart([(1, 1e-3)], end=4, dots=dots, default=1e-3, mlx=0.01e-3)
    assert (picture.dots.count("M"), picture.far.count("M")) == (2, 2)
    assert picture.mlx is None  # far below: it would flatten the rest


def test_labels_of_an_axis_have_the_same_decimals():
    picture = charts.chart([(1, 0.39e-3), (2, 0.6e-3)], end=2)
    assert [tick.text for tick in picture.y_ticks] == ["0.40", "0.45", "0.50", "0.55", "0.60"]
    picture = charts.chart([(1, 9e-3), (2, 1.2e-3)], end=2)
    assert [tick.text for tick in picture.y_ticks] == ["1", "2", "3", "4", "5"]


def test_shades_go_by_the_multiple_of_the_best_time():
    assert [charts.shade(x) for x in (1.0, 1.02, 1.021, 1.5, 4.0, 4.1)] == [0, 0, 1, 4, 6, 7]


def test_results_come_by_their_gain_in_each_kind_of_templates(tmp_path):
    def of(size: int, gain: float, **changes):
        problem = dataclasses.replace(PROBLEM, q_len=size, kv_len=size)
        return final(OTHER, 1e-3, problem=problem, default_seconds=gain * 1e-3, **changes)

    old = {"template_hash": "f" * 16}
    rows = [of(512, 1.2), of(1024, 2.0), of(2048, 1.5), of(4096, 9.0, **old)]
    path = records(tmp_path / "r.jsonl", [*rows, modelled(OTHER, 1e-4, default_seconds=1e-3)])
    found = [(r.provenance, r.current, r.gain) for r in results(read_sources([path]))]
    assert found == [
        ("measured", True, pytest.approx(2.0)),
        ("measured", True, pytest.approx(1.5)),
        ("measured", True, pytest.approx(1.2)),
        ("measured", False, pytest.approx(9.0)),
        ("modelled", True, pytest.approx(10.0)),
    ]
