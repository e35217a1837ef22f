"""What builds, times and checks kernels for a search: this process, or helpers beside it."""

from __future__ import annotations

import abc
import contextlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx

from metalgen.calls.check import KernelFailure, NoRoom, require_working, verify_kernel
from metalgen.calls.runners import runner_of
from metalgen.calls.verify import Verification
from metalgen.devices import Device, Runner
from metalgen.devices.marking import UNWRITTEN, is_unwritten, marked_outputs
from metalgen.errors import DeviceError
from metalgen.families import Schedule
from metalgen.families.sizes import Problem
from metalgen.problem.config import AttentionConfig
from metalgen.problem.inputs import needs_inputs
from metalgen.tuning.timing.measure import Bench, Clock, Policy, Stop, Timing, arrays
from metalgen.tuning.timing.racing import Race, race


class Executor(abc.ABC):
    """Builds, times and checks the kernels of one device, under one policy.

    Every method raises what the device raises for the kernel, or `KernelFailure`; `DeviceError`
    where the device fails whatever the kernel, and `NoRoom` where it is too small for the problem.

    Attributes:
        ahead: how many schedules are worth preparing before the first of them is measured.
    """

    ahead: int = 1

    def prepare(self, problem: Problem, schedules: Sequence[Schedule]) -> None:  # noqa: B027
        """These will be measured soon, in this order; does nothing unless overridden."""

    def prepare_race(self, problem: Problem, schedules: Sequence[Schedule]) -> None:  # noqa: B027
        """These, if any, will race soon, as far as is known; does nothing unless overridden."""

    @abc.abstractmethod
    def warm_up(self, problem: Problem, schedule: Schedule) -> None:
        """Keep the device at work until its clock rate is up."""

    @abc.abstractmethod
    def measure(
        self,
        problem: Problem,
        schedule: Schedule,
        give_up: float = math.inf,
        stop: Stop | None = None,
    ) -> Timing:
        """Time one schedule; a single sample of one that takes longer than `give_up` seconds.

        No more samples after `stop`, which is told of each, says so.
        """

    @abc.abstractmethod
    def race(
        self,
        problem: Problem,
        schedules: Sequence[Schedule],
        default: Schedule | None,
        deadline: float = math.inf,
    ) -> Race:
        """Time finalists, interleaved, until it is settled who wins or the clock says so."""

    @abc.abstractmethod
    def verify(self, device: Device, config: AttentionConfig, schedule: Schedule) -> Verification:
        """`metalgen.calls.verify.verify` on this executor's device, which `device` is."""

    @abc.abstractmethod
    def close(self) -> None:
        """End whatever was started."""


class Here(Executor):
    """Executes in this process, one kernel after another.

    Args:
        device: what runs kernels.
        policy: how to measure.
        clock: seconds; another one for tests.
        lock: of `one_at_a_time`: a file, or None for no lock.
        waiting: called before the lock is waited for.
        beat: called at every step: a sign of life.
        keep: whether arrays stay until another problem comes.
    """

    def __init__(
        self,
        device: Device,
        policy: Policy,
        clock: Clock = time.perf_counter,
        *,
        lock: Path | None = None,
        waiting: Callable[[], None] = lambda: None,
        beat: Callable[[], None] = lambda: None,
        keep: bool = True,
    ) -> None:
        self.device = device
        self.policy = policy
        self.clock = clock
        self.lock = lock
        self.waiting = waiting
        self.beat = beat
        self.keep = keep
        self._bench: Bench | None = None
        self._built: dict[tuple[str, Schedule], Runner] = {}
        self._suspect = ""  # what a kernel failed with, which the device may not have survived

    def compile(self, problem: Problem, schedule: Schedule) -> None:
        """Build a kernel, and launch it once on one query and one key, which compiles it.

        Raises:
            KernelFailure: the device launched nothing, and said nothing (of a kernel that takes no
                time at all a search would make much).
        """
        key = (problem.config.key, schedule)
        if key in self._built:
            return
        if any(
            (config, other.family) != (key[0], schedule.family) for config, other in self._built
        ):
            self._built.clear()
        with self._watched():
            runner = runner_of(self.device, problem.config, schedule)
            q, k, v, inputs = arrays(problem, 0, q_len=1, kv_len=1)
            more = (inputs,) if needs_inputs(problem.config) else ()
            with marked_outputs():
                out = runner(q, k, v, 1.0, *more)[0]
            mx.eval(out)
            if is_unwritten(out):
                raise KernelFailure("runtime", f"its output of one query and one key: {UNWRITTEN}")
        self._built[key] = runner

    def warm_up(self, problem: Problem, schedule: Schedule) -> None:
        runner = self._runner(problem, schedule)
        with self._alone(problem) as bench:
            bench.warm_up(runner)

    def measure(
        self,
        problem: Problem,
        schedule: Schedule,
        give_up: float = math.inf,
        stop: Stop | None = None,
    ) -> Timing:
        runner = self._runner(problem, schedule)
        with self._alone(problem) as bench:
            return bench.measure(runner, give_up=give_up, stop=stop)

    def race(
        self,
        problem: Problem,
        schedules: Sequence[Schedule],
        default: Schedule | None,
        deadline: float = math.inf,
    ) -> Race:
        runners = {s.key: self._runner(problem, s) for s in schedules}
        with self._alone(problem) as bench:
            return race(bench, runners, default.key if default else None, deadline)

    def verify(self, device: Device, config: AttentionConfig, schedule: Schedule) -> Verification:
        with self._watched():
            return verify_kernel(self.device, config, schedule)

    def close(self) -> None:
        self._bench = None
        self._built.clear()

    def _runner(self, problem: Problem, schedule: Schedule) -> Runner:
        self.compile(problem, schedule)
        return self._built[problem.config.key, schedule]

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        """While a kernel runs; after one that failed, the device must work before the next does.

        After some failures nothing runs in the process any more, and no other kernel is to blame.
        """
        if self._suspect:
            require_working(self.device, f" any more, after a kernel failed ({self._suspect})")
            self._suspect = ""
        try:
            yield
        except RuntimeError as error:
            self._suspect = str(error).strip().partition("\n")[0]
            raise

    @contextlib.contextmanager
    def _alone(self, problem: Problem) -> Iterator[Bench]:
        """The arrays of a problem, while no other process measures."""
        with one_at_a_time(self.lock, self.waiting):
            self.beat()
            if self._bench is None or self._bench.problem != problem:
                self._bench = None  # before the others are made
                try:
                    self._bench = Bench(problem, self.policy, self.clock, self.beat)
                except RuntimeError as error:  # no verdict about a kernel
                    raise NoRoom(f"cannot make the arrays of {problem}: {error}") from error
            try:
                with self._watched():
                    yield self._bench
            finally:
                if not self.keep:
                    self._bench = None
                    mx.clear_cache()


def lock_file() -> Path:
    """The file whose lock says that this user measures on this machine."""
    return Path(tempfile.gettempdir()) / f"metalgen-{os.getuid()}.lock"


@contextlib.contextmanager
def one_at_a_time(path: Path | None, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Wait for the lock of a file, and hold it; a process that ends, however, lets it go."""
    if path is None:
        yield
        return
    import fcntl

    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise DeviceError(f"cannot open {path} to measure alone: {error.strerror}") from error
    try:
        waiting()
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)
