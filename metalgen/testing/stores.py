"""What every store of tuning records must do. Inherit `StoreConformance`, say how one is opened.

    class TestSqlite(StoreConformance):
        def open(self, folder, *, read_only=False):
            return Store.open(folder / "tuning.db", read_only=read_only)

Expected values are written out, or come from `metalgen.testing.plain_store`, the definition. What
is kept is tested in `store_keeping`; here, what it is kept for: look-ups, merges and tuning.
"""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metalgen.calls.verify import Verification
from metalgen.chips import get_chip
from metalgen.database import exchange
from metalgen.database.exchange import Summary
from metalgen.database.hit import Hit
from metalgen.database.layout import STATUSES
from metalgen.database.measurement import Measurement
from metalgen.database.protocol import TuningStore
from metalgen.devices import get_device
from metalgen.families import Limits, Schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import template_hash
from metalgen.testing.plain_store import Contents, PlainStore
from metalgen.testing.rows import (
    CHIP,
    CONFIG,
    FIRST,
    HASH,
    NEIGHBOURS,
    OTHER_HASH,
    PROBLEM,
    SECOND,
    THIRD,
    modelled,
    row,
)
from metalgen.testing.store_base import (
    CHAINED_POLICY,
    DECODE,
    LONGER,
    LONGEST,
    NEAR,
    SPLIT,
    WARM_POLICY,
    put,
)
from metalgen.testing.store_calls import plain_merge, records, some_call, some_rows
from metalgen.testing.store_keeping import KeepsRecords
from metalgen.tuning.runner import tune


def good(schedule: Schedule = FIRST, seconds: float = 1e-3, **changes: Any) -> Measurement:
    """A row that passed its check."""
    return row(schedule, seconds, **({"verified": True} | changes))


def export(store: TuningStore) -> list[str]:
    """All rows as they are exchanged."""
    return list(exchange.export(store))


def answer(hit: Hit | None) -> tuple[Any, ...] | None:
    """A hit without the words for its place."""
    if hit is None:
        return None
    return (
        *(hit.schedule, hit.provenance, hit.chip, hit.exact, hit.stale, hit.seconds),
        *(hit.default_seconds, hit.mlx_seconds, hit.verified, hit.error),
    )


