"""Rows by problem: what won, against what, how the search went, which parameters matter."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from metalgen.database.measurement import Measurement
from metalgen.database.winners import ordered
from metalgen.errors import MetalgenError
from metalgen.families import Schedule, default_schedule, tuned_families
from metalgen.families.sizes import Problem
from metalgen.report.sources import ORDERLESS, Notes, Sources
from metalgen.schedules import all_knobs
from metalgen.source.hashes import present_templates

LEAST_ROWS = 20
"""Times below which no parameter is called important."""
MOST_ROWS = 1000
"""Times from which importance is reckoned."""
PARAMETERS = tuple(name for name in all_knobs() if name != "bq")
"""Fields of a schedule that are free: ``bq`` follows from the rows that the simdgroups own."""
PREDICTED = 24
"""Modelled results whose whole space is predicted for a report; each takes half a second."""
MILESTONES = (1, 5, 15, 25, 50, 100, 200, 500, 1000)
"""Numbers of measurements for which a page says how good the best was."""


@dataclass(frozen=True)
class Result:
    """The rows of one problem on one chip, of one provenance, one policy and one set of templates.

    Args:
        problem, chip, cores, device, provenance, template_hashes, policy: what they share.
        rows: in the order in which they were committed, where the sources tell.
        notes: of the latest run that took part in them.
        current: whether the present templates made them; others are never dispatched.
        predict: whether `landscape` may ask the chip model about the whole space.
    """

    problem: Problem
    chip: str
    cores: int
    device: str
    provenance: str
    template_hashes: tuple[str, ...]
    policy: str
    rows: tuple[Measurement, ...]
    notes: Notes
    current: bool
    predict: bool = False

    @functools.cached_property
    def ran(self) -> list[Measurement]:
        """Rows that have a time, the best first (`metalgen.database.winners`)."""
        return [m for m in ordered(self.rows) if m.status == "ok" and m.seconds]

    @functools.cached_property
    def times(self) -> dict[Schedule, float]:
        """Seconds of every schedule that ran, of its final where it has one."""
        times: dict[Schedule, float] = {}
        for m in self.ran:
            times.setdefault(m.schedule, m.seconds or math.inf)
        return times

    @functools.cached_property
    def failed(self) -> dict[str, int]:
        """How many schedules have no time, by status."""
        statuses = {m.schedule: m.status for m in self.rows if m.status != "ok"}
        return dict(sorted(Counter(statuses.values()).items()))

    @functools.cached_property
    def finals(self) -> list[Measurement]:
        """Rows of the final race that have a time, the quicker first."""
        finals = [m for m in self.ran if m.phase == "final"]
        return sorted(finals, key=lambda m: (m.seconds or 0.0, m.schedule.key))

    @functools.cached_property
    def searched(self) -> list[Measurement]:
        """Rows of the search, failed ones too, in the order of `rows`."""
        return [m for m in self.rows if m.phase == "search"]

    @functools.cached_property
    def winner(self) -> Measurement | None:
        """The best checked row by rank; without one, the best that ran; None where none did.

        Of finals, those that lead the default by no more than the noise rank behind it.
        """
        return next((m for m in self.ran if m.verified), self.ran[0] if self.ran else None)

    @functools.cached_property
    def default(self) -> Schedule | None:
        """The default schedule; None for a chip that metalgen does not know."""
        from metalgen.chips import get_chip

        try:
            limits = get_chip(self.chip).limits
            return default_schedule(self.problem.config, limits, self.problem.family)
        except MetalgenError:
            return None

    @functools.cached_property
    def default_seconds(self) -> float | None:
        """The default schedule's time: of the winner's own race, else of its own row."""
        if self.winner and self.winner.default_seconds:
            return self.winner.default_seconds
        return self.times.get(self.default) if self.default else None

    @functools.cached_property
    def mlx_seconds(self) -> float | None:
        """MLX's own attention in the winner's race; None where it did not take part."""
        return self.winner.mlx_seconds if self.winner else None

    @functools.cached_property
    def landscape(self) -> dict[Schedule, float]:
        """Seconds of every schedule there is a time for.

        For modelled rows that the present chip model made: of every valid schedule, predicted
        anew, because a database keeps only the best of them.
        """
        return (self._predicted() if self.predict else None) or self.times

    @property
    def whole(self) -> bool:
        """Whether `landscape` is the chip model's whole space, and not the rows alone."""
        return self.landscape is not self.times

    def _predicted(self) -> dict[Schedule, float] | None:
        from metalgen.chips import get_chip
        from metalgen.families import enumerate_valid
        from metalgen.tuning.search.ranking import rank
        from metalgen.tuning.sessions.modelled import model_version

        try:
            if json.loads(self.policy)["model"] != model_version():
                return None
            chip = get_chip(self.chip)
            valid = enumerate_valid(self.problem.config, chip.limits, self.problem.family)
            return {schedule: t for t, schedule in rank(self.problem, valid, chip)}
        except (MetalgenError, ValueError, TypeError, KeyError, RecursionError):
            return None  # another policy than ours, or a chip that the model does not know

    @property
    def gain(self) -> float | None:
        """How many times as fast as the default schedule the winner is."""
        return _ratio(self.default_seconds, self.winner)

    @property
    def against_mlx(self) -> float | None:
        """How many times as fast as MLX's own attention the winner is."""
        return _ratio(self.mlx_seconds, self.winner)

    @property
    def ordered(self) -> bool:
        """Whether the search's rows are in the order in which they were measured."""
        rows = self.searched
        return bool(rows) and all(m.run not in ORDERLESS for m in rows)


