"""Whether a kernel may run: by a check on record, or by one now."""

from __future__ import annotations

from metalgen.database.lookup import checked
from metalgen.devices import Device
from metalgen.errors import DeviceError, MetalgenError
from metalgen.families import Schedule
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import template_hash


def passes(
    device: Device,
    config: AttentionConfig,
    schedule: Schedule,
    path: list[str],
) -> bool:
    """Whether a kernel was checked on this device; checks it, and records that, if it never was.

    Args:
        device: what executes it.
        config, schedule: the kernel.
        path: takes in what was found.
    """
    kernel = (config, schedule, template_hash(schedule))
    status = checked(*kernel, device=device.name, family=schedule.family)
    if status is not None:
        path.append(f"check on {device.name}: {status}, on record")
        return status == "ok"
    from metalgen.calls.check import CannotCheck, record_check, run_check

    try:
        check = run_check(device, config, schedule)
    except (CannotCheck, DeviceError) as problem:  # the next process tries again
        path.append(f"check on {device.name}: not possible now: {problem}")
        return False
    path.append(
        f"check on {device.name}: {check.status} now"
        + (f", relative error {check.error:.1e}" if check.error is not None else "")
        + (f" of {check.tolerance:.0e}" if check.tolerance is not None else "")
        + (f" ({check.detail})" if check.detail else "")
    )
    try:
        from metalgen.database.store import Store

        with Store.open(busy=1.0) as store:
            record_check(store, check)
    except (MetalgenError, OSError) as problem:
        path.append(f"the check could not be recorded: {problem}")
    return check.ok