class StoreConformance(KeepsRecords):
    """Tests of one kind of store; `open` is all that a subclass must have.

    A store that is not an SQLite file of ours brings a `look_up` and a `merge` of its own.
    """

    # Look-ups

    def test_the_quickest_verified_row_answers_with_its_times(self, store: TuningStore) -> None:
        times: dict[str, Any] = {"default_seconds": 4e-3, "mlx_seconds": 3e-3, "error": 1e-4}
        put(store, good(SECOND, 2.5e-3), good(FIRST, 2e-3, **times), good(THIRD, 3e-3))
        assert answer(self.look_up(store)) == (
            *(FIRST, "measured", "M3Max", True, False, 2e-3),
            *(4e-3, 3e-3, True, 1e-4),
        )

    def test_a_measured_row_outranks_every_modelled_one_wherever_it_is(
        self, store: TuningStore
    ) -> None:
        put(store, modelled(FIRST, 1e-9, verified=True, phase="final"))
        assert self._found(store) == (FIRST, "modelled")
        put(store, good(SECOND, 1.0, problem=LONGEST, chip="M3", cores=10))
        assert self._found(store) == (SECOND, "measured")

    @pytest.mark.parametrize("status", STATUSES[1:])
    def test_a_row_that_failed_never_answers(self, store: TuningStore, status: str) -> None:
        put(store, row(FIRST, 1e-9, status=status))
        assert self.look_up(store) is None
        put(store, good(SECOND))
        assert self._found(store) == (SECOND, "measured")

    def test_a_row_that_was_not_checked_answers_only_after_its_check(
        self, store: TuningStore
    ) -> None:
        put(store, row(FIRST, 1e-9), good(SECOND))
        assert self._found(store) == (SECOND, "measured")
        store.record_check(CONFIG, FIRST, HASH, "simulator", "ok")
        assert self._found(store) == (FIRST, "measured")
        store.record_check(CONFIG, FIRST, HASH, "metal", "wrong")
        assert self._found(store) == (SECOND, "measured")

    def test_rows_of_other_templates_configs_and_families_never_answer(
        self, store: TuningStore
    ) -> None:
        other = replace(PROBLEM, config=replace(CONFIG, causal=False))
        put(store, good(template_hash=OTHER_HASH), good(problem=other), good(SPLIT, problem=DECODE))
        assert self.look_up(store) is None
        assert self.look_up(store, template_hash=OTHER_HASH) is not None
        assert self.look_up(store, DECODE) is not None

    def test_a_row_of_a_chip_that_is_no_neighbour_never_answers(self, store: TuningStore) -> None:
        put(store, good(chip="M1", cores=8), good(SECOND, chip="M1Max", cores=32))
        assert self.look_up(store) is None

    def test_the_nearer_place_answers_however_slow_its_row(self, store: TuningStore) -> None:
        places: list[dict[str, Any]] = [
            {"problem": LONGEST, "chip": "M3"},
            {"problem": LONGER, "chip": "M3"},
            {"problem": LONGER, "chip": "M3Ultra"},
            {"problem": LONGER, "chip": "M3Max-30"},
            {"problem": LONGEST},
            {"problem": LONGER},
            {"problem": NEAR},
            {"chip": "M3"},
            {"chip": "M3Ultra"},
            {"chip": "M3Max-30"},
            {},
        ]
        for number, place in enumerate(places):
            seconds = 1e-3 * (number + 1)
            put(store, good(FIRST, seconds, **place))
            hit = self.look_up(store)
            assert hit is not None
            assert (hit.seconds, hit.chip) == (seconds, place.get("chip", "M3Max"))
            assert hit.exact is (place == {})

    def test_finals_come_first_and_those_with_a_reservation_or_a_warm_cache_later(
        self, store: TuningStore
    ) -> None:
        steps = [
            good(FIRST, 1e-6, policy=WARM_POLICY, phase="final"),
            good(FIRST, 1e-5),
            good(SECOND, 1e-4, phase="final", detail="within the noise"),
            good(THIRD, 1e-3, phase="final"),
        ]
        for step in steps:
            put(store, step)
            hit = self.look_up(store)
            assert hit is not None
            assert (hit.schedule, hit.seconds) == (step.schedule, step.seconds)
            assert hit.exact is (step is not steps[0])

    def test_a_row_whose_launches_waited_for_one_another_answers_before_others(
        self, store: TuningStore
    ) -> None:
        put(store, good(FIRST, 1e-6, phase="final", mlx_seconds=2e-6))
        assert self._found(store) == (FIRST, "measured")
        warm = CHAINED_POLICY.replace("cold", "warm")
        put(store, good(THIRD, 1e-7, policy=warm), good(SECOND, policy=CHAINED_POLICY))
        assert self._found(store) == (SECOND, "measured")

    @pytest.mark.parametrize("change", [{"mlx_version": "0.1.0"}, {"os": "macOS 1.1"}])
    def test_a_row_measured_with_other_software_is_stale_and_answers_last(
        self, store: TuningStore, change: dict[str, str]
    ) -> None:
        put(store, good(FIRST, 1e-6, phase="final", **change))
        hit = self.look_up(store)
        assert hit is not None
        assert (hit.schedule, hit.stale, hit.exact) == (FIRST, True, False)
        put(store, good(SECOND))
        hit = self.look_up(store)
        assert hit is not None
        assert (hit.schedule, hit.stale, hit.exact) == (SECOND, False, True)

    def test_a_fresh_row_answers_however_many_stale_ones_are_quicker(
        self, store: TuningStore
    ) -> None:
        versions = [f"0.{n}.0" for n in range(40)]
        old = [good(FIRST, 1e-6, policy=v, mlx_version=v, phase="final") for v in versions]
        put(store, *old, good(SECOND, phase="search"))
        hit = self.look_up(store)
        assert hit is not None and (hit.schedule, hit.stale) == (SECOND, False)

    def test_a_schedule_beyond_the_limits_is_passed_over(self, store: TuningStore) -> None:
        put(store, good(FIRST, 1e-6), good(SECOND, 1e-3))
        assert self._found(store, limits=Limits(threadgroup_bytes=4096)) == (SECOND, "measured")
        assert self.look_up(store, limits=Limits(threadgroup_bytes=16)) is None

    def test_a_pin_answers_before_every_row_until_it_is_taken_away(self, folder: Path) -> None:
        with self.open(folder) as store:
            put(store, good(FIRST))
            assert store.unpin(PROBLEM) is False
            store.pin(PROBLEM, THIRD, "A/B")
            store.pin(PROBLEM, SECOND)
            store.pin(LONGER, THIRD)
        with self.open(folder) as store:
            assert self._found(store) == (SECOND, "pinned")
            assert self._found(store, limits=Limits(threadgroup_bytes=16)) is None
            assert store.unpin(PROBLEM) is True
            assert self._found(store) == (FIRST, "measured")
            assert self._found(store, LONGER) == (THIRD, "pinned")

    def _found(
        self, store: TuningStore, problem: Problem = PROBLEM, **arguments: Any
    ) -> tuple[Schedule, str] | None:
        hit = self.look_up(store, problem, **arguments)
        return None if hit is None else (hit.schedule, hit.provenance)

    # Merging

    def test_a_merge_pools_samples_and_keeps_what_counts_against_us(
        self, store: TuningStore, tmp_path: Path
    ) -> None:
        here = good(
            samples=(3e-3, 1e-3, 2e-3), seconds=2e-3, mlx_seconds=4e-3, default_seconds=9e-3
        )
        there = row(
            samples=(2e-3, 2e-3, 8e-3), seconds=2e-3, mlx_seconds=5e-3, source_hash="5" * 16,
            created="2026-11-22T08:00:00Z", mlx_version="0.99",
        )  # fmt: skip
        put(store, here)
        source = records(tmp_path / "s.jsonl", there, good(SECOND))
        before = store.measurements()
        plan = self.merge(store, [source], dry_run=True)
        assert store.measurements() == before
        assert self.merge(store, [source]) == plan == Summary(new=1, pooled=1)
        found, other = sorted(store.measurements(), key=lambda m: m.schedule.bq, reverse=True)
        assert found.samples == (1e-3, 2e-3, 2e-3, 3e-3, 8e-3)
        assert found.seconds == 2e-3 and found.spread == pytest.approx(1e-3)
        assert (found.mlx_seconds, found.default_seconds) == (4e-3, 9e-3)
        assert (found.verified, found.source_hash) == (True, "5" * 16)
        assert (found.created, found.mlx_version) == ("2026-11-22T08:00:00Z", "0.99")
        assert replace(other, run="") == good(SECOND)
        assert self.merge(store, [source]) == Summary(same=2)

    def test_a_row_that_either_side_found_wrong_is_wrong(
        self, store: TuningStore, tmp_path: Path
    ) -> None:
        put(store, good(FIRST), row(SECOND, status="wrong", detail="here"))
        bad = row(FIRST, status="wrong", detail="there")
        source = records(tmp_path / "s.jsonl", bad, good(SECOND))
        assert self.merge(store, [source]).conflicts == 2
        found = {m.schedule: (m.status, m.verified, m.detail) for m in store.measurements()}
        assert found == {FIRST: ("wrong", False, "there"), SECOND: ("wrong", False, "here")}

    def test_a_kernel_that_failed_its_check_here_cannot_be_brought_in_as_good(
        self, store: TuningStore, tmp_path: Path
    ) -> None:
        store.record_check(CONFIG, FIRST, HASH, "metal", "wrong", detail="no")
        source = records(tmp_path / "s.jsonl", good(FIRST, 1e-9), good(SECOND))
        self.merge(store, [source])
        found = {m.schedule: (m.status, m.verified) for m in store.measurements()}
        assert found == {FIRST: ("wrong", False), SECOND: ("ok", True)}
        assert self._found(store) == (SECOND, "measured")

    @pytest.mark.parametrize("devices", [("metal", "simulator"), ("simulator", "metal")])
    def test_of_two_failed_checks_the_graver_one_counts_for_what_is_brought_in(
        self, store: TuningStore, tmp_path: Path, devices: tuple[str, str]
    ) -> None:
        for device, status in zip(devices, ("wrong", "timeout"), strict=True):
            store.record_check(CONFIG, FIRST, HASH, device, status)
        self.merge(store, [records(tmp_path / "s.jsonl", good(FIRST))])
        assert [(m.status, m.verified) for m in store.measurements()] == [("wrong", False)]

    def test_merges_in_either_direction_come_to_the_same(self, tmp_path: Path) -> None:
        draw = random.Random(3)
        sides = [list(some_rows(draw, 60).values()) for _ in range(2)]
        results = []
        for number, (mine, theirs) in enumerate((sides, sides[::-1])):
            source = records(tmp_path / f"{number}.jsonl", *theirs)
            with self.open(tmp_path / str(number)) as store:
                put(store, *mine)
                self.merge(store, [source])
                results.append(export(store))
        assert results[0] == results[1]
        joined = {exchange.identity(m): m for m in sides[0]}
        for m in sides[1]:
            key = exchange.identity(m)
            joined[key] = exchange.join(joined[key], m) if key in joined else m
        assert results[0] == sorted(exchange.canonical(m).to_line() for m in joined.values())
        assert len(joined) <= len(sides[0]) + len(sides[1]) - 5  # so many met

    def test_an_export_brought_into_another_store_is_exported_the_same(
        self, tmp_path: Path
    ) -> None:
        rows = [*some_rows(random.Random(1), 30).values(), good(SPLIT, problem=DECODE)]
        with self.open(tmp_path / "a") as store:
            put(store, *rows)
            lines = export(store)
        assert lines == sorted(exchange.canonical(m).to_line() for m in rows)
        source = tmp_path / "a.jsonl"
        source.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        with self.open(tmp_path / "b") as store:
            assert self.merge(store, [source]) == Summary(new=len(rows))
            assert export(store) == lines
            assert {m.run for m in store.measurements()} == {"merged"}

    def test_bad_records_are_left_out_by_name_and_bad_files_leave_nothing(
        self, store: TuningStore, tmp_path: Path
    ) -> None:
        line = good().to_line()
        bad = ["{", line.replace("M3Max", "Z80"), line.replace('"ok"', '"great"'), "[" * 9999]
        bad += [line.replace('"bq":64', '"bq":7'), line.replace("0.001", "NaN")]
        bad[2] = line[:-1] + ',"status":"great"}'
        source = tmp_path / "s.jsonl"
        source.write_text("\n".join([*bad, good(SECOND).to_line()]), encoding="utf-8")
        text = tmp_path / "t.jsonl"
        text.write_bytes(b"SQLite format 3\0" + b"no database" * 100)
        summary = self.merge(store, [source, text, tmp_path / "missing"])
        assert (summary.new, summary.rejected, summary.refused) == (1, len(bad), 2)
        places = [place for file, place, _ in summary.reasons if file == str(source)]
        assert places == [f"line {n}" for n in range(1, len(bad) + 1)]
        assert [m.schedule for m in store.measurements()] == [SECOND]
        assert store.problems() == [PROBLEM]

    # All together

    def test_it_can_be_tuned_into_and_answers_with_what_won(self, store: TuningStore) -> None:
        checked: list[Schedule] = []

        def verify(device: Any, config: AttentionConfig, schedule: Schedule, **_: Any) -> Any:
            checked.append(schedule)
            if len(checked) == 1:
                return Verification(False, float("inf"), 1e-3, "Lq=9", "relative error inf")
            return Verification(True, 1e-4, 1e-3, "Lq=9", "")

        def run() -> Measurement:
            report = tune(
                [PROBLEM],
                get_chip("M3Max"),
                store,
                trials=20,
                checker=get_device("reference"),
                verify=verify,
            )
            (outcome,) = report.outcomes
            assert outcome.winner is not None
            assert store.runs()[-1].outcome == "finished"
            return outcome.winner

        winner = run()
        rows = store.measurements(PROBLEM, chip="M3Max")
        assert len(checked) == 2 and len(rows) == 20
        failed = [m for m in rows if m.schedule == checked[0]]
        assert [(m.status, m.verified) for m in failed] == [("wrong", False)]
        assert [m for m in rows if m.verified] == [winner]
        hit = self.look_up(store, template_hash=template_hash(FIRST))
        assert hit is not None
        assert (hit.schedule, hit.provenance) == (checked[1], "modelled")
        assert run() == winner
        assert len(checked) == 2 and store.measurements() == rows

    @pytest.mark.parametrize("seed", range(4))
    def test_any_calls_do_what_they_do_to_the_definition(self, seed: int, tmp_path: Path) -> None:
        """After each of 60 random calls, all that can be asked has the same answer."""
        draw = random.Random(seed)
        plain = PlainStore(Contents())
        folder = tmp_path / "store"
        store = self.open(folder)
        try:
            for number in range(60):
                if number % 20 == 19:
                    store.close()
                    store = self.open(folder)
                call = some_call(draw, tmp_path / f"{number}.jsonl")
                assert call(store, self.merge) == call(plain, plain_merge), number
                self._compare(store, plain, number)
        finally:
            store.close()

    def _compare(self, store: TuningStore, plain: PlainStore, number: int) -> None:
        def rows(of: TuningStore) -> list[Measurement]:
            numbers = {run.id: str(n) for n, run in enumerate(r for r in of.runs() if r.seed)}
            found = (replace(m, run=numbers.get(m.run, m.run)) for m in of.measurements())
            return sorted(found, key=exchange.identity)

        assert rows(store) == rows(plain), number
        assert store.problems() == plain.problems(), number
        for schedule in (FIRST, SECOND, THIRD):
            for device in ("metal", "simulator"):
                checks = [s.find_check(CONFIG, schedule, HASH, device) for s in (store, plain)]
                found = [c and replace(c, created="") for c in checks]
                assert found[0] == found[1], number
            kernel = (CONFIG, schedule, HASH)
            either = [s.find_check(*kernel) for s in (store, plain)]
            assert [c and c.ok for c in either[:1]] == [c and c.ok for c in either[1:]], number
        for problem in (PROBLEM, NEAR, LONGER):
            for limits in (CHIP.limits, Limits(threadgroup_bytes=4096)):
                expected = plain.look_up(problem, CHIP.name, limits, NEIGHBOURS, HASH)
                found_hit = self.look_up(store, problem, limits=limits)
                assert answer(found_hit) == answer(expected), number
