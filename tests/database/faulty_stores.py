"""Stores that are wrong in one way each, and the test of the suite that finds it.

`test_faulty_stores.py` runs this file, and every test in it must fail. A class here has one test of
the suite only, so that this takes seconds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from metalgen.database import exchange, lookup
from metalgen.database.exchange import Summary
from metalgen.database.hit import Hit
from metalgen.database.measurement import Measurement, check_fields
from metalgen.database.protocol import Check, TuningStore
from metalgen.database.store import Store
from metalgen.errors import ArgumentError
from metalgen.families.sizes import Problem
from metalgen.testing.rows import CHIP, NEIGHBOURS, PROBLEM
from metalgen.testing.stores import StoreConformance

TESTS = [name for name in dir(StoreConformance) if name.startswith("test_")]


def found_by(test: str) -> Callable[[type], type]:
    """Make a suite of one test for a store, or for a suite with another look-up or merge."""
    assert test in TESTS

    def suite(faulty: type) -> type:
        methods: dict[str, Any] = dict.fromkeys(name for name in TESTS if name != test)
        base = faulty if issubclass(faulty, StoreConformance) else StoreConformance
        kind = Store if base is faulty else faulty

        def open_(self: object, folder: Path, *, read_only: bool = False) -> TuningStore:
            return kind.open(folder / "tuning.db", read_only=read_only, busy=0.05)

        name = f"Test{faulty.__name__}"
        globals()[name] = type(name, (base,), methods | {"open": open_, "__module__": __name__})
        return faulty

    return suite


class Changed(Store):
    """Changes rows on their way in."""

    def change(self, m: Measurement) -> Measurement:
        return m

    def add_measurements(self, rows: Iterable[Measurement], **options: Any) -> int:
        return super().add_measurements(map(self.change, rows), **options)


# What is kept


@found_by("test_every_field_of_a_row_comes_back")
class DropsAField(Changed):
    def change(self, m: Measurement) -> Measurement:
        return dataclasses.replace(m, spread=None)


@found_by("test_every_field_of_a_row_comes_back")
class SortsSamples(Changed):
    def change(self, m: Measurement) -> Measurement:
        return dataclasses.replace(m, samples=tuple(sorted(m.samples)))


@found_by("test_a_row_that_failed_comes_back_without_times")
class GivesFailedRowsATime(Changed):
    def change(self, m: Measurement) -> Measurement:
        return dataclasses.replace(m, seconds=m.seconds or 0.0)


@found_by("test_texts_come_back_as_they_are")
class KeepsAscii(Changed):
    def change(self, m: Measurement) -> Measurement:
        return dataclasses.replace(m, detail=m.detail.encode("ascii", "replace").decode())


@found_by("test_what_no_record_may_hold_is_refused_by_name")
class LeavesBadRowsOut(Store):
    def add_measurements(self, rows: Iterable[Measurement], **options: Any) -> int:
        good = []
        for m in rows:
            with contextlib.suppress(ArgumentError):
                check_fields(m)
                good.append(m)
        return super().add_measurements(good, **options)


@found_by("test_the_same_measurement_again_is_not_added_and_the_first_stays")
class LastWins(Store):
    def _insert(self, m: Measurement, problem: int) -> int:
        self.db.execute("DELETE FROM measurements WHERE problem = ?", [problem])
        return super()._insert(m, problem)


@found_by("test_a_row_that_differs_in_one_part_of_its_identity_is_another")
class TakesFinalsForTheSearch(Store):
    def add_measurements(self, rows: Iterable[Measurement], **options: Any) -> int:
        there: dict[object, Measurement] = {}
        for m in rows:
            there.setdefault(exchange.identity(dataclasses.replace(m, phase="search")), m)
        return super().add_measurements(there.values(), **options)


@found_by("test_rows_are_in_the_order_in_which_they_were_committed")
class OrdersByDate(Store):
    def measurements(self, *args: Any, **filters: Any) -> list[Measurement]:
        return sorted(super().measurements(*args, **filters), key=lambda m: m.created)


@found_by("test_rows_are_in_the_order_in_which_they_were_committed")
class ForgetsToCommit(Store):
    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        if not self.db.conn.in_transaction:
            self.db.execute("BEGIN IMMEDIATE")
        yield


@found_by("test_filters_leave_the_rows_that_fit_all_of_them")
class IgnoresAFilter(Store):
    def measurements(self, *args: Any, **filters: Any) -> list[Measurement]:
        return super().measurements(*args, **filters | {"family": None})


@found_by("test_a_batch_that_ends_with_an_error_leaves_nothing")
class CommitsRowByRow(Store):
    def add_measurements(self, rows: Iterable[Measurement], **options: Any) -> int:
        return sum(super(CommitsRowByRow, self).add_measurements([m], **options) for m in rows)


@found_by("test_a_new_chip_model_replaces_its_own_predictions_and_nothing_else")
class ReplacesAllPredictions(Store):
    def add_measurements(
        self, rows: Iterable[Measurement], *, replace_predictions: Collection[str] = ()
    ) -> int:
        if replace_predictions:
            self.prune(provenance="modelled")
        return super().add_measurements(rows)


@found_by("test_a_new_chip_model_replaces_its_own_predictions_and_nothing_else")
class KeepsOldPredictions(Store):
    def add_measurements(self, rows: Iterable[Measurement], **options: Any) -> int:
        return super().add_measurements(rows)


@found_by("test_problems_are_those_with_a_row_in_the_order_of_their_keys")
class ListsProblemsOfAllChips(Store):
    def problems(self, chip: str | None = None) -> list[Problem]:
        return super().problems()


@found_by("test_pruning_removes_what_fits_every_argument_and_nothing_else")
class PrunesAllChips(Store):
    def prune(self, *, chip: str | None = None, **options: Any) -> int:
        return super().prune(**options)


@found_by("test_pruning_removes_what_fits_every_argument_and_nothing_else")
class PrunesInADryRun(Store):
    def prune(self, *, dry_run: bool = False, **options: Any) -> int:
        return super().prune(**options)


# Checks and runs


@found_by("test_every_field_of_a_check_comes_back")
class DropsAFieldOfACheck(Store):
    def find_check(self, *args: Any, **options: Any) -> Check | None:
        found = super().find_check(*args, **options)
        return found and dataclasses.replace(found, tolerance=None)


@found_by("test_every_field_of_a_check_comes_back")
class MixesFamilies(Store):
    def find_check(self, *args: Any, **options: Any) -> Check | None:
        found = (
            super(MixesFamilies, self).find_check(*args, family=f) for f in ("forward", "decode")
        )
        return next((check for check in found if check), None)


@found_by("test_a_failed_check_is_found_before_a_passed_one_and_a_later_one_replaces_it")
class KeepsTheFirstCheck(Store):
    def record_check(self, *args: Any, **options: Any) -> None:
        if self.find_check(*args[:4]) is None:
            super().record_check(*args, **options)


@found_by("test_a_passed_check_verifies_every_row_of_that_kernel_and_later_ones")
class ForgetsChecksOfLaterRows(Store):
    def _checks(self, *kernel: str) -> list[tuple[str, float | None]]:
        return []


@found_by("test_a_failed_check_takes_the_win_whatever_passed_elsewhere")
class BelievesTheLastCheck(Store):
    def record_check(self, *args: Any, **options: Any) -> None:
        with self.writing():
            self.db.execute("DELETE FROM checks")
        super().record_check(*args, **options)


@found_by("test_rows_of_a_kernel_whose_error_is_not_finite_are_kept")
class KeepsAnyError(Store):
    def record_check(self, *args: Any, **options: Any) -> None:
        super().record_check(*args, **options)
        with self.writing():
            self.db.execute("UPDATE measurements SET error = 1e308 WHERE status <> 'ok'")


@found_by("test_a_check_that_no_row_could_take_over_is_refused_by_name")
class TakesAnyStatus(Store):
    def record_check(self, *args: Any, status: str = "ok", **options: Any) -> None:
        known = status if status in ("ok", "wrong") else "runtime"
        super().record_check(*args, status=known, **options)


@found_by("test_a_check_that_no_row_could_take_over_is_refused_by_name")
class MakesOneLineOfAnyDetail(Store):
    def record_check(self, *args: Any, detail: str = "", **options: Any) -> None:
        super().record_check(*args, detail=" ".join(detail.split()), **options)


@found_by("test_every_field_of_a_run_comes_back")
class ForgetsEarlierNotes(Store):
    def note_run(self, run: str, name: str, value: Any) -> None:
        self._notes(run)
        with self.writing():
            notes = json.dumps({name: value})
            self.db.execute("UPDATE runs SET notes = ? WHERE id = ?", [notes, run])


@found_by("test_a_run_that_never_began_is_refused_by_name")
class EndsAnyRun(Store):
    def end_run(self, run: str, outcome: str) -> None:
        with contextlib.suppress(ArgumentError):
            super().end_run(run, outcome)


# Opening and closing


@found_by("test_two_that_are_open_see_what_the_other_commits")
class ReturnsStaleRows(Store):
    def measurements(self, *args: Any, **filters: Any) -> list[Measurement]:
        known = self.__dict__.setdefault("known", {})
        place = (args, *filters.items())
        if place not in known:
            known[place] = super().measurements(*args, **filters)
        return list(known[place])


@found_by("test_one_that_is_read_only_reads_and_refuses_every_change")
class WritesThoughReadOnly(Store):
    @classmethod
    def open(cls, path: Any = None, *, read_only: bool = False, busy: float = 1.0) -> Store:
        return super().open(path, busy=busy)


@found_by("test_one_that_is_not_there_is_not_made_to_be_read")
class IsMadeToBeRead(Store):
    @classmethod
    def open(cls, path: Any = None, *, read_only: bool = False, busy: float = 1.0) -> Store:
        super().open(path, busy=busy).close()
        return super().open(path, read_only=read_only, busy=busy)


@found_by("test_one_that_was_closed_says_so_whatever_is_asked")
class StaysOpen(Store):
    def close(self) -> None:
        pass


# Look-ups


@found_by("test_a_measured_row_outranks_every_modelled_one_wherever_it_is")
class TakesPredictionsForMeasurements(Changed):
    def change(self, m: Measurement) -> Measurement:
        return dataclasses.replace(m, provenance="measured")


@found_by("test_a_row_that_was_not_checked_answers_only_after_its_check")
class TakesEveryRowForChecked(Changed):
    def change(self, m: Measurement) -> Measurement:
        return dataclasses.replace(m, verified=m.status == "ok")


@found_by("test_a_pin_answers_before_every_row_until_it_is_taken_away")
class ForgetsPins(Store):
    def pin(self, *args: Any) -> None:
        pass


class Asked(StoreConformance):
    """A look-up, with parts of it replaced."""

    arguments: dict[str, Any] = {}  # noqa: RUF012
    parts: dict[str, Any] = {}  # noqa: RUF012

    def look_up(
        self, store: Any, problem: Problem = PROBLEM, *, template_hash: str = "", **options: Any
    ) -> Hit | None:
        options = {"neighbours": NEIGHBOURS} | options | self.arguments
        hashes = (
            [template_hash] if template_hash else [m.template_hash for m in store.measurements()]
        )
        with contextlib.ExitStack() as stack:
            for name, part in self.parts.items():
                stack.enter_context(mock.patch(f"metalgen.database.{name}", part))
            found = (
                lookup.lookup(
                    problem,
                    CHIP,
                    {each},
                    database=store.path,
                    shipped=store.path.parent / "none",
                    **options,
                )
                for each in [*dict.fromkeys(hashes)]
            )
            return next((hit for hit in found if hit), None)


@found_by("test_rows_of_other_templates_configs_and_families_never_answer")
class AnswersFromOtherTemplates(Asked):
    pass


@found_by("test_a_row_of_a_chip_that_is_no_neighbour_never_answers")
class AnswersFromAnyChip(Asked):
    arguments = {"neighbours": [*NEIGHBOURS, "M1"]}  # noqa: RUF012


@found_by("test_a_schedule_beyond_the_limits_is_passed_over")
class IgnoresLimits(Asked):
    arguments = {"limits": CHIP.limits}  # noqa: RUF012


@found_by("test_the_nearer_place_answers_however_slow_its_row")
class AsksFarBucketsFirst(Asked):
    parts = {"lookup._distance": lambda a, b: -max(a) / max(b)}  # noqa: RUF012


@found_by("test_the_nearer_place_answers_however_slow_its_row")
class AsksNeighboursInAnyOrder(Asked):
    arguments = {"neighbours": NEIGHBOURS[::-1]}  # noqa: RUF012


@found_by("test_a_row_measured_with_other_software_is_stale_and_answers_last")
class TakesStaleRowsForFresh(Asked):
    parts = {"winners.Standing.stale": False}  # noqa: RUF012


@found_by("test_a_fresh_row_answers_however_many_stale_ones_are_quicker")
class ReadsOnlySomeRows(Asked):
    parts = {"lookup.MOST_ROWS": 16}  # noqa: RUF012


@found_by("test_a_measured_row_outranks_every_modelled_one_wherever_it_is")
class AsksPredictionsFirst(Asked):
    parts = {"lookup.PROVENANCES": ("modelled", "measured")}  # noqa: RUF012


@found_by("test_finals_come_first_and_those_with_a_reservation_or_a_warm_cache_later")
class TakesWarmForCold(Asked):
    parts = {"winners.WARM": "no such policy"}  # noqa: RUF012


@found_by("test_a_row_whose_launches_waited_for_one_another_answers_before_others")
class TakesLaunchesThatOverlapForOthers(Asked):
    parts = {"winners.CHAINED": "no such policy"}  # noqa: RUF012


class Quickest(StoreConformance):
    """The quickest row of any kind."""

    def wanted(self, m: Measurement) -> bool:
        return m.verified

    def look_up(self, store: Any, problem: Problem = PROBLEM, **options: Any) -> Hit | None:
        rows = [m for m in store.measurements(problem) if self.wanted(m) and m.seconds]
        best = min(rows, key=lambda m: m.seconds or 0.0, default=None)
        return best and Hit(
            best.schedule, best.provenance, "", best.chip, True, False, best.seconds
        )


@found_by("test_finals_come_first_and_those_with_a_reservation_or_a_warm_cache_later")
class PrefersAQuickSample(Quickest):
    pass


@found_by("test_a_row_that_failed_never_answers")
class AnswersWithFailedRows(Quickest):
    def wanted(self, m: Measurement) -> bool:
        return True


@found_by("test_the_quickest_verified_row_answers_with_its_times")
class AnswersWithoutTimes(Quickest):
    pass


# Merging and tuning


class Merged(StoreConformance):
    """A merge, with something done after it."""

    after = ""

    def merge(self, store: Any, sources: list[Path], *, dry_run: bool = False) -> Summary:
        summary = exchange.merge(store, sources, dry_run=dry_run)
        with store.writing():
            store.db.execute(self.after)
        return summary


@found_by("test_a_merge_pools_samples_and_keeps_what_counts_against_us")
class TakesTheLeastTime(Merged):
    after = "UPDATE measurements SET seconds = json_extract(samples, '$[0]') WHERE samples <> '[]'"


@found_by("test_a_kernel_that_failed_its_check_here_cannot_be_brought_in_as_good")
class TrustsOthersChecks(Merged):
    after = "UPDATE measurements SET status = 'ok', verified = 1"


@found_by("test_of_two_failed_checks_the_graver_one_counts_for_what_is_brought_in")
class TakesTheLighterFailure(Merged):
    after = "UPDATE measurements SET status = 'timeout' WHERE status <> 'ok'"


@found_by("test_a_row_that_either_side_found_wrong_is_wrong")
class ForgivesFailures(Merged):
    after = "UPDATE measurements SET status = 'ok'"


@found_by("test_merges_in_either_direction_come_to_the_same")
class KeepsItsOwnDates(StoreConformance):
    def merge(self, store: Any, sources: list[Path], *, dry_run: bool = False) -> Summary:
        before = {exchange.identity(m): m.created for m in store.measurements()}
        summary = exchange.merge(store, sources, dry_run=dry_run)
        ids = store.db.execute("SELECT id FROM measurements ORDER BY id").fetchall()
        with store.writing():
            for (number,), m in zip(ids, store.measurements(), strict=True):
                created = before.get(exchange.identity(m), m.created)
                store.db.execute(
                    "UPDATE measurements SET created = ? WHERE id = ?", [created, number]
                )
        return summary


@found_by("test_an_export_brought_into_another_store_is_exported_the_same")
class LosesSourceHashes(Merged):
    after = "UPDATE measurements SET source_hash = ''"


@found_by("test_a_merge_pools_samples_and_keeps_what_counts_against_us")
class MergesInADryRun(StoreConformance):
    def merge(self, store: Any, sources: list[Path], *, dry_run: bool = False) -> Summary:
        return exchange.merge(store, sources)


@found_by("test_bad_records_are_left_out_by_name_and_bad_files_leave_nothing")
class SaysNothingOfBadRecords(StoreConformance):
    def merge(self, store: Any, sources: list[Path], *, dry_run: bool = False) -> Summary:
        summary = exchange.merge(store, sources, dry_run=dry_run)
        return Summary(summary.new, summary.pooled, summary.same)


@found_by("test_it_can_be_tuned_into_and_answers_with_what_won")
class TakesFailedChecksForPassed(Store):
    def find_check(self, *args: Any, **options: Any) -> Check | None:
        found = super().find_check(*args, **options)
        return found and dataclasses.replace(found, status="ok")


@found_by("test_any_calls_do_what_they_do_to_the_definition")
class PinsTheBest(Store):
    def unpin(self, problem: Problem) -> bool:
        return True
