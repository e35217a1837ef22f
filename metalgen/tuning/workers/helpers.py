"""Helper processes that compile ahead of the one that is timed, and may crash or hang.

MLX compiles under one lock and keeps no custom kernel on disk, so kernels are compiled side by side
in processes only, and must be timed in the one that compiled them. Only one is timed at a time. A
helper that crashes or exceeds a time limit is ended, its kernel has failed, and a fresh helper
takes its place: a launch failure leaves a CUDA context unusable, and neither Metal nor CUDA lets a
process end a launch of its own.
"""

from __future__ import annotations

import math
import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing import connection
from pathlib import Path
from typing import Any

from metalgen.arguments import as_integer, as_number
from metalgen.calls.check import KernelFailure, NoRoom
from metalgen.calls.verify import Verification
from metalgen.devices import Device
from metalgen.errors import ArgumentError, DeviceError
from metalgen.families import Schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.progress import BudgetSpent
from metalgen.tuning.timing.measure import Policy, Stop, Timing
from metalgen.tuning.timing.racing import Race
from metalgen.tuning.workers.executing import Executor
from metalgen.tuning.workers.helper import BEAT, serve
from metalgen.tuning.workers.jobs import Helper, Job, Kernel

AHEAD = 8
"""Schedules that are asked for before the first of them has a time.

The same for any number of helpers, so that it does not decide what a search asks for.
"""
TIME_LIMIT = 60.0
"""Seconds that one compilation, one sample or one check may take."""
START_LIMIT = 180.0
"""Seconds in which a helper must be ready."""
MOST = 64
"""Helpers at most."""
MOST_LOSSES = 5
"""Helpers that may end for no reason of a kernel's before the run is given up."""
END_SECONDS = 10.0
"""Seconds that a killed helper is waited for."""
LIMITED = {"compile": "compiling it", "check": "its check"}
"""What took too long, in words."""


def check_jobs(jobs: int, time_limit: float) -> tuple[int, float]:
    """Both as Python's own numbers; raises `ArgumentError` for what `Helpers` cannot take."""
    count, seconds = as_integer(jobs), as_number(time_limit)
    if count is None or not 0 <= count <= MOST:
        raise ArgumentError("jobs", f"a whole number from 0 to {MOST}", jobs)
    if seconds is None or not 1.0 <= seconds < math.inf:
        raise ArgumentError("time_limit", "seconds, 1 or more", time_limit)
    return count, seconds


def usual_jobs(device: Device) -> int:
    """How many helpers a device is given unless told otherwise; two processors stay free."""
    return max(1, min(device.compile_jobs, (os.cpu_count() or 1) - 2))


