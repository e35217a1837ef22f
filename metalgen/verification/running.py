"""Running a verification, and what is kept of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from metalgen.calls.check import CannotCheck, first_line
from metalgen.calls.resolve import get_kernel
from metalgen.devices import Device
from metalgen.errors import MetalgenError
from metalgen.problem.config import AttentionConfig
from metalgen.tuning.workers.helpers import check_jobs
from metalgen.verification.items import Item, items, types_of
from metalgen.verification.outcomes import Outcome, outcome_of
from metalgen.verification.workers import side_by_side

CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window of 1,024": {"causal": True, "window_left": 1023},
    "softcap": {"causal": True, "softcap": 50.0},
    "sinks": {"causal": True, "sinks": True},
    "ALiBi": {"causal": True, "alibi": True},
    "boolean mask": {"array_mask": True},
    "bias": {"bias": True},
    "packed": {"causal": True, "varlen": True},
    "pages": {"causal": True, "kv_lens": True, "page_size": 16},
    "8-bit keys and values": {"causal": True, "kv_bits": 8, "kv_group": 64},
}
"""Calls of which a verification says what computes them."""
FEWEST_PROCESSORS = 4
"""Processors from which on worker processes are started by default."""
SPARE_PROCESSORS = 2
"""Processors that stay free then."""
MOST_WORKERS = 16
"""Worker processes that are started by default at most: each keeps a context on a GPU."""


@dataclass
class Report:
    """Everything that a verification found on one device.

    Args:
        device: its name.
        full: whether everything was to be run.
        total: how many items there were to run.
        outcomes: of the items that ran, in their order.
        calls: by the names of `CALLS`, what computes such a call and why.
        interrupted: whether the user ended it.
        seconds: that it took.
    """

    device: str
    full: bool
    total: int
    outcomes: list[Outcome] = field(default_factory=list)
    calls: dict[str, dict[str, str]] = field(default_factory=dict)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def faults(self) -> list[Outcome]:
        """What was not right."""
        return [outcome for outcome in self.outcomes if outcome.status != "ok"]

    def groups(self) -> dict[str, list[Outcome]]:
        """Outcomes by group."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.group, []).append(outcome)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        fields = asdict(self)
        fields["faults"] = len(self.faults)
        return fields


Observer = Callable[[Report, Item], None]
"""Told of each item before it runs, with what was found so far."""


def verify_device(
    device: Device,
    *,
    full: bool = False,
    jobs: int | None = None,
    observe: Observer = lambda report, item: None,
) -> Report:
    """Check a device's kernels against the float64 reference, and say what computes its calls.

    Ctrl-C ends it; what was found until then is kept.

    Args:
        device: one that is available here.
        full: everything (an hour on a simulator); else about a minute.
        jobs: worker processes, 0 to 64; each compiles, executes and compares kernels of its
            own. With 0, everything happens in this process. Default: where the device compiles and
            there are four or more processors, two fewer than those and at most 16; else 0.
        observe: told of progress.

    Raises:
        CannotCheck: the device cannot compute anything at all.
        ArgumentError: jobs is something else.
    """
    begin = time.perf_counter()
    jobs = usual_workers(device) if jobs is None else check_jobs(jobs, 1.0)[0]
    todo = list(items(device, full=full))
    report = Report(device.name, full, len(todo))
    found: dict[int, Outcome] = {}
    try:
        for number, outcome in _outcomes(device, todo, jobs, full, partial(observe, report)):
            found[number] = outcome
            report.outcomes = [found[n] for n in sorted(found)]
        report.calls = calls(device)
    except KeyboardInterrupt:
        report.interrupted = True
    report.seconds = time.perf_counter() - begin
    return report


def usual_workers(device: Device) -> int:
    """How many worker processes verify a device unless told otherwise; 0: none but this one.

    More than compile in a tuning run: nothing is timed, so nothing waits for the device to be idle.
    """
    processors = os.cpu_count() or 1
    if device.language is None or processors < FEWEST_PROCESSORS:
        return 0
    return min(MOST_WORKERS, processors - SPARE_PROCESSORS)


def _outcomes(
    device: Device, todo: list[Item], jobs: int, full: bool, begun: Callable[[Item], None]
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of items as they are found, each with its number."""
    if jobs:
        yield from side_by_side(device, todo, jobs, full=full, begun=begun)
        return
    for number, item in enumerate(todo):
        begun(item)
        yield number, outcome_of(item, device)


def calls(device: Device, names: Iterable[str] = CALLS) -> dict[str, dict[str, str]]:
    """What computes calls of a device, by the names of `CALLS`: the backend, and why it does.

    Each is a prefill of 1,024 queries of 32 heads with D=128, in the first type of the device.
    """
    found = {}
    for name in names:
        config = AttentionConfig(128, types_of(device)[0], heads_per_kv=4, **CALLS[name])
        try:
            kernel = get_kernel(config, device=device.name)
        except (CannotCheck, MetalgenError) as error:
            found[name] = {"backend": "none", "why": first_line(error)}
            continue
        found[name] = {"backend": kernel.backend, "why": kernel.path[-1]}
    return found
