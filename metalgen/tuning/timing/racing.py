"""Finals: the best against the default and MLX's own attention, and what counts as faster.

A schedule wins only where it beats the default by more than two entries of the default differ in
the same race. Where none does, the default wins: nobody gets slower by noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from metalgen.devices import Runner
from metalgen.tuning.timing.measure import Bench, Timing, mlx_baseline

AGAIN = "default again"
"""The default schedule's second entry in a race, against itself."""
MLX = "mlx"
"""The entry of MLX's own attention."""
CERTAIN = 3.0
"""Standard deviations by which a schedule must beat the default."""
NEGLIGIBLE = 0.002
"""A lead over the default that is not worth more rounds."""


@dataclass(frozen=True)
class Race:
    """What a race measured.

    Args:
        timings: by the keys of the schedules, and `MLX` where it took part; the default's are
            those of both its entries.
        default: the key of the default schedule, or None where it took no part.
        again: the default's two entries, apart.
    """

    timings: Mapping[str, Timing]
    default: str | None = None
    again: tuple[Timing, Timing] | None = None

    @property
    def noise(self) -> float:
        """What no difference looks like: how far the medians of the default's entries are apart."""
        return abs(self.again[1].median / self.again[0].median - 1.0) if self.again else 0.0

    def beats_default(self, key: str) -> bool:
        """Whether a schedule is faster than the default beyond doubt.

        Its median must be below by more than the noise. And of its samples over the default's, in
        pairs as they were taken side by side, the median must be below 1 by its interval: one of
        three standard deviations, for there are several finalists and several looks.
        """
        if self.again is None or self.default is None:
            return True
        own, default = self.timings[key], self.timings[self.default]
        ahead = own.median < default.median * (1.0 - self.noise)
        return ahead and self._ratios(key).interval(CERTAIN)[1] < 1.0

    def _ratios(self, key: str) -> Timing:
        assert self.again is not None
        rounds = zip(self.timings[key].samples, *(t.samples for t in self.again), strict=True)
        return Timing(tuple(2.0 * own / (first + second) for own, first, second in rounds))

    def reservation(self, key: str) -> str:
        """Why a quicker median does not count as faster than the default; empty where it does."""
        if self.default is None or key == self.default or self.beats_default(key):
            return ""
        if self.timings[key].median >= self.timings[self.default].median:
            return ""
        return f"not faster than the default beyond the noise ({self.noise:.2%} in this race)"

    @property
    def settled(self) -> bool:
        """Whether more samples would hardly change who wins."""
        if self.again is None or self.default is None:
            return True
        rivals = [key for key in self.timings if key not in (self.default, MLX)]
        best = min(rivals, key=lambda key: self.timings[key].median, default=None)
        if best is None:
            return True
        lead = 1.0 - self.timings[best].median / self.timings[self.default].median
        return lead <= NEGLIGIBLE or self.beats_default(best)


def _runs(bench: Bench, runner: Runner) -> bool:
    """Whether MLX's attention runs: where it has no fused kernel, its scores may need too much."""
    try:
        bench.try_out(runner)
    except (RuntimeError, ValueError, MemoryError):
        return False
    return True


def race(
    bench: Bench,
    runners: Mapping[str, Runner],
    default: str | None,
    deadline: float = math.inf,
) -> Race:
    """Measure finalists and MLX's own attention, interleaved, until it is settled who wins.

    Args:
        bench: the arrays and the clock.
        runners: of the finalists, by the keys of their schedules.
        default: the default's key, where it is among them; it takes part twice.
        deadline: the clock's time after which no round begins, beyond those of the policy.
    """
    own = mlx_baseline(bench.problem)
    entries = dict(runners) | ({MLX: own} if own and _runs(bench, own) else {})
    if default is not None:
        entries[AGAIN] = runners[default]

    def outcome(timings: Mapping[str, Timing]) -> Race:
        joined = dict(timings)
        again = joined.pop(AGAIN, None)
        if default is None or again is None:
            return Race(joined)
        first = joined[default]
        joined[default] = Timing(first.samples + again.samples)
        return Race(joined, default, (first, again))

    return outcome(bench.compare(entries, lambda timings: outcome(timings).settled, deadline))