class Helpers(Executor):
    """An `Executor` whose kernels run in helper processes; see the module.

    Args:
        device: what runs kernels; it is pickled.
        policy: how to measure.
        count: helpers.
        time_limit: seconds that one compilation, one sample or one check may take.
        deadline: ``time.perf_counter()`` at which the budget is spent.
        lock: as of `metalgen.tuning.workers.executing.Here`.

    Waiting for a helper raises `BudgetSpent` at the deadline, and `DeviceError` where helpers
    cannot be started.
    """

    ahead = AHEAD

    def __init__(
        self,
        device: Device,
        policy: Policy,
        count: int,
        *,
        time_limit: float = TIME_LIMIT,
        deadline: float = math.inf,
        lock: Path | None = None,
    ) -> None:
        self._count, self.time_limit = check_jobs(count, time_limit)
        self.device = device
        self.policy = policy
        self.deadline = deadline
        self.lock = lock
        self._context = mp.get_context("spawn")
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._queue: deque[tuple[Problem, Schedule]] = deque()
        self._finalists: deque[tuple[Problem, Schedule]] = deque()
        self._track: Helper | None = None  # where the race will be
        self._failed: dict[Kernel, tuple[Any, ...]] = {}
        self._helpers: list[Helper] = []
        self._started = 0
        self._idle_losses = 0

    # The interface of an executor

    def prepare(self, problem: Problem, schedules: Sequence[Schedule]) -> None:
        """Compile these, in this order, wherever a helper is free."""
        wanted = {_kernel(problem, s) for s in schedules}
        for helper in self._helpers:
            if helper.holds not in wanted:  # given up meanwhile
                helper.holds = None
        known = {h.holds for h in self._helpers} | set(self._failed)
        known |= {h.job.kernel for h in self._helpers if h.job}
        self._queue = deque((problem, s) for s in schedules if _kernel(problem, s) not in known)
        self._serve_until(lambda: True)

    def prepare_race(self, problem: Problem, schedules: Sequence[Schedule]) -> None:
        """Compile these in one helper, when there is nothing else to compile."""
        self._finalists = deque((problem, s) for s in schedules)
        self._serve_until(lambda: True)

    def warm_up(self, problem: Problem, schedule: Schedule) -> None:
        """Keep the device at work until its clock rate is up."""
        helper = self._with(problem, schedule)
        self._do(helper, "warm_up", (problem, schedule), _kernel(problem, schedule))

    def measure(
        self,
        problem: Problem,
        schedule: Schedule,
        give_up: float = math.inf,
        stop: Stop | None = None,
    ) -> Timing:
        """Time one schedule, in the helper that compiled it."""
        helper, kernel = self._with(problem, schedule), _kernel(problem, schedule)
        arguments = (problem, schedule, give_up, stop is not None)
        timing: Timing = self._do(helper, "measure", arguments, kernel, stop)
        if helper.holds == kernel:
            helper.holds = None
        return timing

    def race(
        self,
        problem: Problem,
        schedules: Sequence[Schedule],
        default: Schedule | None,
        deadline: float = math.inf,
    ) -> Race:
        """Time finalists in one helper, which compiles those that it has not yet."""
        for other in self._helpers:
            other.holds = None
        self.prepare_race(problem, schedules)
        self._serve_until(lambda: not self._finalists and self._track is not None)
        track, self._track = self._track, None
        self._serve_until(lambda: track is None or track.job is None)
        if track is not None and track in self._helpers:
            helper = track
        else:  # a finalist took it along, and will say so below
            helper = self._free(lambda h: len(h.compiled))
        for schedule in schedules:  # one by one, for each has a time limit
            self._compile(helper, problem, schedule)
        arguments = (problem, tuple(schedules), default, deadline)
        budget, self.deadline = self.deadline, math.inf  # it heeds the deadline itself
        try:
            found: Race = self._do(helper, "race", arguments, None)
        finally:
            self.deadline = budget
        return found

    def verify(self, device: Device, config: AttentionConfig, schedule: Schedule) -> Verification:
        """Check a kernel in a helper."""
        kernel = (config.key, schedule)
        helper = self._free(lambda h: kernel in h.compiled)
        found: Verification = self._do(helper, "check", (config, schedule), kernel)
        return found

    def close(self) -> None:
        """End every helper, whatever it is doing."""
        for helper in self._helpers:
            helper.process.kill()
        while self._helpers:
            self._end(self._helpers.pop())
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    # Helpers

    def _start(self) -> Helper:
        self._started += 1
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="metalgen-")
        log = Path(self._folder.name) / f"{self._started}.log"
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=serve, args=(theirs, self.device, self.policy, self.lock, log), daemon=True
        )
        # Helpers inherit that Ctrl-C is held back: it is the parent's, which ends them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process.start()
        except (OSError, AttributeError, TypeError, pickle.PicklingError) as error:
            ours.close()
            raise DeviceError(f"cannot start a helper process: {error}") from error
        finally:
            theirs.close()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return Helper(process, ours, log, time.perf_counter() + START_LIMIT)

    def _end(self, helper: Helper) -> None:
        helper.process.kill()
        helper.process.join(END_SECONDS)
        helper.channel.close()
        if helper.process.exitcode is not None:  # else a driver keeps it, and it ends later
            helper.process.close()

    def _replace(self, helper: Helper) -> None:
        place = self._helpers.index(helper)
        del self._helpers[place]  # first of all: whatever fails now, it is never ended twice
        self._end(helper)
        self._helpers.insert(place, self._start())

    def _with(self, problem: Problem, schedule: Schedule) -> Helper:
        """The helper that has compiled a kernel and is free; raises how the compilation failed."""
        kernel, entry = _kernel(problem, schedule), (problem, schedule)
        if entry in self._queue:  # it is first now
            self._queue.remove(entry)
            self._queue.appendleft(entry)

        def settled() -> bool:
            if entry in self._queue and all(h.holds for h in self._helpers):
                self._helpers[-1].holds = None  # what it held is compiled there nevertheless
                self._hand_out()
            at_work = any(h.job and h.job.kernel == kernel for h in self._helpers)
            return not at_work and entry not in self._queue

        self._serve_until(settled)
        if kernel in self._failed:
            _, status, detail = self._failed.pop(kernel)
            raise KernelFailure(status, detail)
        holder = next((h for h in self._helpers if h.holds == kernel), None)
        if holder is None:
            holder = self._free(lambda h: (kernel in h.compiled, h.holds is None))
            holder.holds = holder.holds or kernel
            self._compile(holder, problem, schedule)
        return holder

    def _free(self, preference: Callable[[Helper], Any]) -> Helper:
        """The helper that is preferred most, of those that are doing nothing."""

        def free() -> list[Helper]:
            return [h for h in self._helpers if h.ready and h.job is None]

        self._serve_until(lambda: bool(free()))
        return max(free(), key=preference)

    def _compile(self, helper: Helper, problem: Problem, schedule: Schedule) -> None:
        kernel = _kernel(problem, schedule)
        if kernel not in helper.compiled:
            self._do(helper, "compile", (problem, schedule), kernel)

    def _do(
        self,
        helper: Helper,
        operation: str,
        arguments: tuple[Any, ...],
        kernel: Kernel | None,
        stop: Stop | None = None,
    ) -> Any:
        """The value of an operation on a helper; raises how it failed."""
        job = Job(operation, arguments, kernel, stop=stop)
        assert helper in self._helpers and helper.job is None, "one answer is for one question"
        self._send(helper, job)
        self._serve_until(lambda: job.answer is not None)
        assert job.answer is not None
        if job.answer[0] == "failed":
            if helper.holds == kernel:
                helper.holds = None
            raise KernelFailure(job.answer[1], job.answer[2])
        if job.answer[0] == "no room":
            raise NoRoom(job.answer[1])
        return job.answer[1]

    def _send(self, helper: Helper, job: Job) -> None:
        helper.job = job
        helper.due = time.perf_counter() + self.time_limit + BEAT
        try:
            helper.channel.send((job.operation, *job.arguments))
        except OSError:  # it is gone, which waiting for it will find out
            helper.due = 0.0

    def _serve_until(self, done: Callable[[], bool]) -> None:
        """Hand out what is to be compiled, and take answers, until something is so."""
        while len(self._helpers) < self._count:  # the first time that anything is asked for
            self._helpers.append(self._start())
        self._hear(0.0)
        self._hand_out()
        while not done():
            now = time.perf_counter()
            if now >= self.deadline:
                raise BudgetSpent
            due = min((h.due for h in self._helpers if h.job or not h.ready), default=math.inf)
            self._hear(max(0.0, min(due, self.deadline, now + 60.0) - now))
            self._hand_out()

    def _hand_out(self) -> None:
        while self._queue:
            problem, schedule = self._queue[0]
            kernel = _kernel(problem, schedule)
            free = [h for h in self._helpers if h.ready and h.job is None and h.holds is None]
            if not free:
                return
            self._queue.popleft()
            helper = max(free, key=lambda h: kernel in h.compiled)
            if kernel in helper.compiled:
                helper.holds = kernel
            else:
                self._send(helper, Job("compile", (problem, schedule), kernel, ahead=True))
        if self._finalists:
            self._hand_to_track()

    def _hand_to_track(self) -> None:
        """Let the helper of the race compile the next finalist that it has not compiled yet."""
        if self._track not in self._helpers:
            kernels = {_kernel(*finalist) for finalist in self._finalists}
            free = [h for h in self._helpers if h.ready and h.job is None and h.holds is None]
            self._track = max(free, key=lambda h: len(h.compiled & kernels), default=None)
        helper = self._track
        while self._finalists and helper and helper.job is None and helper.holds is None:
            problem, schedule = self._finalists.popleft()
            kernel = _kernel(problem, schedule)
            if kernel not in helper.compiled:
                self._send(helper, Job("compile", (problem, schedule), kernel))

    def _hear(self, seconds: float) -> None:
        """Take what helpers say, for so many seconds at most; replace those that died or hang."""
        connection.wait([h.channel for h in self._helpers], seconds)
        for helper in list(self._helpers):
            try:
                while helper in self._helpers and helper.channel.poll():
                    self._take(helper, helper.channel.recv())
            except (EOFError, OSError):
                self._lost(helper, "runtime", helper.how_it_ended())
        now = time.perf_counter()
        for helper in list(self._helpers):
            if now >= helper.due and helper.job:
                what = LIMITED.get(helper.job.operation, "a sample of it")
                detail = f"{what} took more than {self.time_limit:g} s; its process was ended"
                self._lost(helper, "timeout", detail)
            elif now >= helper.due and not helper.ready:
                self._lost(helper, "timeout", f"it was not ready within {START_LIMIT:g} s")

    def _take(self, helper: Helper, message: tuple[Any, ...]) -> None:
        helper.due = time.perf_counter() + self.time_limit + BEAT
        if message[0] == "ready":
            helper.ready = True
        elif message[0] == "waiting":
            helper.due = math.inf
        elif message[0] == "cannot":
            raise DeviceError(message[1])
        elif message[0] == "sample":
            assert helper.job and helper.job.stop
            helper.channel.send(helper.job.stop(*message[1:]))
        elif message[0] in ("done", "failed", "no room"):
            self._answered(helper, message)
            if message[:2] == ("failed", "runtime"):
                self._replace(helper)  # nothing else would run in it

    def _answered(self, helper: Helper, answer: tuple[Any, ...]) -> None:
        job, helper.job = helper.job, None
        assert job is not None
        job.answer = answer
        if job.kernel is None:
            return
        if answer[0] == "done":
            helper.compiled.add(job.kernel)
        if job.ahead and answer[0] == "done":
            helper.holds = job.kernel
        elif job.ahead:
            self._failed[job.kernel] = answer

    def _lost(self, helper: Helper, status: str, detail: str) -> None:
        """A helper died or hangs: what it was doing has failed, another takes its place."""
        if not helper.ready:
            raise DeviceError(f"a helper process could not be started: {detail}")
        if helper.job:
            self._answered(helper, ("failed", status, detail))
        else:
            self._idle_losses += 1
            if self._idle_losses > MOST_LOSSES:
                raise DeviceError(f"helper processes end while they do nothing: {detail}")
        self._replace(helper)


def _kernel(problem: Problem, schedule: Schedule) -> Kernel:
    return problem.config.key, schedule
