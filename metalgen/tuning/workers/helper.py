"""A helper process of a tuning run: compiles, times and checks what it is told to.

The parent sends ``(operation, *arguments)``; answers are tuples whose first member says what they
are: ``ready``; ``waiting`` (for the device, so that no limit runs) and ``beat`` (a sign of life);
``sample`` with its number and time, after which the helper waits to hear whether it is the last;
at the end of an operation ``done`` with its value, ``failed`` with a status and a detail,
``no room`` with the reason, where the problem is too large, or ``cannot`` with the reason, where
the failure says nothing about the kernel either.
"""

from __future__ import annotations

import os
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.process import parent_process
from pathlib import Path
from typing import Any

from metalgen.calls.check import CannotCheck, NoRoom, failure_status, first_line, require_working
from metalgen.devices import Device
from metalgen.errors import DeviceError, InvalidSchedule, MetalgenError
from metalgen.tuning.timing.measure import Policy
from metalgen.tuning.workers.executing import Here

BEAT = 0.25
"""Seconds between two signs of life, at least."""


def serve(
    channel: Connection[Any, Any], device: Device, policy: Policy, lock: Path | None, log: Path
) -> None:
    """Obey the parent until it closes the channel, or ends."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):  # a crash's last words, for the row; the terminal is the parent's
        os.dup2(file, stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    last = 0.0

    def beat() -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= BEAT:
            channel.send(("beat",))
            last = now

    def waiting() -> None:
        nonlocal last
        channel.send(("waiting",))
        last = 0.0

    def stop(number: int, seconds: float) -> bool:
        channel.send(("sample", number, seconds))
        return bool(channel.recv())

    try:
        _begin(device)
        here = Here(device, policy, lock=lock, waiting=waiting, beat=beat, keep=False)
        channel.send(("ready",))
        while True:
            operation, *arguments = channel.recv()
            last = 0.0
            if operation == "measure":
                *arguments, stoppable = arguments
                arguments.append(stop if stoppable else None)
            channel.send(_answer(here, operation, arguments))
    except (EOFError, OSError):  # the parent is done
        return
    except MetalgenError as error:
        channel.send(("cannot", str(error)))


def _begin(device: Device) -> None:
    """Whatever takes long once, before the first time limit runs; shows that the device works."""

    device.require()
    require_working(device)


def _answer(here: Here, operation: str, arguments: list[Any]) -> tuple[Any, ...]:
    try:
        if operation == "check":
            return "done", here.verify(here.device, *arguments)
        return "done", getattr(here, operation)(*arguments)
    except NoRoom as error:
        return "no room", str(error)
    except (MetalgenError, RuntimeError, ValueError, MemoryError) as error:
        try:
            status = failure_status(error)
        except CannotCheck as reason:
            return "cannot", str(reason)
        if not isinstance(error, InvalidSchedule):
            try:
                require_working(here.device)
            except DeviceError:  # whatever it failed with: nothing else runs in this process
                status = "runtime"
        return "failed", status, first_line(error)
    except Exception as error:  # a defect of ours, and no kernel's
        return "cannot", f"{type(error).__name__}: {error}"


def _end_with_parent() -> None:
    """End this process when its parent is gone, whatever it is doing."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