def _ratio(seconds: float | None, winner: Measurement | None) -> float | None:
    return seconds / winner.seconds if seconds and winner and winner.seconds else None


def results(sources: Sources) -> list[Result]:
    """The results of some rows: measured before modelled, the present templates first, by gain."""
    current = present_templates()
    groups: dict[tuple[object, ...], list[Measurement]] = {}
    for m in sources.rows:
        templates = "" if m.template_hash in current else m.template_hash  # several kinds'
        key = (m.provenance, m.chip, m.cores, m.problem.key, m.device, templates, m.policy)
        groups.setdefault(key, []).append(m)
    found = []
    for rows in groups.values():
        first = rows[0]
        runs = dict.fromkeys(m.run for m in sorted(rows, key=lambda m: m.created, reverse=True))
        noted = [sources.notes.get((run, first.problem.key)) for run in runs]
        found.append(
            Result(
                *(first.problem, first.chip, first.cores, first.device, first.provenance),
                *(tuple(sorted({m.template_hash for m in rows})), first.policy, tuple(rows)),
                next((notes for notes in noted if notes), Notes()),
                first.template_hash in current,
            )
        )
    found.sort(key=_place)
    modelled = [n for n, r in enumerate(found) if r.provenance == "modelled" and r.current]
    for n in modelled[:PREDICTED]:
        found[n] = dataclasses.replace(found[n], predict=True)
    return found


def _place(r: Result) -> tuple[object, ...]:
    p = r.problem
    sizes = (p.config.head_dim, p.config.key, p.batch_heads, p.q_len, p.kv_len)
    rest = (r.chip, [*tuned_families()].index(p.family), *sizes, r.policy, r.cores)
    return (r.provenance, not r.current, -(r.gain or 0.0), *rest)


# Progress


@dataclass(frozen=True)
class Step:
    """One measurement of a search.

    Args:
        number: from 1.
        seconds: None where it failed.
        best: seconds of the best so far; None where none has run.
    """

    number: int
    seconds: float | None
    best: float | None


def steps(result: Result) -> list[Step]:
    """The search, measurement by measurement; empty where the order is not known."""
    found: list[Step] = []
    best: float | None = None
    for number, m in enumerate(result.searched if result.ordered else (), 1):
        seconds = m.seconds if m.status == "ok" else None
        best = min((t for t in (best, seconds) if t is not None), default=None)
        found.append(Step(number, seconds, best))
    return found


@dataclass(frozen=True)
class Draw:
    """The best of ``number`` schedules drawn at random: seconds at the quantiles .1, .5 and .9."""

    number: int
    low: float | None
    middle: float | None
    high: float | None


