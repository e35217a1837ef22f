"""Worker processes that verify items side by side, and may crash or hang.

MLX compiles under one lock, so only processes compile side by side. A worker that crashes, exceeds
the time limit or fails at run time is replaced: a launch failure leaves a CUDA context unusable.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

from metalgen.devices import Device
from metalgen.verification.items import Item, items
from metalgen.verification.outcomes import Outcome, outcome_of

TIME_LIMIT = 180.0
"""Seconds that one item may take, the start of its worker included."""
END_SECONDS = 10.0
"""Seconds that a killed worker is waited for."""


@dataclass(eq=False)
class Worker:
    """A process, the channel to it, the number of the item that it runs, and since when."""

    process: Any
    channel: Any
    number: int
    begin: float


def side_by_side(
    device: Device,
    todo: list[Item],
    jobs: int,
    *,
    full: bool = False,
    begun: Callable[[Item], None] = lambda item: None,
    time_limit: float = TIME_LIMIT,
) -> Iterator[tuple[int, Outcome]]:
    """Outcomes of items as they are found, each with its number in the list.

    Args:
        device: what executes the kernels; it is pickled.
        todo: what `metalgen.verification.items.items` yields for the device and `full`.
        jobs: worker processes.
        full: as of `items`.
        begun: told of each item as it is handed out.
        time_limit: seconds after which an item's worker is ended.
    """
    waiting = deque(range(len(todo)))
    free: list[Worker] = []
    busy: list[Worker] = []
    context = mp.get_context("spawn")
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                number = waiting.popleft()
                worker = free.pop() if free else _start(context, device, full)
                worker.number, worker.begin = number, time.perf_counter()
                begun(todo[number])
                with suppress(OSError):  # it is gone: its channel's end says so below
                    worker.channel.send(number)
                busy.append(worker)
            ready = connection.wait([w.channel for w in busy], timeout=1.0)
            for worker in list(busy):
                outcome = _answer(worker, todo[worker.number], worker.channel in ready, time_limit)
                if outcome is None:
                    continue
                busy.remove(worker)
                if outcome.status in ("runtime", "timeout"):
                    _end(worker)
                else:
                    free.append(worker)
                yield worker.number, outcome
    finally:
        for worker in free + busy:
            _end(worker)


def _answer(worker: Worker, item: Item, ready: bool, time_limit: float) -> Outcome | None:
    """What a worker found; None while it is at work."""
    seconds = time.perf_counter() - worker.begin
    if ready:
        try:
            found: Outcome = worker.channel.recv()
        except (EOFError, OSError):
            worker.process.join(END_SECONDS)
            detail = f"the process ended, with exit code {worker.process.exitcode}"
            return Outcome.failed(item, "runtime", detail, seconds)
        return found
    if seconds > time_limit:
        return Outcome.failed(item, "timeout", f"it took more than {time_limit:.0f} s", seconds)
    return None


def _start(context: Any, device: Device, full: bool) -> Worker:
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, device, full), daemon=True)
    # Workers inherit that Ctrl-C is held back: it is the parent's, which ends them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        theirs.close()
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return Worker(process, ours, -1, time.perf_counter())


def _end(worker: Worker) -> None:
    worker.process.kill()
    worker.process.join(END_SECONDS)
    worker.channel.close()


def _serve(channel: Any, device: Device, full: bool) -> None:
    """Run the items whose numbers come, until the channel is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    todo = list(items(device, full=full))
    with suppress(EOFError, OSError):  # the parent is done
        while True:
            channel.send(outcome_of(todo[channel.recv()], device))


def _end_with_parent() -> None:
    """End this process when its parent is gone, whatever it is doing."""
    parent = mp.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
