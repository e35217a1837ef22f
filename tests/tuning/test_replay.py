"""Recorded spaces, what is borrowed from other devices, and the strategies, on known values."""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
from pathlib import Path

import pytest
from tuning_fakes import cost

from metalgen.chips import get_chip
from metalgen.database.measurement import Measurement
from metalgen.database.store import Store
from metalgen.errors import ArgumentError
from metalgen.families import APPLE, Schedule, enumerate_valid
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.search.replay import read_recordings
from metalgen.tuning.search.starts import borrow, borrowed_schedules, related, translated

CACHE = {
    "tune_params_keys": ["x", "y"],
    "cache": {
        "1,2": {"x": 1, "y": 2, "time": 4.0},
        "1,4": {"x": 1, "y": 4, "time": 2.0},
        "8,2": {"x": 8, "y": 2, "time": "RuntimeFailedConfig"},
    },
}
CONFIG = AttentionConfig(head_dim=64)
PROBLEM = Problem(CONFIG, 32, 1024, 1024)


def measured(number: int, chip: str = "M1", seconds: float | None = None) -> Measurement:
    """A row of the `number`-th valid schedule."""
    schedule = enumerate_valid(CONFIG)[number]
    return Measurement(
        PROBLEM, schedule, "0123456789abcdef", chip, 8, "metal", "measured", "p",
        seconds=seconds or cost(schedule), created="2026-11-21T08:00:00Z",
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
def test_a_cache_file_of_kernel_tuner_is_a_space(tmp_path: Path, packed: bool) -> None:
    (tmp_path / "gemm").mkdir()
    data = json.dumps(CACHE).encode()
    path = tmp_path / "gemm" / ("A100.json.gz" if packed else "A100.json")
    path.write_bytes(gzip.compress(data) if packed else data)
    (space,) = read_recordings(tmp_path)
    assert (space.group, space.device, space.best) == ("gemm", "A100", 0.002)
    assert space.times == {(1, 2): 0.004, (1, 4): 0.002, (8, 2): None}
    assert [(p.name, p.choices) for p in space.parameters] == [("x", (1, 8)), ("y", (2, 4))]
    assert space.start == (1, 4)
    assert space.point((8, 2)) == {"x": 8, "y": 2}
    assert [space.entries[n] for n in range(3)] == list(space.times)
    assert space.finite.points == [space.point(entry) for entry in space.entries]


def test_our_records_make_a_space_for_each_chip_and_problem(tmp_path: Path) -> None:
    rows = [measured(n, chip) for n in (0, 3, 9) for chip in ("M1", "M2")]
    (tmp_path / "space.jsonl").write_text("".join(m.to_line() + "\n" for m in rows))
    spaces = read_recordings(tmp_path)
    assert [s.device for s in spaces] == ["M1", "M2"]
    for space in spaces:
        assert sorted(filter(None, space.times.values())) == sorted(
            cost(enumerate_valid(CONFIG)[n]) for n in (0, 3, 9)
        )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{}"),
        ("a.json", "[" * 100_000),
        ("a.json", '{"tune_params_keys":["x"],"cache":{"1":{"x":[1],"time":1}}}'),
        ("a.json", '{"tune_params_keys":["x"],"cache":{"1":{"x":1,"time":"no"}}}'),
        ("a.jsonl", "not a record\n"),
        ("a.txt", "nothing"),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ArgumentError, match="spaces: expected"):
        read_recordings(tmp_path)


def test_winners_come_first_and_then_what_is_best_on_all_together() -> None:
    first = {"a": 1.0, "b": 1.1, "c": 4.0}
    second = {"c": 1.0, "b": 1.1, "a": 4.0, "d": 8.0}
    # Together: b 1/1.21, then a and c 1/4, then d 0.3/8.
    assert borrow([first, {}, second]) == ["a", "c", "b", "d"]
    assert borrow([first, second], 3) == ["a", "c", "b"]
    assert math.log(0.3 / 8) < math.log(1 / 4) < math.log(1 / 1.21)
    assert borrow([]) == []


def test_schedules_are_borrowed_from_near_chips_and_not_from_the_chip_itself(
    tmp_path: Path,
) -> None:
    with Store.open(tmp_path / "t.db") as store:
        run = store.begin_run("M1", 0)
        rows = [
            measured(5, "M1Max-24", 1e-3), measured(6, "M1Max-24", 2e-3),
            measured(7, "M1Max", 1e-3), measured(8, "H200", 1e-3),
        ]  # fmt: skip
        store.add_measurements(dataclasses.replace(m, run=run) for m in rows)
        found = borrowed_schedules(PROBLEM, get_chip("M1Max"), store)
    valid = enumerate_valid(CONFIG)
    assert found == [valid[5], valid[6]]


def test_related_configs_are_the_plain_ones_and_then_those_of_other_widths() -> None:
    config = AttentionConfig(96, "bfloat16", heads_per_kv=4, causal=True, softcap=30.0)
    found = related(config)
    assert found[0] == config
    assert [(c.head_dim, c.causal, c.softcap) for c in found[1:5]] == [
        (96, True, None), (96, False, None), (80, True, None), (80, False, None)
    ]  # fmt: skip
    assert all((c.dtype, c.heads_per_kv) == ("bfloat16", 4) for c in found)
    assert len(set(found)) == len(found) == 11


@pytest.mark.parametrize(
    ("bd", "width", "expected"), [(128, 64, 64), (128, 256, 256), (32, 64, 32)]
)
def test_a_whole_head_dimension_stays_whole_in_a_translated_schedule(
    bd: int, width: int, expected: int
) -> None:
    schedule = Schedule(bq=32, bk=32, bd=bd, simdgroups=4)
    found = translated(schedule, AttentionConfig(128), AttentionConfig(width), APPLE)
    assert found == Schedule(bq=32, bk=32, bd=expected, simdgroups=4)


def test_schedules_are_borrowed_from_related_configs_where_the_own_one_is_not_on_record(
    tmp_path: Path,
) -> None:
    causal = dataclasses.replace(CONFIG, causal=True)
    other = dataclasses.replace(CONFIG, causal=True, softcap=20.0)  # not the plain one
    with Store.open(tmp_path / "t.db") as store:
        run = store.begin_run("M1", 0)
        for n, config in ((5, causal), (7, other)):
            problem = dataclasses.replace(PROBLEM, config=config)
            store.add_measurements([dataclasses.replace(measured(n), problem=problem, run=run)])
        found = borrowed_schedules(PROBLEM, get_chip("M1"), store)
    assert found == [enumerate_valid(CONFIG)[5]]
