"""What a store keeps: rows, checks and runs come back whole, or are refused. See `stores`."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metalgen.database.errors import DatabaseError, ReadOnlyDatabase
from metalgen.database.layout import MAX_TEXT, PHASES, PROVENANCES, STATUSES
from metalgen.database.measurement import Measurement
from metalgen.database.protocol import TuningStore
from metalgen.errors import ArgumentError
from metalgen.testing.plain_store import Contents, PlainStore
from metalgen.testing.rows import (
    CONFIG,
    FIRST,
    HASH,
    OTHER_HASH,
    PROBLEM,
    SECOND,
    THIRD,
    modelled,
    row,
)
from metalgen.testing.store_base import DECODE, LONGER, LONGEST, SPLIT, WARM_POLICY, OnStore, put
from metalgen.testing.store_rows import BAD, FULL, IDENTITY, forced


class KeepsRecords(OnStore):
    """Tests of what is written and read back; a part of `StoreConformance`."""

    # Rows

    def test_every_field_of_a_row_comes_back(self, folder: Path) -> None:
        fields = dataclasses.fields(Measurement)
        plain = row()
        for f in fields:
            unlike = {"template_hash", "chip", "cores", "device", "provenance", "policy", "status"}
            if f.name not in unlike | {"created", "os", "mlx_version", "metalgen_version"}:
                assert getattr(FULL, f.name) != getattr(plain, f.name), f"FULL lacks {f.name}"
        with self.open(folder) as store:
            (sent,) = put(store, FULL)
        with self.open(folder) as store:
            (found,) = store.measurements()
        for f in fields:
            assert getattr(found, f.name) == getattr(sent, f.name), f.name
        assert type(found.samples) is tuple and type(found.verified) is bool

    @pytest.mark.parametrize("status", STATUSES[1:])
    @pytest.mark.parametrize("provenance", PROVENANCES)
    @pytest.mark.parametrize("phase", PHASES)
    def test_a_row_that_failed_comes_back_without_times(
        self, store: TuningStore, status: str, provenance: str, phase: str
    ) -> None:
        failed: dict[str, Any] = {
            "status": status,
            "provenance": provenance,
            "phase": phase,
            "detail": "why",
        }
        sent = put(store, row(FIRST, None, **failed))
        assert store.measurements() == sent
        (found,) = store.measurements()
        assert [found.seconds, found.spread, found.error, found.samples] == [None, None, None, ()]

    @pytest.mark.parametrize(
        "text", ["", "x" * MAX_TEXT, "\u6f22\u5b57 \U0001f600 \u00e9 e\u0301", "{{ 7*7 }} %s \\n $"]
    )
    def test_texts_come_back_as_they_are(self, store: TuningStore, text: str) -> None:
        sent = put(store, row(detail=text, policy=text, os=text, status="runtime"))
        assert store.measurements() == sent
        assert store.measurements(policy=text) == sent

    @pytest.mark.parametrize("case", BAD)
    def test_what_no_record_may_hold_is_refused_by_name(
        self, store: TuningStore, case: str
    ) -> None:
        kept = put(store, row(SECOND))
        good = row(run=kept[0].run)
        with pytest.raises(ArgumentError) as caught:
            store.add_measurements([good, forced(good, **BAD[case])])
        assert caught.value.argument in BAD[case]
        assert store.measurements() == kept
        assert store.add_measurement(good) is True

    def test_the_same_measurement_again_is_not_added_and_the_first_stays(
        self, store: TuningStore
    ) -> None:
        (first,) = put(store, row())
        again = replace(first, seconds=5.0, samples=(5.0,), detail="later")
        assert store.add_measurement(again) is False
        other = replace(first, schedule=SECOND)
        assert store.add_measurements([again, other, replace(other, seconds=7.0)]) == 1
        assert store.measurements() == [first, other]

    @pytest.mark.parametrize("part", IDENTITY)
    def test_a_row_that_differs_in_one_part_of_its_identity_is_another(
        self, store: TuningStore, part: str
    ) -> None:
        sent = put(store, row(), row(**{"schedule": FIRST} | IDENTITY[part]))
        assert store.measurements() == sent

    def test_rows_are_in_the_order_in_which_they_were_committed(self, folder: Path) -> None:
        with self.open(folder) as store:
            sent = put(store, row(THIRD), row(FIRST), modelled(FIRST))
            sent += put(store, row(SECOND, created="2020-01-01T00:00:00Z"), row(FIRST, chip="M1"))
            assert store.measurements() == sent
        with self.open(folder) as store:
            assert store.measurements() == sent

    def test_filters_leave_the_rows_that_fit_all_of_them(self, store: TuningStore) -> None:
        changes = [{}, *IDENTITY.values(), {"problem": DECODE, "schedule": SPLIT}]
        wide = replace(CONFIG, head_dim=32)
        changes += [{"problem": replace(PROBLEM, config=wide), "verified": True}]
        changes += [{"policy": "p", "verified": True}]
        sent = put(store, *(row(**{"schedule": FIRST} | each) for each in changes))
        filters: dict[str, list[Any]] = {
            "problem": [None, PROBLEM, LONGER],
            "chip": [None, "M3Max", "M1"],
            "template_hash": [None, HASH, OTHER_HASH],
            "provenance": [None, *PROVENANCES],
            "policy": [None, row().policy, WARM_POLICY],
            "phase": [None, "final"],
            "verified": [None, True, False],
            "config": [None, CONFIG.key, wide.key],
            "family": [None, "forward", "decode"],
        }
        plain = PlainStore(Contents(rows=sent))
        seen = set()
        choices = [{}, *({name: x} for name, xs in filters.items() for x in xs)]
        for first, second in itertools.product(choices, choices):
            expected = plain.measurements(**(first | second))
            assert store.measurements(**(first | second)) == expected, (first, second)
            seen.add(len(expected))
        assert {0, 1, 2, len(sent)} <= seen

    def test_a_batch_that_ends_with_an_error_leaves_nothing(self, store: TuningStore) -> None:
        (kept,) = put(store, modelled(FIRST))

        def broken() -> Iterator[Measurement]:
            yield replace(kept, schedule=SECOND, policy="model 2")
            yield replace(kept, schedule=THIRD, policy="model 2")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            store.add_measurements(broken(), replace_predictions={HASH})
        assert store.measurements() == [kept]
        stranger = replace(kept, schedule=THIRD, run="no such run")
        with pytest.raises(DatabaseError):
            store.add_measurements([replace(kept, schedule=SECOND), stranger])
        assert store.measurements() == [kept]
        assert store.add_measurement(replace(kept, schedule=SECOND)) is True

    def test_a_new_chip_model_replaces_its_own_predictions_and_nothing_else(
        self, store: TuningStore
    ) -> None:
        def policy(model: str, ranked: int) -> str:
            return json.dumps({"model": model, "ranked": ranked})

        old: dict[str, Any] = {"policy": policy("a", 9)}
        stay = [
            row(),
            modelled(chip="M1", cores=8, **old),
            modelled(template_hash=OTHER_HASH, **old),
            modelled(problem=LONGER, **old),
        ]
        kept = put(store, *stay, modelled(**old), modelled(SECOND, **old))
        new = modelled(SECOND, 2e-3, policy=policy("b", 9), run=kept[0].run)
        assert store.add_measurements([new], replace_predictions={HASH}) == 1
        assert store.measurements() == [*kept[:4], new]
        fewer = replace(new, policy=policy("b", 5))  # the same model, asked about fewer schedules
        assert store.add_measurements([fewer], replace_predictions={HASH}) == 1
        measured = replace(kept[0], policy=policy("c", 9))
        assert store.add_measurements([measured], replace_predictions={HASH}) == 1
        assert store.measurements() == [*kept[:4], new, fewer, measured]

    def test_problems_are_those_with_a_row_in_the_order_of_their_keys(
        self, store: TuningStore
    ) -> None:
        problems = [LONGEST, DECODE, PROBLEM, LONGER]
        put(store, *(row(SPLIT, problem=p) for p in problems), row(problem=DECODE, chip="M1"))
        assert store.problems() == sorted(problems, key=lambda p: p.key)
        assert store.problems("M1") == [DECODE]
        assert store.problems("M2") == []

    def test_pruning_removes_what_fits_every_argument_and_nothing_else(
        self, store: TuningStore
    ) -> None:
        other = row(SECOND, template_hash=OTHER_HASH)
        sent = put(store, row(), other, modelled(), modelled(chip="M1"))
        assert store.count_of_other_templates({HASH}) == 1
        assert store.count_of_other_templates(set()) == 4
        assert store.prune(keep_templates={HASH}, provenance="modelled") == 0
        assert store.prune(keep_templates={HASH}, dry_run=True) == 1
        assert store.measurements() == sent
        assert store.prune(provenance="modelled", chip="M1") == 1
        assert store.measurements() == sent[:3]
        assert store.prune(keep_templates={HASH}) == 1
        assert store.measurements() == [sent[0], sent[2]]
        assert store.prune() == 2
        assert store.measurements() == [] and store.problems() == []

    # Checks

    def test_every_field_of_a_check_comes_back(self, folder: Path) -> None:
        detail = 'row 3: "\u6f22\u5b57"'
        checked = ("metal", "decode", "wrong")
        with self.open(folder) as store:
            store.record_check(
                *(CONFIG, SPLIT, HASH, "metal", "wrong"),
                error=0.1 + 0.2,
                tolerance=1e-3,
                shape="Lq=3 Lk=9",
                detail=detail,
                family="decode",
                source_hash="0f" * 8,
            )
        with self.open(folder) as store:
            found = store.find_check(CONFIG, SPLIT, HASH, "metal", family="decode")
            assert found is not None and not found.ok
            assert (found.config, found.schedule, found.template_hash) == (CONFIG, SPLIT, HASH)
            assert (found.device, found.family, found.status) == checked
            assert (found.error, found.tolerance) == (0.1 + 0.2, 1e-3)
            assert (found.shape, found.detail) == ("Lq=3 Lk=9", detail)
            for config, schedule, templates, device, family in (
                (CONFIG, SPLIT, HASH, "metal", "forward"),
                (CONFIG, SPLIT, HASH, "simulator", "decode"),
                (CONFIG, SPLIT, OTHER_HASH, "metal", "decode"),
                (CONFIG, SECOND, HASH, "metal", "decode"),
                (replace(CONFIG, causal=False), SPLIT, HASH, "metal", "decode"),
            ):
                assert store.find_check(config, schedule, templates, device, family=family) is None

    def test_a_failed_check_is_found_before_a_passed_one_and_a_later_one_replaces_it(
        self, store: TuningStore
    ) -> None:
        kernel = (CONFIG, FIRST, HASH)
        for device, status in (("simulator", "ok"), ("metal", "timeout"), ("reference", "ok")):
            store.record_check(*kernel, device, status)
        found = [store.find_check(*kernel, device) for device in (None, "metal", "simulator")]
        assert [c and c.status for c in found] == ["timeout", "timeout", "ok"]
        store.record_check(*kernel, "metal", "ok", error=1e-4)
        found = [store.find_check(*kernel), store.find_check(*kernel, "metal")]
        assert [c and c.status for c in found] == ["ok", "ok"]
        assert found[1] is not None and found[1].error == 1e-4

    def test_a_passed_check_verifies_every_row_of_that_kernel_and_later_ones(
        self, store: TuningStore
    ) -> None:
        others = [row(SECOND), row(template_hash=OTHER_HASH), row(SPLIT, problem=DECODE)]
        failed = row(FIRST, None, status="runtime", policy="p")
        wide = replace(PROBLEM, config=replace(CONFIG, causal=False))
        put(store, row(), row(problem=LONGER), *others, failed, row(problem=wide))
        store.record_check(CONFIG, FIRST, HASH, "simulator", "ok", error=3e-4, tolerance=1e-3)
        put(store, row(chip="M1", cores=8), row(SECOND, chip="M1", cores=8))
        found = [(m.verified, m.error) for m in store.measurements()]
        passed, not_checked = (True, 3e-4), (False, None)
        assert found == [passed, passed, *[not_checked] * 5, passed, not_checked]
        assert [m.status for m in store.measurements()].count("ok") == 8

    def test_a_failed_check_takes_the_win_whatever_passed_elsewhere(
        self, store: TuningStore
    ) -> None:
        put(store, row(), row(SECOND, verified=True))
        store.record_check(CONFIG, FIRST, HASH, "simulator", "ok", error=1e-4)
        store.record_check(CONFIG, FIRST, HASH, "metal", "wrong", error=0.5, detail="row 3")
        first, second = store.measurements()
        assert (first.status, first.verified, first.error, first.detail) == (
            *("wrong", False),
            *(0.5, "row 3"),
        )
        assert first.seconds == 1e-3  # what was measured stays
        assert (second.status, second.verified) == ("ok", True)
        store.record_check(CONFIG, FIRST, HASH, "simulator", "ok", error=1e-4)
        put(store, row(chip="M1", cores=8, verified=True))
        assert [m.verified for m in store.measurements()] == [False, True, False]
        hit = self.look_up(store)
        assert hit is not None and hit.schedule == SECOND

    @pytest.mark.parametrize("error", [float("inf"), float("nan")])
    def test_rows_of_a_kernel_whose_error_is_not_finite_are_kept(
        self, store: TuningStore, error: float
    ) -> None:
        put(store, row(samples=(1e-3,)))
        store.record_check(
            *(CONFIG, FIRST, HASH, "metal", "wrong"), error=error, tolerance=error, detail="NaN"
        )
        rows = store.measurements()
        assert len(rows) == 1
        (found,) = rows
        assert (found.status, found.error, found.detail) == ("wrong", None, "NaN")
        assert (found.seconds, found.samples) == (1e-3, (1e-3,))
        check = store.find_check(CONFIG, FIRST, HASH)
        assert check is not None
        assert (check.status, check.error, check.tolerance) == ("wrong", None, None)

    @pytest.mark.parametrize(
        "bad",
        [
            {"status": "great"},
            {"device": "GPU 1"},
            {"template_hash": "{{ 7*7 }}"},
            {"detail": "line 1\nline 2"},
            {"detail": "x" * (MAX_TEXT + 1)},
            {"error": -0.5},
            {"error": "0.5"},
            {"tolerance": -1e-3},
        ],
        ids=lambda bad: next(iter(bad)),
    )
    def test_a_check_that_no_row_could_take_over_is_refused_by_name(
        self, store: TuningStore, bad: dict[str, Any]
    ) -> None:
        sent = put(store, row())
        kernel: dict[str, Any] = {"template_hash": HASH, "device": "metal", "status": "wrong"}
        with pytest.raises(ArgumentError) as caught:
            store.record_check(CONFIG, FIRST, **(kernel | bad))
        assert caught.value.argument in bad
        assert store.find_check(CONFIG, FIRST, HASH) is None
        assert store.measurements() == sent

    # Runs

    def test_every_field_of_a_run_comes_back(self, folder: Path) -> None:
        with self.open(folder) as store:
            first = store.begin_run("M3Max", 7, {"trials": 5, "text": "\u6f22"})
            second = store.begin_run("M1", 2**31 - 1)
            store.note_run(first, "problem", {"noise": 0.01})
            store.note_run(first, "trials", 6)
            store.end_run(first, "interrupted")
        with self.open(folder) as store:
            found = store.runs()
        assert [run.id for run in found] == [first, second]
        assert [(run.chip, run.seed, run.outcome) for run in found] == [
            ("M3Max", 7, "interrupted"),
            ("M1", 2**31 - 1, None),
        ]
        notes = {"trials": 6, "text": "\u6f22", "problem": {"noise": 0.01}}
        assert [json.loads(run.notes) for run in found] == [notes, {}]
        assert found[0].ended is not None and found[0].ended >= found[0].started
        assert found[1].ended is None

    def test_a_run_that_never_began_is_refused_by_name(self, store: TuningStore) -> None:
        with pytest.raises(ArgumentError, match="run: expected a run that was begun"):
            store.note_run("no such run", "a", 1)
        with pytest.raises(ArgumentError, match="run: expected a run that was begun"):
            store.end_run("no such run", "finished")
        assert store.runs() == []

    # Opening and closing

    def test_two_that_are_open_see_what_the_other_commits(self, folder: Path) -> None:
        with self.open(folder) as a, self.open(folder) as b:
            first = put(a, row(FIRST))
            assert b.measurements() == first
            second = put(b, row(SECOND))
            assert a.measurements() == b.measurements() == first + second
            assert a.add_measurement(replace(second[0], seconds=9.0)) is False
            b.record_check(CONFIG, FIRST, HASH, "metal", "wrong")
            assert a.find_check(CONFIG, FIRST, HASH) is not None
            assert [m.status for m in a.measurements()] == ["wrong", "ok"]
            assert [run.id for run in a.runs()] == [run.id for run in b.runs()]
            assert a.prune(chip="M3Max") == 2
            assert b.measurements() == []

    def test_one_that_is_read_only_reads_and_refuses_every_change(self, folder: Path) -> None:
        with self.open(folder) as store:
            sent = put(store, row())
            run = sent[0].run
            store.record_check(CONFIG, SECOND, HASH, "metal", "ok")
        with self.open(folder, read_only=True) as store:
            assert store.measurements(PROBLEM) == sent
            assert store.problems() == [PROBLEM]
            assert store.find_check(CONFIG, SECOND, HASH) is not None
            for change in self._changes(store, run):
                with pytest.raises(ReadOnlyDatabase):
                    change()
        with self.open(folder) as store:
            assert store.measurements() == sent
            assert [r.id for r in store.runs()] == [run]
            hit = self.look_up(store)
            assert hit is None  # nothing was verified or pinned

    def test_one_that_is_not_there_is_not_made_to_be_read(self, folder: Path) -> None:
        with pytest.raises(DatabaseError):
            self.open(folder, read_only=True)
        assert not folder.exists()

    def test_one_that_was_closed_says_so_whatever_is_asked(self, folder: Path) -> None:
        store = self.open(folder)
        run = store.begin_run("M3Max", 0)
        store.close()
        store.close()
        reads: list[Callable[[], object]] = [
            store.measurements,
            store.problems,
            store.runs,
            lambda: store.find_check(CONFIG, FIRST, HASH),
            lambda: store.count_of_other_templates(set()),
        ]
        for call in (*reads, *self._changes(store, run)):
            with pytest.raises(DatabaseError):
                call()
        with self.open(folder) as store:
            assert store.measurements() == [] and len(store.runs()) == 1

    def _changes(self, store: TuningStore, run: str) -> list[Callable[[], object]]:
        return [
            lambda: store.begin_run("M3Max", 0),
            lambda: store.end_run(run, "finished"),
            lambda: store.note_run(run, "a", 1),
            lambda: store.add_measurement(row(SECOND, run=run)),
            lambda: store.record_check(CONFIG, FIRST, HASH, "metal", "ok"),
            lambda: store.pin(PROBLEM, SECOND),
            lambda: store.unpin(PROBLEM),
            lambda: store.prune(),
        ]
