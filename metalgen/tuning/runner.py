"""A tuning run: for each problem candidates, times, checks and a winner, all of it kept at once."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metalgen.arguments import as_integer, as_number
from metalgen.calls.check import Verify
from metalgen.database.errors import DatabaseError
from metalgen.database.protocol import TuningStore
from metalgen.database.refresh import refresh_store
from metalgen.database.store import Store
from metalgen.devices import Device
from metalgen.errors import ArgumentError
from metalgen.families.sizes import Problem
from metalgen.source.digests import Present
from metalgen.tuning.progress import BudgetSpent, Observer, Report
from metalgen.tuning.search.named import DEFAULT_SAMPLER, check_sampler
from metalgen.tuning.sessions.measured import MeasuredSession
from metalgen.tuning.sessions.modelled import ModelledSession
from metalgen.tuning.sessions.session import Session
from metalgen.tuning.timing.measure import Clock, Policy
from metalgen.tuning.workers.checker import Checker
from metalgen.tuning.workers.executing import Executor, Here, lock_file
from metalgen.tuning.workers.helpers import TIME_LIMIT, Helpers, check_jobs

if TYPE_CHECKING:
    from metalgen.chips import Chip
    from metalgen.tuning.study.trials import Share


def tune(
    problems: Sequence[Problem],
    chip: Chip,
    store: TuningStore,
    *,
    device: Device | None = None,
    checker: Device | None = None,
    trials: int | None = None,
    budget: float | None = None,
    seed: int = 0,
    observe: Observer | None = None,
    policy: Policy | None = None,
    jobs: int = 0,
    time_limit: float = TIME_LIMIT,
    clock: Clock = time.perf_counter,
    verify: Verify | None = None,
    share: Share | None = None,
    sampler: str = DEFAULT_SAMPLER,
    prune: bool = True,
) -> Report:
    """Tune problems for a chip, and keep every result as soon as it is there.

    What was committed before a run ended, however it ended, is not done again by the next one; nor
    is what other templates made, where the kernel is the same (`metalgen.database.refresh`).

    Args:
        problems: what to tune, in this order.
        chip: whose rows these are.
        store: where they go.
        device: this chip, when it is here and has a clock; None: the chip model predicts.
        checker: what executes kernels for their check; None: `device`, and without that nothing,
            so that there are no winners.
        trials: schedules to try for each problem; None: all for the model, 100 for a device.
        budget: seconds for the whole run; None: as long as it takes.
        seed: of the search.
        observe: called whenever something changed.
        policy: how to measure; None: the standard one.
        jobs: processes that compile ahead for a device, time in turn and may crash; 0: this
            process does everything.
        time_limit: seconds that one compilation, sample or check may take in such a process.
        clock: seconds, for the budget and for measurements in this process.
        verify: the check; another one for tests.
        share: where to meet other workers of the same chip, who share the schedules out.
        sampler: what suggests schedules to measure (`metalgen.tuning.search.named.make_sampler`).
        prune: whether a measurement ends as soon as its schedule cannot win.

    A `KeyboardInterrupt` ends the run early: what was done is in the report and in the store.

    Raises:
        ArgumentError: `trials`, `budget`, `seed`, `jobs`, `time_limit` or `sampler` that cannot
            be; a `share` without a device, or with a store that is no database.
        DeviceError: the device fails whatever the kernel, or processes cannot be started.
        StorageError: the shared storage fails, or is of workers unlike this one.
        IncompleteChip: the chip model does not know this chip, and there is no device.
        DatabaseError: the store can no longer be written.
    """
    trials, budget, seed = check_arguments(trials, budget, seed)
    jobs, time_limit = check_jobs(jobs, time_limit)
    if share and not device:
        raise ArgumentError("share", "a device that measures; predictions need no sharing", share)
    if share and not isinstance(store, Store):
        raise ArgumentError(
            "store", "an SQLite database, into which others' rows are merged", store
        )
    if device:
        check_sampler(sampler)
    executing = checker or device
    start = clock()
    report = Report("", chip.name, "measured" if device else "modelled")
    deadline = math.inf if budget is None else start + budget
    policy = policy or Policy()
    executor: Executor | None = None
    if device:
        if jobs:
            executor = Helpers(
                *(device, policy, jobs),
                time_limit=time_limit,
                deadline=deadline,
                lock=lock_file(),
            )
        else:
            executor = Here(device, policy, clock, lock=lock_file())
        if executing is device:
            verify = verify or executor.verify
    common: dict[str, Any] = {
        "chip": chip,
        "store": store,
        "checker": Checker(store, executing, verify),
        "report": report,
        "trials": trials,
        "seed": seed,
        "observe": observe or (lambda progress: None),
        "clock": clock,
        "deadline": deadline,
        "start": start,
    }
    session: Session
    if device and executor:
        common |= {"device": device, "policy": policy, "executor": executor}
        common |= {"share": share, "sampler": sampler, "prune": prune}
        session = MeasuredSession(**common)
    else:
        session = ModelledSession(**common)
    notes: dict[str, Any] = {
        "trials": trials,
        "budget": budget,
        "problems": [p.key for p in problems],
    }
    if device:
        notes["sampler"] = sampler
    with contextlib.ExitStack() as ending:  # each of them, whatever the others raise
        if executor:
            ending.callback(executor.close)
        ending.callback(session.close)
        if isinstance(store, Store):  # in a store of another kind, rows of other templates stay
            report.kept = refresh_store(store, Present(), problems=problems, chip=chip.name).kept
        report.run = store.begin_run(chip.name, seed, notes)
        ended = "failed"
        try:
            for number, problem in enumerate(problems, 1):
                report.outcomes.append(session.tune(problem, number, len(problems)))
            ended = "finished"
        except BudgetSpent:
            ended = report.stopped = "budget"
        except KeyboardInterrupt:
            ended = report.stopped = "interrupted"
        finally:
            report.seconds = clock() - start
            report.checks = session.checker.checked
            try:
                store.end_run(report.run, ended)
            except DatabaseError:
                if ended != "failed":  # else it may be what failed, and is heard about already
                    raise
    return report


def check_arguments(
    trials: int | None, budget: float | None, seed: int
) -> tuple[int | None, float | None, int]:
    """The numbers of `tune`, as Python's own; raises `ArgumentError` for what it cannot take."""
    count, seconds, start = as_integer(trials), as_number(budget), as_integer(seed)
    if trials is not None and (count is None or count < 1):
        raise ArgumentError("trials", "a positive whole number", trials)
    if budget is not None and (seconds is None or not seconds > 0):
        raise ArgumentError("budget", "seconds above 0", budget)
    if start is None or not 0 <= start < 1 << 31:
        raise ArgumentError("seed", "a whole number from 0 to 2147483647", seed)
    return count, seconds, start
