"""A device whose times are a formula, its clock, and checks with a known outcome."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from metalgen.calls.verify import Verification
from metalgen.devices import Device, Runner
from metalgen.devices.simulator import SimulatorDevice
from metalgen.families import Schedule
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.workers.executing import NoRoom


class Clock:
    """Seconds that pass only when someone says so, and a microsecond whenever it is read."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        self.now += 1e-6
        return self.now


def cost(schedule: Schedule) -> float:
    """Seconds of a schedule on the fake device: distinct for nearly all, with one clear best."""
    s = schedule
    seconds = 1e-3 * (1 + abs(s.bk - 32) / 32 + abs(s.simdgroups - 8) / 8 + abs(s.row_blocks - 2))
    seconds += 1e-4 * (s.k_source == "threadgroup") + 2e-4 * (s.v_source == "threadgroup")
    seconds += 1e-5 * s.load_width + 3e-6 * s.buffers + 1e-7 * s.bd
    return seconds + 2e-6 * (s.q_source == "registers") + 1e-6 * (s.math_mode == "safe")


class FakeGpu(Device):
    """Its kernels compute nothing and take `seconds`; `fails` names those that cannot be built."""

    name = "metal"
    language = "metal"
    has_clock = True
    is_gpu = True

    def __init__(
        self,
        clock: Clock,
        fails: Callable[[Schedule], Exception | None] = lambda s: None,
        seconds: Callable[[Schedule], float] = cost,
    ) -> None:
        self.clock = clock
        self.seconds = seconds
        self.fails = fails
        self.built: list[Schedule] = []

    def unavailable(self) -> str | None:
        return None

    def build(self, config: AttentionConfig, schedule: Schedule) -> Runner:
        self.built.append(schedule)
        error = self.fails(schedule)
        if error:
            raise error

        def run(
            q: mx.array, k: mx.array, v: mx.array, scale: float
        ) -> tuple[mx.array, mx.array | None]:
            self.clock.now += self.seconds(schedule)
            return mx.zeros(1), None

        return run


class FakeVerify:
    """A check that passes but for the schedules in `wrong`, and remembers what it was asked."""

    def __init__(self, wrong: Callable[[Schedule], bool] = lambda s: False) -> None:
        self.wrong = wrong
        self.asked: list[tuple[AttentionConfig, Schedule]] = []

    def __call__(self, device: Device, config: AttentionConfig, schedule: Schedule) -> Verification:
        self.asked.append((config, schedule))
        if self.wrong(schedule):
            return Verification(False, 0.5, 1e-3, "Lq=9 Lk=9", "relative error 5e-01")
        return Verification(True, 2e-4, 1e-3, "Lq=9 Lk=9")


class ProcessGpu(Device):
    """A device for helper processes: real time passes, and some kernels take the process with them.

    Args:
        log: a file to which it appends ``pid what begin end schedule`` for every build and run.
        trouble: what happens to a schedule, by its key: what and where, as in `_happen`.
        build_seconds, run_seconds: how long building and launching take.
        missing: why there is no such device in a helper.
    """

    name = "metal"
    language = "metal"
    has_clock = True
    is_gpu = True

    def __init__(
        self,
        log: Path,
        trouble: dict[str, str] | None = None,
        *,
        build_seconds: float = 0.0,
        run_seconds: float = 1e-4,
        missing: str | None = None,
    ) -> None:
        self.log = log
        self.trouble = trouble or {}
        self.build_seconds = build_seconds
        self.run_seconds = run_seconds
        self.missing = missing

    def unavailable(self) -> str | None:
        self._write("start", time.monotonic(), "")
        return self.missing

    def build(self, config: AttentionConfig, schedule: Schedule) -> Runner:
        begin = time.monotonic()
        kind = self.trouble.get(schedule.key, "")
        self._happen(kind, "build")
        time.sleep(self.build_seconds)
        self._write("build", begin, schedule.key)

        def run(
            q: mx.array, k: mx.array, v: mx.array, scale: float
        ) -> tuple[mx.array, mx.array | None]:
            begin = time.monotonic()
            what = "run" if q.shape[2] > 1 else "try"
            self._happen(kind, what)
            time.sleep(self.run_seconds * (1.0 + cost(schedule)))
            self._write(what, begin, schedule.key)
            return mx.zeros(1), None

        return run

    def _happen(self, kind: str, where: str) -> None:
        what, _, place = kind.partition(" ")
        if place != where:
            return
        if what == "crash":
            os.write(2, b"first words\nthe driver gave up\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        if what == "exit":
            os._exit(3)
        if what == "meet":  # another process that is here too
            self._write("meet", time.monotonic(), "")
            while len({event[0] for event in events(self.log) if event[1] == "meet"}) < 2:
                time.sleep(0.005)
        if what == "hang":
            time.sleep(1000.0)
        if what == "raise":
            raise RuntimeError("the launch failed")
        if what == "full":
            raise NoRoom("no room in a helper")
        if what == "refuse":
            raise RuntimeError("cannot compile this")
        if what == "defect":
            raise TypeError("a defect")

    def _write(self, what: str, begin: float, schedule: str) -> None:
        line = f"{os.getpid()}\t{what}\t{begin}\t{time.monotonic()}\t{schedule}\n"
        with self.log.open("a") as file:
            file.write(line)


def events(log: Path) -> list[tuple[int, str, float, float, str]]:
    """What `ProcessGpu` did, in the order in which it ended."""
    found = []
    for line in log.read_text().splitlines():
        pid, what, begin, end, schedule = line.split("\t")
        found.append((int(pid), what, float(begin), float(end), schedule))
    return sorted(found, key=lambda event: event[3])


class SimulatedGpu(SimulatorDevice):
    """The simulator in the place of a Mac's GPU: right results, times of no meaning."""

    name = "metal"
    has_clock = True
    is_gpu = True
