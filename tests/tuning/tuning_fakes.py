"""A device whose times are a formula, its clock, and checks with a known outcome."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from metalgen.config import AttentionConfig
from metalgen.devices import Device, Runner
from metalgen.schedule import Schedule
from metalgen.verify import Verification


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
    target = "metal"
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

    def build(self, config: AttentionConfig, schedule: Schedule, family: str = "forward") -> Runner:
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

    def __call__(
        self, device: Device, config: AttentionConfig, schedule: Schedule, family: str = "forward"
    ) -> Verification:
        self.asked.append((config, schedule))
        if self.wrong(schedule):
            return Verification(False, 0.5, 1e-3, "Lq=9 Lk=9", "relative error 5e-01")
        return Verification(True, 2e-4, 1e-3, "Lq=9 Lk=9")
