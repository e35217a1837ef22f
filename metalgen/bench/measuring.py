"""Measuring a row: each entry checked first, then timed in rotation with the others.

The clock rate of a laptop, other programs and heat affect whatever runs at the moment, so entries
take turns within each round, in one order and then in the other; a ratio is taken within a round.
Each launch waits for the one before, as layers of a model do, and takes other arrays than it, so
that no cache holds them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from metalgen.bench.entries import Absent, Entry, Found, Set, small
from metalgen.bench.work import Work
from metalgen.calls.check import first_line
from metalgen.calls.verify import relative_error
from metalgen.errors import MetalgenError
from metalgen.problem.inputs import Inputs
from metalgen.tuning.timing.measure import Policy, Timing, chain, set_count

Clock = Callable[[], float]
AGREEMENT = 4.0
"""How many tolerances two right entries may differ by at full size."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        rounds: of all entries, each there and back.
        sample_seconds: of one sample, which repeats a short call.
        warmup_seconds: of work before the first round.
        cold_bytes: bytes of arrays that calls take in turn.
    """

    rounds: int = 9
    sample_seconds: float = 0.02
    warmup_seconds: float = 0.3
    cold_bytes: int = 256 << 20

    def sets(self, size: int) -> int:
        """Sets of arrays where each holds so many bytes."""
        return min(16, set_count(size, Policy(cold_bytes=self.cold_bytes)))


QUICK = Effort(rounds=5, sample_seconds=0.002, warmup_seconds=0.0, cold_bytes=1 << 20)
"""For tries: small arrays, short samples."""


@dataclass(frozen=True)
class Ratio:
    """Seconds over the baseline's: how many times as fast the baseline is.

    Args:
        value: the median of the rounds' ratios.
        low, high: its 95 % interval, from order statistics, whatever the distribution.
    """

    value: float
    low: float
    high: float

    @property
    def separable(self) -> bool:
        """Whether the interval is all on one side of 1."""
        return not self.low <= 1.0 <= self.high


@dataclass(frozen=True)
class Result:
    """What came of one entry.

    Args:
        name: the entry's.
        status: ``"ok"``, ``"wrong"``, ``"failed"`` or ``"absent"``; only what is ok was timed.
        detail: why not, or how far from the reference it is.
        samples: seconds of a call, one of each turn.
        ratio: against the baseline of the row; None for the baseline itself.
        peak_bytes: memory that MLX held at the most during one call, in addition to its arrays.
        cache_bytes, live_bytes: the entry's.
        note: the entry's.
    """

    name: str
    status: str
    detail: str = ""
    samples: tuple[float, ...] = ()
    ratio: Ratio | None = None
    peak_bytes: int = 0
    cache_bytes: int = 0
    live_bytes: float = 0.0
    note: str = ""

    @property
    def seconds(self) -> float | None:
        """The median; None where nothing was timed."""
        return statistics.median(self.samples) if self.samples else None

    @property
    def spread(self) -> float | None:
        """The interquartile range of the samples."""
        return Timing(self.samples).spread if self.samples else None


@dataclass
class Row:
    """A work and the results of its entries."""

    work: Work
    results: list[Result] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "work": self.work.to_dict(),
            "results": [
                asdict(r) | {"seconds": r.seconds, "spread": r.spread} for r in self.results
            ],
        }


def measure(
    work: Work,
    entries: Iterable[Found],
    effort: Effort,
    *,
    clock: Clock = time.perf_counter,
) -> Row:
    """Check the entries of a row, time those that are right, and compare them.

    The baseline of ratios is the first entry of ours that is right, else the first that is.

    Args:
        work: what they compute.
        entries: the competitors, and those that do not take part.
        effort: how much to measure.
        clock: seconds, from any start.
    """
    given = list(entries)
    results = {e.name: Result(e.name, "absent", e.why) for e in given if isinstance(e, Absent)}
    racing: dict[str, Entry] = {}
    for entry in given:
        if isinstance(entry, Absent):
            continue
        fault, error = check(entry, work)
        if fault:
            status = "failed" if error is None else "wrong"
            results[entry.name] = Result(entry.name, status, fault)
        else:
            racing[entry.name] = entry
            results[entry.name] = Result(entry.name, "ok", f"relative error {error:.1e}")
    if racing:
        _race(work, racing, results, effort, clock)
    return Row(work, [results[e.name] for e in given])


def check(entry: Entry, work: Work) -> tuple[str, float | None]:
    """What is wrong with an entry on a small call, and its relative error; "" where nothing is."""
    try:
        given = entry.make(small(work), 1)
        out = (entry.outputs or entry.call)(*given)
        mx.eval(out)
        error = relative_error(out, np.asarray(entry.expected(given)))
    except (MetalgenError, RuntimeError, ValueError, TypeError) as problem:
        return first_line(problem), None
    if not error <= entry.tolerance:
        return f"relative error {error:.1e}, more than {entry.tolerance:.1e}", error
    return "", error


def _race(
    work: Work,
    racing: dict[str, Entry],
    results: dict[str, Result],
    effort: Effort,
    clock: Clock,
) -> None:
    """Time the entries, leaving out those that fail or disagree at full size."""
    sets: dict[str, list[Set]] = {}
    launches, peaks = dict[str, int](), dict[str, int]()
    shared = dict[Any, list[Set]]()
    first: mx.array | None = None
    for name, entry in list(racing.items()):
        try:
            own = shared.get(entry.make)
            if own is None:
                own = [entry.make(work, 0)]
                mx.eval(_arrays(own[0]))
                count = effort.sets(sum(x.nbytes for x in _arrays(own[0])))
                own += [entry.make(work, seed) for seed in range(1, count)]
                mx.eval([_arrays(each) for each in own])
                shared[entry.make] = own
            sets[name] = own
            if entry.run is None:
                out, peaks[name] = _once(entry, own[0])
                if own is sets[next(iter(sets))]:
                    first = out if first is None else first
                    _agree(entry, out, first)
            else:  # another package's arrays
                entry.run(own, 1, 0)
            launches[name] = _launches(entry, own, effort, clock)
        except (MetalgenError, RuntimeError, ValueError) as problem:
            status = "wrong" if isinstance(problem, _Disagreement) else "failed"
            results[name] = Result(name, status, first_line(problem))
            del racing[name]
    samples: dict[str, list[float]] = {name: [] for name in racing}
    names = list(racing)
    for name in names:
        _warm_up(racing[name], sets[name], effort, clock)
    turn = 0
    for _ in range(effort.rounds):
        for name in [*names, *reversed(names)]:
            begin = clock()
            _run(racing[name], sets[name], launches[name], turn)
            samples[name].append((clock() - begin) / launches[name])
            turn += 1
    base = baseline(names)
    for name in names:
        kept = results[name]
        results[name] = Result(
            *(name, "ok", kept.detail, tuple(samples[name])),
            None if name == base or base is None else compare(samples[base], samples[name]),
            *(peaks.get(name, 0), racing[name].cache_bytes, racing[name].live_bytes),
            racing[name].note,
        )


class _Disagreement(RuntimeError):
    """Two entries of a row that give different numbers."""


def _agree(entry: Entry, out: mx.array, first: mx.array) -> None:
    """Whether two entries give the same numbers for the same arrays at full size."""
    if out is first:
        if not bool(mx.isfinite(out).all().item()):
            raise _Disagreement("the output is not finite at full size")
        return
    wide, other = out.astype(mx.float32), first.astype(mx.float32)
    apart, size = (mx.linalg.norm(x.reshape(-1)) for x in (wide - other, other))
    error = float(apart / size)
    if not error <= AGREEMENT * entry.tolerance:
        raise _Disagreement(f"differs by {error:.1e} from the first entry at full size")


def baseline(names: Sequence[str]) -> str | None:
    """What ratios are taken against: ours tuned, else another of ours, else the first."""
    for prefix in ("ours tuned", "ours", "dense"):
        for name in names:
            if name.startswith(prefix):
                return name
    return names[0] if names else None


def compare(base: Sequence[float], samples: Sequence[float]) -> Ratio:
    """Seconds over the baseline's in each round, whose two turns count as one."""
    pairs = [
        (samples[n] + samples[n + 1]) / (base[n] + base[n + 1]) for n in range(0, len(base) - 1, 2)
    ]
    low, high = Timing(tuple(pairs)).interval()
    return Ratio(statistics.median(pairs), low, high)


