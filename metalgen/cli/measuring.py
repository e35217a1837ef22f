"""Options of ``metalgen tune`` that say how to measure."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from metalgen.errors import ArgumentError

if TYPE_CHECKING:
    from metalgen.devices import Device


@dataclass(frozen=True)
class Measuring:
    """Options that say how to measure; None where the user gave none."""

    jobs: int | None
    time_limit: float | None
    cache: str | None
    sampler: str | None = None
    prune: bool | None = None

    def check(self, device: Device | None) -> None:
        """Raise `ArgumentError` where one was given and nothing is measured."""
        for name in ("jobs", "time_limit", "cache", "sampler", "prune"):
            if device is None and getattr(self, name) is not None:
                expected = "none when times are predicted instead of measured"
                raise ArgumentError(name, expected, getattr(self, name))
        if device:
            from metalgen.tuning.search.named import DEFAULT_SAMPLER, check_sampler
            from metalgen.tuning.workers.helpers import check_jobs

            check_jobs(self.jobs or 0, 1.0 if self.time_limit is None else self.time_limit)
            check_sampler(self.sampler or DEFAULT_SAMPLER)

    def arguments(self, device: Device | None) -> dict[str, Any]:
        """What `metalgen.tuning.runner.tune` takes of them."""
        if device is None:
            return {}
        from metalgen.tuning.search.named import DEFAULT_SAMPLER
        from metalgen.tuning.timing.measure import Policy
        from metalgen.tuning.workers.helpers import TIME_LIMIT, usual_jobs

        return {
            "jobs": usual_jobs(device) if self.jobs is None else self.jobs,
            "time_limit": TIME_LIMIT if self.time_limit is None else self.time_limit,
            "policy": Policy(cache=self.cache or "cold"),
            "sampler": self.sampler or DEFAULT_SAMPLER,
            "prune": self.prune is not False,
        }


def measuring_options(function: Any) -> Any:
    """Options about measuring; the command gets them as ``measuring``, a `Measuring`."""

    @click.option(
        "--jobs",
        type=int,
        metavar="N",
        help="Measuring: number of processes that compile ahead (0: none). Default: 1 to 8.",
    )
    @click.option(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="Measuring: seconds that one compilation or launch may take. Default: 60.",
    )
    @click.option(
        "--cache",
        type=click.Choice(["cold", "warm"]),
        help="Measuring: cold uses fresh arrays for every launch, warm the same ones. "
        "Default: cold.",
    )
    @click.option(
        "--sampler",
        metavar="NAME",
        help="Measuring: sampler that suggests schedules: finite-gp (default), tpe, "
        "gp, cmaes, random, "
        "brute-force, or module:Class.",
    )
    @click.option(
        "--prune/--no-prune",
        default=None,
        help="Measuring: end a measurement as soon as it cannot win. Default: --prune.",
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any,
        jobs: int | None,
        time_limit: float | None,
        cache: str | None,
        sampler: str | None,
        prune: bool | None,
        **kwargs: Any,
    ) -> Any:
        measuring = Measuring(jobs, time_limit, cache, sampler, prune)
        return function(*args, measuring=measuring, **kwargs)

    return wrapper
