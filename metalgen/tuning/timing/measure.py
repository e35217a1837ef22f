"""Timing kernels on a device that has a clock.

As on any GPU of a laptop: warm up by wall clock, because short kernels never raise the clock rate;
rotate among several sets of arrays, or a cache is what gets measured (`Policy.cache` chooses); let
each launch wait for the one before (`chain`); take the median; compare by interleaving.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from metalgen.devices import Runner
from metalgen.devices.marking import UNWRITTEN, is_unwritten, marked_outputs
from metalgen.devices.mlx_attention import computes, mlx_runner
from metalgen.errors import ArgumentError
from metalgen.families import AttentionFamily, get_family
from metalgen.families.sizes import Problem
from metalgen.problem.inputs import Inputs, needs_inputs
from metalgen.problem.samples import Call, sample_call

Clock = Callable[[], float]
"""Seconds, from any start."""
Stop = Callable[[int, float], bool]
"""Told of each sample, by its number from 0 and in seconds; whether to take no more."""

MAX_LAUNCHES = 256
"""Launches of one sample."""
TOGETHER = 32
"""Launches that MLX is handed at once, at most: 1, 1, 2, 4, and so on, for the GPU to begin early;
the next are built while it works."""
MAX_OUTPUT_BYTES = 256 << 20
"""Bytes of output that the launches of one sample may hold together."""
MAX_SETS = 64
"""Sets of arrays, however small they are."""
CACHES = ("cold", "warm")
"""What a launch finds in the last-level cache: other arrays, or its own."""


@dataclass(frozen=True)
class Policy:
    """How times are taken; part of the key of every measurement.

    Args:
        timer: ``"wall"``: from before a sample's first launch is built until its last result is
            there.
        cache: ``"cold"``: launches take so many sets of arrays in turn that each finds its keys and
            values gone from the cache; ``"warm"``: the same arrays again.
        sets: sets of arrays at least, where the cache is cold.
        cold_bytes: what they hold together, at least: past twice the last-level cache of any GPU.
            There are never more than 64 sets, so the smallest problems stay in a cache.
        warmup_seconds: of work before the first measurement.
        repetitions: samples a measurement, an odd number.
        most_repetitions: samples at most, where the median is uncertain.
        precision: half the width of the median's 95 % interval, over the median, that is enough.
        sample_seconds: a sample repeats a short kernel for about this long.
        rounds: rounds of a final, each there and back (A B C, C B A).
        most_rounds: rounds at most, where it is not settled whether the best beats the default.
        chained: whether each launch of a sample waits for the one before, as layers of a model do.
            Others run beside one another where they leave a part of the GPU free: their times then
            flatter schedules that do.

    Raises:
        ArgumentError: a cache that is neither.
    """

    timer: str = "wall"
    cache: str = "cold"
    sets: int = 3
    cold_bytes: int = 256 << 20
    warmup_seconds: float = 1.0
    repetitions: int = 7
    most_repetitions: int = 31
    precision: float = 0.01
    sample_seconds: float = 0.01
    rounds: int = 5
    most_rounds: int = 30
    chained: bool = True

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise ArgumentError("cache", " or ".join(CACHES), self.cache)

    @property
    def key(self) -> str:
        """Canonical JSON."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Timing:
    """The samples of one measurement, in seconds a launch, in the order they were taken.

    ``stopped``: it was ended early, by what it had shown.
    """

    samples: tuple[float, ...]
    stopped: bool = False

    @property
    def median(self) -> float:
        """What counts."""
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range; 0 where there is only one sample."""
        if len(self.samples) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return high - low

    def interval(self, deviations: float = 1.96) -> tuple[float, float]:
        """An interval of the median, by default the 95 % one; everything where n is 1.

        It runs between the samples of ranks ``n/2 -+ deviations sqrt(n) / 2`` (binomial, by the
        normal approximation), whatever the samples' distribution.
        """
        n, ordered = len(self.samples), sorted(self.samples)
        if n < 2:
            return -math.inf, math.inf
        reach = deviations / 2 * math.sqrt(n)
        low = max(0, math.floor(n / 2 - reach))
        high = min(n - 1, math.ceil(n / 2 + reach) - 1)
        return ordered[low], ordered[high]

    @property
    def uncertainty(self) -> float:
        """Half the width of the median's 95 % interval, over the median."""
        low, high = self.interval()
        return (high - low) / 2 / self.median

    @property
    def outliers(self) -> int:
        """Samples beyond three interquartile ranges from the quartiles; they are kept."""
        if len(self.samples) < 4:
            return 0
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        reach = 3 * (high - low)
        return sum(not low - reach <= sample <= high + reach for sample in self.samples)