def _arrays(members: Set) -> list[mx.array]:
    """All of MLX's arrays in a set."""
    found = []
    for x in members:
        if isinstance(x, mx.array):
            found.append(x)
        elif isinstance(x, Inputs):
            found += x.arrays
        elif isinstance(x, tuple):
            found += _arrays(x)
    return found


def _once(entry: Entry, members: Set) -> tuple[mx.array, int]:
    """An output, and the most memory that it took."""
    mx.eval(entry.call(*members))  # which compiles
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    out = entry.call(*members)
    mx.eval(out)
    return out, max(0, mx.get_peak_memory() - before)


def _run(entry: Entry, sets: Sequence[Set], launches: int, first: int = 0) -> None:
    """Calls of an entry, each of which waits for the one before, to the end of the last."""
    if entry.run is not None:
        entry.run(sets, launches, first)
    else:
        chain(entry.call, sets, launches, first)


def _launches(entry: Entry, sets: Sequence[Set], effort: Effort, clock: Clock) -> int:
    begin = clock()
    _run(entry, sets, 2)
    once = (clock() - begin) / 2
    return max(1, min(256, math.ceil(effort.sample_seconds / max(once, 1e-9))))


def _warm_up(entry: Entry, sets: Sequence[Set], effort: Effort, clock: Clock) -> None:
    deadline = clock() + effort.warmup_seconds
    while clock() < deadline:
        _run(entry, sets, len(sets))


@dataclass(frozen=True)
class Peaks:
    """What the device does at best, measured here.

    Args:
        operations: a second, of a large matrix product of the rows' type.
        bytes: a second, of a large copy, read and written.
    """

    operations: float
    bytes: float


def measure_peaks(dtype: str, *, large: bool, clock: Clock = time.perf_counter) -> Peaks:
    """Rates of a square matrix product and of a copy; `large` sizes are those for a GPU."""
    side, length = (8192, 1 << 27) if large else (512, 1 << 20)
    x = mx.random.normal((side, side)).astype(getattr(mx, dtype))
    y = mx.random.normal((length,))
    mx.eval(x, y)
    product = min(_seconds(lambda: x @ x, clock))
    copy = min(_seconds(lambda: y + 1, clock))
    return Peaks(2.0 * side**3 / product, 2.0 * y.nbytes / copy)


def _seconds(make: Callable[[], mx.array], clock: Clock) -> Iterator[float]:
    mx.eval(make())
    for _ in range(5):
        begin = clock()
        mx.eval(make())
        yield clock() - begin


def of_rows(rows: Iterable[Row]) -> Mapping[str, list[Ratio]]:
    """The ratios of each entry over all rows."""
    found: dict[str, list[Ratio]] = {}
    for row in rows:
        for result in row.results:
            if result.ratio is not None:
                found.setdefault(result.name, []).append(result.ratio)
    return found