def drawn(times: Sequence[float | None], numbers: Sequence[int]) -> list[Draw]:
    """What drawing without replacement from measured schedules would find.

    Exact: the best of n out of N is worse than the k-th best with the probability
    C(N - k, n) / C(N, n).

    Args:
        times: seconds of every schedule; None for one that failed.
        numbers: of draws, from 1 to ``len(times)``.
    """
    total = len(times)
    ran = sorted(t for t in times if t is not None)

    def quantile(number: int, share: float) -> float | None:
        low, high = 1, total - number + 1  # at the latest this rank is certain
        while low < high:
            rank = (low + high) // 2
            if 1.0 - _none_of_best(total, rank, number) >= share:
                high = rank
            else:
                low = rank + 1
        return ran[low - 1] if low <= len(ran) else None

    return [Draw(n, quantile(n, 0.1), quantile(n, 0.5), quantile(n, 0.9)) for n in numbers]


def _none_of_best(total: int, rank: int, number: int) -> float:
    """The probability that `number` draws out of `total` miss the best `rank`."""
    if number > total - rank:
        return 0.0

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    return math.exp(log_choose(total - rank, number) - log_choose(total, number))


def milestones(total: int, numbers: Sequence[int] = MILESTONES) -> list[int]:
    """The numbers of measurements to tell of, up to `total` itself."""
    return [*(n for n in numbers if n < total), total]


# Parameters


def importances(times: Mapping[Schedule, float]) -> list[tuple[str, float]]:
    """Shares of the parameters in what sets the best tenth apart, the greatest first.

    PED-ANOVA (Watanabe, Bansal, Hutter: PED-ANOVA, IJCAI 2023) as Optuna has it. Empty for fewer
    than `LEAST_ROWS` times, or where no parameter differs. Of more than `MOST_ROWS` times every
    n-th in their order is taken.
    """
    if len(times) < LEAST_ROWS:
        return []
    ordered = sorted(times, key=lambda s: (times[s], s.key))
    times = {s: times[s] for s in ordered[:: -(-len(ordered) // MOST_ROWS)]}
    import optuna
    from optuna.distributions import CategoricalDistribution
    from optuna.trial import create_trial

    choices: dict[str, list[str]] = {}
    for name in PARAMETERS:  # as texts: what is compared is whether two values are the same
        values = sorted({getattr(s, name) for s in times if name in s.knobs})
        if len(values) > 1:
            choices[name] = [str(value) for value in values]
    if not choices:
        return []
    distributions = {name: CategoricalDistribution(values) for name, values in choices.items()}
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="minimize")
        study.add_trials(
            create_trial(
                params={name: str(getattr(schedule, name)) for name in choices},
                distributions=distributions,  # type: ignore[arg-type]
                value=seconds,
            )
            for schedule, seconds in times.items()
        )
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    finally:
        optuna.logging.set_verbosity(verbosity)
    found = [(name, float(share)) for name, share in shares.items() if math.isfinite(share)]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


@dataclass(frozen=True)
class Cell:
    """The schedules that agree in two fields.

    Args:
        seconds: of the best; None where none ran.
        schedule: the best.
        tried, failed: how many there are, and how many of them failed.
    """

    seconds: float | None
    schedule: Schedule | None
    tried: int
    failed: int


@dataclass(frozen=True)
class HeatMap:
    """The best time for each pair of values of two fields, whatever the rest."""

    row: str
    column: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    cells: Mapping[tuple[int, int], Cell]


def heat_maps(result: Result) -> Iterator[HeatMap]:
    """BQ against BK; for decode with several numbers of splits, splits against BK too."""
    times = result.landscape
    failed = {m.schedule for m in result.rows if m.status != "ok"} - times.keys()
    schedules = [*times, *failed]
    for row in ("bq", "splits"):
        schedules = [s for s in schedules if row in s.knobs]
        rows = tuple(sorted({getattr(s, row) for s in schedules}))
        columns = tuple(sorted({s.bk for s in schedules}))
        if not schedules or (row == "splits" and len(rows) < 2):
            continue
        places: dict[tuple[int, int], list[Schedule]] = {}
        for s in schedules:
            places.setdefault((getattr(s, row), s.bk), []).append(s)
        cells: dict[tuple[int, int], Cell] = {}
        for place, here in places.items():
            ran = [s for s in here if s in times]
            best = min(ran, key=lambda s: (times[s], s.key), default=None)
            seconds = times[best] if best else None
            cells[place] = Cell(seconds, best, len(here), len(here) - len(ran))
        yield HeatMap(row, "bk", rows, columns, cells)
