"""Running a verification, and what is kept of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from metalgen.calls.check import CannotCheck, failure_status, first_line
from metalgen.calls.resolve import get_kernel
from metalgen.devices import Device
from metalgen.errors import MetalgenError
from metalgen.problem.config import AttentionConfig
from metalgen.verification.items import Item, items, types_of

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


@dataclass(frozen=True)
class Outcome:
    """What came of one item.

    Args:
        group, name: the item's.
        status: ``"ok"``, ``"wrong"``, or why it did not run: ``"invalid"``, ``"compile"``,
            ``"runtime"`` or ``"timeout"``.
        error: relative error of the output; None where there is none.
        tolerance: the largest that is allowed.
        shape: what was run.
        detail: what is wrong, or empty.
        seconds: that it took, compilation included.
    """

    group: str
    name: str
    status: str
    error: float | None
    tolerance: float | None
    shape: str
    detail: str
    seconds: float


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
    device: Device, *, full: bool = False, observe: Observer = lambda report, item: None
) -> Report:
    """Check a device's kernels against the float64 reference, and say what computes its calls.

    Ctrl-C ends it; what was found until then is kept.

    Args:
        device: one that is available here.
        full: everything (an hour on a simulator); else about a minute.
        observe: told of progress.

    Raises:
        CannotCheck: the device cannot compute anything at all.
    """
    begin = time.perf_counter()
    todo = list(items(device, full=full))
    report = Report(device.name, full, len(todo))
    try:
        for item in todo:
            observe(report, item)
            report.outcomes.append(_outcome(item, device))
        report.calls = calls(device)
    except KeyboardInterrupt:
        report.interrupted = True
    report.seconds = time.perf_counter() - begin
    return report


def _outcome(item: Item, device: Device) -> Outcome:
    begin = time.perf_counter()
    try:
        found = item.run(device)
    except (MetalgenError, RuntimeError, ValueError, MemoryError) as error:
        status = failure_status(error)
        seconds = time.perf_counter() - begin
        return Outcome(item.group, item.name, status, None, None, "", first_line(error), seconds)
    seconds = time.perf_counter() - begin
    largest = found.error if math.isfinite(found.error) else None
    status = "ok" if found.ok else "wrong"
    return Outcome(
        *(item.group, item.name, status, largest, found.tolerance),
        *(found.shape, found.detail, seconds),
    )


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
