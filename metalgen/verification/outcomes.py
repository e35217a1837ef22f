"""What comes of one item of a verification."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from metalgen.calls.check import failure_status, first_line
from metalgen.devices import Device
from metalgen.errors import MetalgenError
from metalgen.verification.items import Item


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

    @classmethod
    def failed(cls, item: Item, status: str, detail: str, seconds: float) -> Outcome:
        """The outcome of an item that has no result."""
        return cls(item.group, item.name, status, None, None, "", detail, seconds)


def outcome_of(item: Item, device: Device) -> Outcome:
    """Execute an item in this process and compare it with its reference."""
    begin = time.perf_counter()
    try:
        found = item.run(device)
    except (MetalgenError, RuntimeError, ValueError, MemoryError) as error:
        seconds = time.perf_counter() - begin
        return Outcome.failed(item, failure_status(error), first_line(error), seconds)
    seconds = time.perf_counter() - begin
    largest = found.error if math.isfinite(found.error) else None
    status = "ok" if found.ok else "wrong"
    return Outcome(
        *(item.group, item.name, status, largest, found.tolerance),
        *(found.shape, found.detail, seconds),
    )