class Bench:
    """The arrays of one problem, and a clock.

    Args:
        problem: its bucket's sizes are what runs.
        policy: how to measure.
        clock: seconds; another one for tests.
        beat: called before every sample, off the clock: a sign of life.
    """

    def __init__(
        self,
        problem: Problem,
        policy: Policy,
        clock: Clock = time.perf_counter,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.problem = problem
        self.policy = policy
        self.clock = clock
        self.beat = beat
        self.scale = problem.config.head_dim**-0.5
        self.sets = [arrays(problem, 0)]
        count = set_count(sum(x.nbytes for x in members(self.sets[0])), policy)
        self.sets += [arrays(problem, seed) for seed in range(1, count)]
        self._bare = not needs_inputs(problem.config)
        self._next = 0

    def run(self, runner: Runner, launches: int = 1) -> float:
        """Seconds a launch of `launches` of them, one after another."""

        def call(q: mx.array, k: mx.array, v: mx.array, inputs: Inputs) -> mx.array:
            return runner(q, k, v, self.scale, *(() if self._bare else (inputs,)))[0]

        self.beat()
        first, self._next = self._next, self._next + launches
        start = self.clock()
        chain(call, self.sets, launches, first, waiting=self.policy.chained)
        return (self.clock() - start) / launches

    def try_out(self, runner: Runner) -> None:
        """Run it once, which may compile it.

        Raises:
            RuntimeError: the device launched nothing, and said nothing.
        """
        self.beat()
        q, k, v, inputs = self.sets[self._next % len(self.sets)]
        self._next += 1
        with marked_outputs():
            out = runner(q, k, v, self.scale, *(() if self._bare else (inputs,)))[0]
        mx.eval(out)
        if is_unwritten(out):
            raise RuntimeError(f"its first output: {UNWRITTEN}")

    def warm_up(self, runner: Runner) -> None:
        """Keep the device at work until its clock rate is up."""
        deadline = self.clock() + self.policy.warmup_seconds
        while self.clock() < deadline:
            self.run(runner)

    def launches(self, seconds: float) -> int:
        """Launches of a sample for a kernel that takes `seconds`."""
        p = self.problem
        output = p.heads * p.q_len * p.config.v_dim * p.config.itemsize
        wanted = math.ceil(self.policy.sample_seconds / max(seconds, 1e-9))
        return max(1, min(wanted, MAX_LAUNCHES, MAX_OUTPUT_BYTES // output))

    def measure(
        self, runner: Runner, *, give_up: float = math.inf, stop: Stop | None = None
    ) -> Timing:
        """Samples until the median is certain, after `try_out` and one that warms.

        One only, if that takes longer than `give_up`; and no more after `stop` says so.
        """
        self.try_out(runner)
        first = self.run(runner)
        if first > give_up:
            return Timing((first,))
        launches = self.launches(first)
        policy = self.policy
        samples: list[float] = []
        while True:
            samples.append(self.run(runner, launches))
            if stop is not None and stop(len(samples) - 1, samples[-1]):
                return Timing(tuple(samples), stopped=True)
            taken = len(samples)
            if taken < policy.repetitions or (taken - policy.repetitions) % 2:
                continue  # two more at a time, so that the median is a sample
            timing = Timing(tuple(samples))
            most = max(policy.most_repetitions, policy.repetitions)
            if timing.uncertainty <= policy.precision or taken + 1 >= most:
                return timing

    def compare(
        self,
        runners: Mapping[str, Runner],
        settled: Callable[[dict[str, Timing]], bool] = lambda timings: True,
        deadline: float = math.inf,
    ) -> dict[str, Timing]:
        """Interleaved samples of several runners: A B C, C B A, and so on.

        After the policy's rounds more follow, until the timings are `settled`, the clock reads
        `deadline` or there were as many as the policy allows.
        """
        launches = {}
        for name, runner in runners.items():
            self.try_out(runner)
            launches[name] = self.launches(self.run(runner))
        samples: dict[str, list[float]] = {name: [] for name in runners}
        for done in range(1, max(self.policy.rounds, self.policy.most_rounds) + 1):
            for name in [*runners, *reversed(list(runners))]:
                samples[name].append(self.run(runners[name], launches[name]))
            timings = {name: Timing(tuple(taken)) for name, taken in samples.items()}
            if done >= self.policy.rounds and (settled(timings) or self.clock() >= deadline):
                break
        return timings


def chain(
    call: Callable[..., mx.array],
    sets: Sequence[Sequence[Any]],
    launches: int,
    first: int = 0,
    *,
    waiting: bool = True,
) -> None:
    """Evaluate launches of which each takes its queries from the one before.

    Without that, MLX lets them overlap: on an H200 the attention of one token, by a schedule that
    keeps 32 of 132 cores busy, took 31 us a launch so, and 150 us where each had to wait.

    Args:
        call: gives an output for the members of a set, the first of which are the queries.
        sets: taken in turn, from number `first` on.
        launches: how many, 1 or more.
        waiting: whether they wait; else all take the queries of their sets.
    """
    outputs: list[mx.array] = []
    for n in range(launches):
        q, *others = sets[(first + n) % len(sets)]
        out = call(_behind(q, outputs[-1]) if waiting and outputs else q, *others)
        outputs = [out] if waiting else [*outputs, out]
        if (n + 1) % TOGETHER == 0 or (n < TOGETHER and n & (n + 1) == 0):
            mx.async_eval(outputs)  # type: ignore[no-untyped-call]
    mx.eval(outputs)


def _behind(q: mx.array, out: mx.array) -> mx.array:
    """Queries that are not there before an output is: the output itself, where it is as wide.

    Else their own, by an elementwise operation that counts in the sample, whatever computes it.
    """
    return out if (out.shape, out.dtype) == (q.shape, q.dtype) else q + 0 * out[..., :1]


def set_count(size: int, policy: Policy) -> int:
    """How many sets of arrays a policy takes in turn, where each holds `size` bytes."""
    if policy.cache == "warm":
        return 1
    return max(policy.sets, min(MAX_SETS, math.ceil(policy.cold_bytes / size)))


def arrays(
    problem: Problem, seed: int, q_len: int | None = None, kv_len: int | None = None
) -> Call:
    """Unit-variance arrays of a problem's bucket, a batch of one, evaluated.

    ``(1, H, L, D)`` q, k and v, and whatever else the config asks for, everything as long as it may
    be (`metalgen.problem.samples.sample_call`); with other lengths where they are given.
    """
    call = sample_call(
        problem.config,
        kv_heads=max(1, problem.heads // problem.config.heads_per_kv),
        q_len=problem.q_len if q_len is None else q_len,
        kv_len=problem.kv_len if kv_len is None else kv_len,
        seed=seed,
        ragged=False,
    )
    mx.eval(members(call))
    return call


def members(call: Call) -> list[mx.array]:
    """Every array of a call, but for those of a block mask."""
    q, k, v, inputs = call
    return [q, k, v, *inputs.arrays]


def mlx_baseline(problem: Problem) -> Runner | None:
    """MLX's own attention, where it computes the same thing; None where it does not."""
    config = problem.config
    backward = not isinstance(get_family(problem.family), AttentionFamily)
    if backward or not computes(config):
        return None
    if config.causal and problem.q_len > problem.kv_len:  # rows that see no key: NaN there
        return None
    return mlx_runner(config)
