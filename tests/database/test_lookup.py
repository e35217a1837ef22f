"""In which order places are asked, how a hit is labelled, and what may not win."""

from __future__ import annotations

import dataclasses
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from metalgen.database.hit import Hit
from metalgen.database.lookup import checked, last_chip, lookup
from metalgen.database.measurement import Measurement
from metalgen.database.records import write_records
from metalgen.database.store import Store
from metalgen.families import Limits, Schedule
from metalgen.families.sizes import Problem
from metalgen.testing.rows import (
    CHIP,
    CONFIG,
    FIRST,
    HASH,
    NEIGHBOURS,
    PROBLEM,
    SECOND,
    THIRD,
    modelled,
    row,
)
from metalgen.tuning.timing.measure import Policy

LONGER = dataclasses.replace(PROBLEM, q_len=4096, kv_len=4096)
LONGEST = dataclasses.replace(PROBLEM, q_len=16384, kv_len=16384)


class Places:
    """A user's database and a folder of shipped records, both empty at first."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "tuning.db"
        self.shipped = folder / "shipped"
        self.shipped.mkdir()

    def keep(self, *measurements: Measurement) -> None:
        """Put verified rows into the user's database."""
        with Store.open(self.path) as store:
            run = store.begin_run("M3Max", 0)
            store.add_measurements(
                dataclasses.replace(m, run=run, verified=m.status == "ok") for m in measurements
            )

    def ship(self, *measurements: Measurement) -> None:
        """Put verified rows into the shipped records of their chip."""
        rows = [dataclasses.replace(m, verified=True) for m in measurements]
        for chip in {m.chip for m in rows}:
            write_records(
                self.shipped / f"{chip.lower()}.jsonl", [m for m in rows if m.chip == chip]
            )

    def find(self, problem: Problem = PROBLEM, **arguments: Any) -> Hit | None:
        """Look up on M3Max."""
        defaults: dict[str, Any] = {
            "database": self.path,
            "shipped": self.shipped,
            "neighbours": NEIGHBOURS,
        }
        return lookup(problem, CHIP, {HASH}, **(defaults | arguments))


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path)


def test_the_fastest_verified_row_of_this_chip_wins(places: Places) -> None:
    places.keep(row(FIRST, 2e-3, mlx_seconds=3e-3, default_seconds=4e-3), row(SECOND, 2.5e-3))
    hit = places.find()
    assert hit == Hit(
        schedule=FIRST,
        provenance="measured",
        place="user database, this chip",
        chip="M3Max",
        exact=True,
        seconds=2e-3,
        default_seconds=4e-3,
        mlx_seconds=3e-3,
        verified=True,
    )
    assert hit.beats_mlx


