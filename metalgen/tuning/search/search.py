"""Choosing which schedule to try next.

Where the clock is the chip model, everything is ranked: `rank`. Where a measurement costs time,
`Search` asks: first what it was given to start with (the default schedule always), then, in a
small space, everything else in a seeded order; in a large one by its strategy. Each ask is seeded
by the run's seed and the number of rows, and knows nothing but the rows, so a search that was
interrupted and told its rows again goes on as an undisturbed one would.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from metalgen.errors import ArgumentError
from metalgen.families import Parameter, Schedule
from metalgen.families.sizes import Problem

if TYPE_CHECKING:
    import numpy as np
    import optuna

    from metalgen.chips import Chip
    from metalgen.tuning.search.surrogate import Array, Surrogate

TPE_ATTEMPTS = 24
"""Asks of TPE for a point that is valid and new, before one is drawn at random."""
STARTUP_TRIALS = 10
"""Random trials before TPE has a model."""
FAILED = float("inf")
"""The time of a schedule that did not run: worse than any."""
STRATEGIES = ("guided", "tpe", "climb", "random")
"""How a search goes on after its start; `benchmarks/search.py` compares them."""
STARTUP = 8
"""Rows before the surrogate is asked."""
GROWTH = 1.25
"""The surrogate's length scales are found anew when the rows have grown by this factor."""
LARGE = 16_384
"""In a space of more points the surrogate is asked about so many, drawn anew with each refit and
each new best, and about the neighbours of the best."""
ROUND_BEST = 4
"""Best points whose neighbours are asked about in a large space."""
ROWS = 400
"""Of more rows the surrogate is given the better half of so many and the latest others."""
TIE = 1e-6
"""Relative difference of expected improvements up to which they count as equal."""

Item = TypeVar("Item", bound=Hashable)


class Domain(Protocol[Item]):
    """What a search asks of a space: `metalgen.families.Space`, or a recorded one."""

    @property
    def parameters(self) -> Sequence[Parameter]:
        """In the order in which their conditions refer to each other."""

    @property
    def default(self) -> Item:
        """What is tried first."""

    def item(self, point: dict[str, Any]) -> Item:
        """The item of a point."""

    def point(self, item: Item) -> dict[str, Any] | None:
        """The point of an item; None where there is none."""

    def value(self, item: Item, name: str) -> Any:
        """An item's value of a parameter."""


def rank(
    problem: Problem,
    schedules: Iterable[Schedule],
    chip: Chip,
    tick: Callable[[int, float, Schedule], None] | None = None,
) -> list[tuple[float, Schedule]]:
    """Predicted seconds of schedules on a chip, the quickest first; ties by their keys.

    Args:
        problem: what to run.
        schedules: valid ones.
        chip: whose model to ask.
        tick: called now and then with how many were ranked, and the best so far.

    Raises:
        IncompleteChip: the chip lacks figures that the model needs.
    """
    from metalgen.chips.model import predict

    ranked = []
    best, best_seconds = None, FAILED
    for n, schedule in enumerate(schedules, 1):
        seconds = predict(problem, schedule, chip).seconds
        ranked.append((seconds, schedule))
        if seconds < best_seconds:
            best, best_seconds = schedule, seconds
        if tick and best and n % 512 == 0:
            tick(n, best_seconds, best)
    ranked.sort(key=lambda pair: (pair[0], pair[1].key))
    return ranked