def test_rows_that_were_never_checked_do_not_answer_and_the_path_says_so(places: Places) -> None:
    with Store.open(places.path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurement(row(run=run))
        store.add_measurement(row(run=run, template_hash="f" * 16))
    trace: list[str] = []
    assert places.find(trace=trace) is None
    begin = "user database, this chip: 1 row"
    assert f"{begin} not eligible (status ok, not verified)" in trace
    refresh = "`metalgen db refresh` keeps those whose kernel source is unchanged"
    assert f"{begin} from other template versions, ignored; {refresh}" in trace


def test_a_path_names_the_command_where_rows_of_other_templates_would_be_better(
    places: Places,
) -> None:
    def told() -> bool:
        trace: list[str] = []
        assert places.find(trace=trace) is not None
        return any("1 row from other template versions" in step for step in trace)

    places.keep(row(FIRST, template_hash="f" * 16), modelled(SECOND))
    assert told()
    places.keep(row(THIRD))
    assert not told()


def test_rows_of_other_templates_are_a_miss(places: Places) -> None:
    places.keep(row(template_hash="f" * 16))
    places.ship(row(template_hash="f" * 16))
    assert places.find() is None


def test_any_measured_row_outranks_every_modelled_one(places: Places) -> None:
    places.keep(modelled(FIRST, 1e-6))
    places.ship(row(SECOND, 1.0, chip="M3Max-30", cores=30))
    hit = places.find()
    assert hit is not None
    assert (hit.schedule, hit.provenance) == (SECOND, "measured")
    places.keep(row(THIRD, 2.0, problem=LONGER))
    hit = places.find()
    assert hit is not None
    assert (hit.schedule, hit.place) == (
        SECOND,
        "shipped records, same chip with another core count (M3Max-30)",
    )


def test_places_are_asked_in_order_and_every_inexact_hit_is_labelled(places: Places) -> None:
    def chip(name: str, cores: int, schedule: Schedule, problem: Problem = PROBLEM) -> Measurement:
        return row(schedule, 1e-3, chip=name, cores=cores, problem=problem)

    wide = dataclasses.replace(SECOND, load_width=4)
    wider = dataclasses.replace(SECOND, load_width=2)
    steps = [
        (
            [chip("M3Max", 40, wider, LONGEST)],
            "neighbouring bucket (M3Max, BH=32 Lq=16384 Lk=16384)",
        ),
        ([chip("M3Max", 40, wide, LONGER)], "neighbouring bucket (M3Max, BH=32 Lq=4096 Lk=4096)"),
        ([chip("M3", 10, THIRD)], "same generation (M3)"),
        ([chip("M3Ultra", 80, FIRST)], "same generation (M3Ultra)"),
        ([chip("M3Max-30", 30, SECOND)], "same chip with another core count (M3Max-30)"),
    ]
    for rows, label in steps:
        places.keep(*rows)
        hit = places.find()
        assert hit is not None
        assert (hit.place, hit.exact) == (f"user database, {label}", False)
        assert hit.schedule == rows[0].schedule
        assert not hit.beats_mlx
    places.ship(row(THIRD))
    hit = places.find()
    assert hit is not None
    assert (hit.place, hit.exact) == ("shipped records, this chip", True)
    places.keep(row(FIRST))
    hit = places.find()
    assert hit is not None
    assert (hit.place, hit.exact) == ("user database, this chip", True)


def test_the_path_tells_why_each_better_place_missed(places: Places) -> None:
    places.keep(row(chip="M3Ultra", cores=80))
    hit = places.find()
    assert hit is not None
    assert hit.path == [
        "this chip: no verified measured row",
        "same chip with another core count: no verified measured row",
    ]


def test_a_pin_comes_before_everything(places: Places) -> None:
    places.keep(row(FIRST))
    with Store.open(places.path) as store:
        store.pin(PROBLEM, SECOND, "A/B")
    hit = places.find()
    assert hit is not None
    assert (hit.schedule, hit.provenance, hit.place) == (SECOND, "pinned", "pin")
    with Store.open(places.path) as store:
        store.unpin(PROBLEM)
    hit = places.find()
    assert hit is not None and hit.schedule == FIRST


@pytest.mark.parametrize("change", [{"mlx_version": "0.1.0"}, {"os": "macOS 12.1"}])
def test_a_row_measured_with_other_software_is_stale_and_only_a_fallback(
    places: Places, change: dict[str, str]
) -> None:
    places.keep(row(FIRST, 1e-3, mlx_seconds=2e-3, **change))
    hit = places.find()
    assert hit is not None
    assert (hit.place, hit.stale, hit.exact) == ("user database, this chip, stale", True, False)
    assert not hit.beats_mlx
    places.keep(row(SECOND, 5e-3))
    hit = places.find()
    assert hit is not None and (hit.schedule, hit.stale) == (SECOND, False)


def test_a_shipped_row_measured_with_this_software_answers_before_a_quicker_stale_one(
    places: Places,
) -> None:
    places.ship(row(FIRST, 1e-6, mlx_version="0.1.0", policy="old"), row(SECOND, 1e-3))
    hit = places.find()
    assert hit is not None and (hit.schedule, hit.stale, hit.exact) == (SECOND, False, True)
    places.ship(row(FIRST, 1e-6, mlx_version="0.1.0"))
    hit = places.find()
    assert hit is not None and (hit.schedule, hit.stale, hit.exact) == (FIRST, True, False)


def test_a_shipped_row_whose_launches_waited_answers_before_a_quicker_one_whose_did_not(
    places: Places,
) -> None:
    places.ship(row(FIRST, 1e-3, phase="final"), row(SECOND, 2e-3, policy=Policy().key))
    hit = places.find()
    assert hit is not None
    assert (hit.schedule, hit.exact) == (SECOND, True)


def test_a_modelled_row_never_beats_mlx(places: Places) -> None:
    places.keep(modelled(FIRST, 1e-3, mlx_seconds=1.0))
    hit = places.find()
    assert hit is not None and hit.exact and not hit.beats_mlx


BAD_SCHEDULES = [
    "",
    "not json",
    "[" * 100_000,
    '{"bq":"64"}',
    '{"bk":32,"bq":64,"bd":64,"simdgroups":4,"row_blocks":2,"evil":1}',
    '{"bk":32,"bq":64,"bd":64,"simdgroups":3,"row_blocks":2}',
    '{"bk":32,"bq":64,"bd":256,"simdgroups":4,"row_blocks":2}',
    '{"bk":32,"bq":64,"bd":true,"simdgroups":4,"row_blocks":2}',
]


@pytest.mark.parametrize("text", BAD_SCHEDULES)
def test_a_row_with_a_bad_schedule_is_a_miss_and_the_next_one_answers(
    places: Places, text: str
) -> None:
    places.keep(row(FIRST, 1e-6), row(SECOND, 1e-3))
    connection = sqlite3.connect(places.path)
    connection.execute("UPDATE schedules SET key = ? WHERE key = ?", [text, FIRST.key])
    connection.commit()
    connection.close()
    hit = places.find()
    assert hit is not None and hit.schedule == SECOND
    assert hit.path[0].startswith("user database, this chip: a row was passed over (")


def test_a_schedule_that_this_chip_cannot_run_is_passed_over(places: Places) -> None:
    places.keep(row(FIRST, 1e-6), row(SECOND, 1e-3))
    hit = places.find(limits=Limits(threadgroup_bytes=4096))
    assert hit is not None and hit.schedule == SECOND
    assert "threadgroup memory" in hit.path[0]


def test_a_bad_shipped_line_is_left_out_and_the_others_count(places: Places) -> None:
    good = dataclasses.replace(row(SECOND), verified=True).to_line()
    lines = [
        good.replace(SECOND.key, text if text.startswith("{") else "{}") for text in BAD_SCHEDULES
    ]
    lines += ["", "null", good[:-5], good.replace('"M3Max"', '"M1"'), good.replace("ok", "wrong")]
    (places.shipped / "m3max.jsonl").write_text("\n".join([*lines, good]), encoding="utf-8")
    hit = places.find()
    assert hit is not None and hit.schedule == SECOND
    (places.shipped / "m3max.jsonl").write_bytes(b"\xff\xfe\x00" * 1000)
    assert places.find() is None


def test_a_missing_table_is_a_miss(places: Places) -> None:
    places.keep(row(FIRST))
    connection = sqlite3.connect(places.path)
    connection.execute("DROP TABLE measurements")
    connection.commit()
    connection.close()
    trace: list[str] = []
    assert places.find(trace=trace) is None
    assert trace[0] == "user database not used: unreadable (no such table: measurements)"


def test_without_a_chip_only_a_pin_can_answer(places: Places) -> None:
    places.keep(row(FIRST))
    arguments: dict[str, Any] = {"database": places.path, "shipped": places.shipped}
    assert lookup(PROBLEM, None, {HASH}, **arguments) is None
    with Store.open(places.path) as store:
        store.pin(PROBLEM, SECOND)
    hit = lookup(PROBLEM, None, {HASH}, **arguments)
    assert hit is not None and hit.schedule == SECOND


def test_rows_are_seen_while_a_writer_still_holds_the_log(places: Places) -> None:
    with Store.open(places.path) as store:
        run = store.begin_run("M3Max", 0)
        store.add_measurement(row(run=run, verified=True))
        assert places.path.with_name("tuning.db-wal").stat().st_size > 0
        assert places.find() is not None


def test_checked_tells_how_a_kernels_check_ended(places: Places) -> None:
    assert checked(CONFIG, FIRST, HASH, database=places.path) is None
    with Store.open(places.path) as store:
        store.record_check(CONFIG, FIRST, HASH, "simulator", "ok", error=1e-4)
        store.record_check(CONFIG, SECOND, HASH, "simulator", "ok", error=1e-4)
        store.record_check(CONFIG, SECOND, HASH, "metal", "wrong", error=1.0)
    assert checked(CONFIG, FIRST, HASH, database=places.path) == "ok"
    assert checked(CONFIG, SECOND, HASH, database=places.path) == "wrong"
    assert checked(CONFIG, SECOND, HASH, database=places.path, device="simulator") == "ok"
    assert checked(CONFIG, THIRD, HASH, database=places.path) is None


def test_the_chip_that_was_tuned_last_is_known(places: Places) -> None:
    assert last_chip(database=places.path) is None
    with Store.open(places.path) as store:
        store.begin_run("M1", 0)
        store.begin_run("M3Max-30", 0)
    assert last_chip(database=places.path) == "M3Max-30"


def test_the_look_up_imports_no_third_party_package_but_mlx(tmp_path: Path) -> None:
    script = (
        "import sys; from metalgen.database import lookup; "
        "print([n for n in ('sqlite_utils', 'numpy', 'click', 'rich', 'optuna', 'jinja2') "
        "if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