class Search(Generic[Item]):
    """Asks for schedules, is told their times, never asks for the same one twice.

    Strategies: ``"guided"`` asks a Gaussian process for the greatest expected improvement;
    ``"tpe"`` Optuna's tree-structured Parzen estimator behind the set of what was tried;
    ``"climb"`` tries neighbours of the present point, moves where one is better and starts anew
    where none is left; ``"random"`` draws.

    Args:
        space: where to look.
        valid: every valid schedule of it (`enumerate_valid`).
        seed: of the run.
        first: schedules to start with, after the default one.
        small: up to this many valid schedules all are tried.
        strategy: one of `STRATEGIES`.

    Raises:
        ArgumentError: `seed` is not a whole number from 0 to 2**31 - 1, or an unknown strategy.
    """

    def __init__(
        self,
        space: Domain[Item],
        valid: Sequence[Item],
        seed: int = 0,
        *,
        first: Sequence[Item] = (),
        small: int = 0,
        strategy: str = "guided",
    ) -> None:
        if type(seed) is not int or not 0 <= seed < 1 << 31:
            raise ArgumentError("seed", "a whole number from 0 to 2147483647", seed)
        if strategy not in STRATEGIES:
            raise ArgumentError("strategy", f"one of {', '.join(STRATEGIES)}", strategy)
        self.space = space
        self.valid = tuple(valid)
        self.seed = seed
        self.small = small
        self.strategy = strategy
        self.first = tuple(dict.fromkeys((space.default, *first)))
        self.times: dict[Item, float] = {}
        self._index = {item: n for n, item in enumerate(self.valid)}
        self._order: list[int] = []  # of `valid`, as they were told
        self._study: optuna.Study | None = None
        self._grid: tuple[np.ndarray[Any, Any], Array] | None = None
        self._model: tuple[int, Surrogate, list[int], np.ndarray[Any, Any]] | None = None

    def tell(self, item: Item, seconds: float | None) -> None:
        """The outcome of a schedule: its time, or None where it has none."""
        if item in self.times:
            return
        self.times[item] = FAILED if seconds is None else seconds
        if item in self._index:
            self._order.append(self._index[item])
        if self._study is not None:
            self._add(self._study, item)

    def ask(self) -> Item | None:
        """The next schedule to try; None when all have been."""
        for item in self.first:
            if item in self._index and item not in self.times:
                return item
        if len(self._order) == len(self.valid):
            return None
        # A generator of its own for each ask: only the seed and the rows so far decide.
        draw = random.Random(f"{self.seed} {len(self.times)}")
        found: Item | None = None
        if len(self.valid) > self.small:
            if self.strategy == "tpe":
                found = self._ask_tpe(draw.getrandbits(31))
            elif self.strategy == "climb":
                found = self._ask_climb(draw)
            elif self.strategy == "guided" and self._informed():
                found = self._ask_surrogate(draw)
        return self._any(draw) if found is None else found

    def _any(self, draw: random.Random) -> Item:
        if 2 * len(self._order) < len(self.valid):
            while True:
                item = self.valid[draw.randrange(len(self.valid))]
                if item not in self.times:
                    return item
        return draw.choice([item for item in self.valid if item not in self.times])

    # The surrogate

    def _informed(self) -> bool:
        ran = {self.times[self.valid[n]] for n in self._order} - {FAILED}
        return len(self._order) >= STARTUP and len(ran) > 1

    def _ask_surrogate(self, draw: random.Random) -> Item:
        import numpy as np

        from metalgen.tuning.search.surrogate import outcomes

        base = self._base()
        if self._model is None or self._model[0] != base:
            self._model = base, *self._fit(base)
        _, surrogate, rows, candidates = self._model
        for n in self._order[base + surrogate.size - len(rows) :]:
            surrogate.add(self._codes()[1][n])
        rows = rows + self._order[base:]
        gain = surrogate.improvement(outcomes(self._seconds(rows)))
        gain[np.isin(candidates, self._order)] = -1.0
        if (top := float(gain.max())) < 0.0:
            return self._any(draw)
        # Points that differ in nothing that was seen to matter are equal up to rounding.
        ties = np.flatnonzero(gain >= top * (1.0 - TIE)).tolist()
        return self.valid[int(candidates[draw.choice(ties)])]

    def _base(self) -> int:
        """How many of the rows the surrogate was last fitted to: a matter of the rows alone."""
        base, step, best = STARTUP, STARTUP, FAILED
        while step <= len(self._order):
            base, step = step, max(step + 2, int(step * GROWTH))
        if len(self.valid) > LARGE:
            for n, place in enumerate(self._order, 1):
                if self.times[self.valid[place]] < best:
                    best, base = self.times[self.valid[place]], max(base, n)
        return base

    def _fit(self, base: int) -> tuple[Surrogate, list[int], np.ndarray[Any, Any]]:
        """A surrogate of the first rows, which rows these are, and the sorted candidates."""
        import numpy as np

        from metalgen.tuning.search.surrogate import Surrogate, length_scales, outcomes

        rows = self._order[:base]
        ranked = np.argsort(self._seconds(rows), kind="stable").tolist()
        best = [rows[n] for n in ranked[: ROWS // 2]]
        if len(rows) > ROWS:
            rows = best + [n for n in rows if n not in set(best)][-(ROWS - len(best)) :]
        candidates = np.arange(len(self.valid))
        if len(self.valid) > LARGE:
            draw = random.Random(f"{self.seed} candidates {base}")
            chosen = set(draw.sample(range(len(self.valid)), LARGE))
            chosen.update(*(self._neighbours(n) for n in best[:ROUND_BEST]))
            candidates = np.array(sorted(chosen))
        points = self._codes()[1]
        lengths = length_scales(points[rows], outcomes(self._seconds(rows)))
        room = len(rows) + max(2, int(base * GROWTH) - base)
        return Surrogate(points[rows], points[candidates], lengths, room), rows, candidates

    def _codes(self) -> tuple[np.ndarray[Any, Any], Array]:
        """Ranks of every valid item's values, and the same scaled to 0..1 where they differ."""
        if self._grid is None:
            import numpy as np

            columns = []
            for parameter in self.space.parameters:
                values = [self.space.value(item, parameter.name) for item in self.valid]
                ranks = {v: n for n, v in enumerate(parameter.choices)}
                for value in values:  # an inactive value that is no choice
                    ranks.setdefault(value, len(ranks))
                columns.append([ranks[value] for value in values])
            codes = np.array(columns, dtype=np.int16).T
            codes -= codes.min(axis=0)
            top = codes.max(axis=0)
            self._grid = codes, codes[:, top > 0] / top[top > 0]
        return self._grid

    def _seconds(self, rows: Sequence[int]) -> Array:
        import numpy as np

        return np.array([self.times[self.valid[n]] for n in rows])

    def _neighbours(self, number: int) -> list[int]:
        """The valid items that differ from one in a single parameter."""
        codes = self._codes()[0]
        found: list[int] = ((codes != codes[number]).sum(axis=1) == 1).nonzero()[0].tolist()
        return found

    # Hill climbing

    def _ask_climb(self, draw: random.Random) -> Item | None:
        place: int | None = None
        left: set[int] = set()
        seen: set[int] = set()
        for number in self._order:  # where the climb stands, from the rows alone
            seen.add(number)
            left.discard(number)
            time = self.times[self.valid[number]]
            if place is None or not left or time < self.times[self.valid[place]]:
                place = number
                left = set(self._neighbours(number)) - seen
        return self.valid[draw.choice(sorted(left))] if left else None

    # Optuna

    def _ask_tpe(self, seed: int) -> Item | None:
        import optuna

        if self._study is None:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self._study = optuna.create_study(direction="minimize")
            for item in self.times:
                self._add(self._study, item)
        study = self._study
        sampler = optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, constant_liar=False
        )
        # One trial, that fails, for all attempts: what is asked for is told by `tell`, as a trial
        # of its own, also after a resume.
        study.tell(study.ask({}), state=optuna.trial.TrialState.FAIL)
        trial = study.get_trials(deepcopy=False)[-1]
        common = sampler.infer_relative_search_space(study, trial)
        for _ in range(TPE_ATTEMPTS):
            drawn = sampler.sample_relative(study, trial, common)
            point: dict[str, Any] = {}
            for parameter in self.space.parameters:
                values = parameter.values(point)
                value = values[0]
                if len(values) > 1:
                    value = drawn.get(parameter.name)
                    if value not in values:
                        choices = optuna.distributions.CategoricalDistribution(values)
                        value = sampler.sample_independent(study, trial, parameter.name, choices)
                point[parameter.name] = value
            item = self.space.item(point)
            if item in self._index and item not in self.times:
                return item
        return None

    def _add(self, study: optuna.Study, item: Item) -> None:
        import optuna

        point = self.space.point(item)
        if point is None:
            return
        free: dict[str, object] = {}
        choices: dict[str, optuna.distributions.BaseDistribution] = {}
        for parameter in self.space.parameters:
            values = parameter.values(point)
            if len(values) > 1:
                free[parameter.name] = point[parameter.name]
                choices[parameter.name] = optuna.distributions.CategoricalDistribution(values)
        value = self.times[item]
        study.add_trial(optuna.trial.create_trial(params=free, distributions=choices, value=value))
