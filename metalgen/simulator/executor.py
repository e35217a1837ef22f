"""Runs compiled kernels in child processes that stay warm, and survives whatever they do.

The caller lays out a launch's buffers in one ``LaunchMemory``, then calls ``execute``. A child that
crashes, hangs or eats memory is ended and replaced; the calling process only sees an exception.
Safe with several Python threads and after ``fork``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metalgen.simulator import errors
from metalgen.simulator.launch_limits import Limits, current_limits
from metalgen.simulator.memory import REPORT_HEADER, LaunchMemory

WORKER = Path(__file__).with_name("_worker.py")
MOST_LIBRARIES = 12
"""Kernels that a child process loads before a fresh one takes its place.

Each keeps its stacks mapped, 4 mappings a thread of a threadgroup; Linux allows 65,530.
"""


class Worker:
    """One child process and the socket to it."""

    def __init__(self) -> None:
        self.libraries = 0
        if not sys.executable:
            raise errors.SimulatorError(
                "the simulator starts Python child processes, and sys.executable is empty here"
            )
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(WORKER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches the caller, which then ends the child
            )
        except OSError as error:
            self.channel.close()
            raise errors.SimulatorError(f"cannot start a child process: {error}") from error
        finally:
            theirs.close()

    def send(self, request: dict[str, Any], fd: int) -> None:
        body = marshal.dumps(request)
        socket.send_fds(self.channel, [len(body).to_bytes(8, "little")], [fd])
        self.channel.sendall(body)

    def receive(self) -> dict[str, Any] | None:
        """Read the answer that is ready; None when the child is gone."""
        try:
            size = int.from_bytes(self._exactly(8), "little")
            return marshal.loads(self._exactly(size))  # type: ignore[no-any-return]
        except (EOFError, ConnectionError):
            return None

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.channel.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def interrupt(self) -> None:
        """Stop the kernel where it is: the runtime notes line and thread, and the child ends."""
        self.process.send_signal(signal.SIGTRAP)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=1)

    def end(self) -> int:
        """Kill and reap the child; return its exit status (negative: a signal)."""
        self.channel.close()
        self.process.kill()
        return self.process.wait()

    def leave(self) -> None:
        """Let an idle child end by itself, and reap it."""
        self.channel.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.end()


class Pool:
    """Idle workers, shared by all threads of this process."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.idle: list[Worker] = []
        self.busy: set[Worker] = set()

    @contextlib.contextmanager
    def borrow(self, wanted: int) -> Iterator[list[Worker]]:
        """Lend one to ``wanted`` workers, and wait while all of them are at work.

        The borrower removes what it had to end from the list that it was given.
        """
        most = max(1, current_limits().workers)
        with self.lock:
            while not self.idle and len(self.busy) >= most:
                self.lock.wait()
            self._bury()
            room = max(1, most - len(self.busy))
            while len(self.idle) < min(wanted, room):
                self.idle.append(Worker())
            lent = [self.idle.pop() for _ in range(min(wanted, len(self.idle)))]
            self.busy.update(lent)
        everything = list(lent)
        try:
            yield lent
        finally:
            with self.lock:
                self.busy.difference_update(everything)
                self.idle.extend(worker for worker in lent if worker.libraries < MOST_LIBRARIES)
                self.lock.notify_all()
            for worker in lent:
                if worker.libraries >= MOST_LIBRARIES:
                    worker.leave()

    def _bury(self) -> None:
        """Reap idle workers that something else ended meanwhile."""
        for worker in self.idle[:]:
            if worker.process.poll() is not None:
                self.idle.remove(worker)
                worker.channel.close()

    def close(self) -> None:
        """Let all idle children end; at exit, where another Ctrl-C only hurries them."""
        with self.lock:
            idle, self.idle = self.idle, []
        for worker in idle:
            try:
                worker.leave()
            except KeyboardInterrupt:
                worker.end()

    def abandon(self) -> None:
        """Forget workers that belong to the process that this one was forked from."""
        for worker in [*self.idle, *self.busy]:
            worker.channel.close()
            worker.process.returncode = 0  # not ours to wait for
        self.__init__()  # type: ignore[misc]


_pool = Pool()
atexit.register(_pool.close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.abandon)


@dataclass(frozen=True)
class Job:
    """What to run: a compiled library, its launch grid in threads, and how."""

    library: str
    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    checked: bool = False
    seed: int = 0
    threadgroup_bytes: tuple[int, ...] = ()

    @property
    def groups(self) -> int:
        """Threadgroups in the grid; the last one along an axis may be partial."""
        count = 1
        for extent, size in zip(self.grid, self.threadgroup, strict=True):
            count *= -(-extent // size)
        return count

    @property
    def threads(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


@dataclass(frozen=True)
class Outcome:
    """What a finished process says: ``code`` of ``mg_run`` and its ``report`` (no header)."""

    code: int
    seconds: float
    report: bytes


@dataclass(frozen=True)
class Failure:
    """How a process failed to finish: ``signal`` number, or ``timeout``, with what it reported."""

    timeout: bool
    signal: int
    report: bytes
    finished_groups: int
    mapping: int


class ProcessFailed(Exception):
    """Internal: carries a ``Failure`` from ``execute`` to the caller that can name its cause."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


def processes_for(job: Job) -> int:
    """Return how many processes the job is worth.

    A checked run stays in one process, because races between threadgroups are found in a shadow
    that one process keeps. A small one does too: handing work over costs about 0.1 ms.
    """
    most = current_limits().workers
    if job.checked or job.groups < 4 or job.threads < 2048:
        return 1
    return min(most, job.groups // 2)


def execute(job: Job, memory: LaunchMemory, reports: int) -> list[Outcome]:
    """Run ``job`` on up to ``reports`` processes and return what each reported.

    Raises ``ProcessFailed`` when one crashed or ran out of time, ``MemoryLimit`` when it could
    not map or allocate, ``SimulatorError`` when it could not load the library.
    """
    rules = current_limits()
    with _pool.borrow(reports) as workers:
        used = list(workers)
        try:
            for index, worker in enumerate(used):
                _send(worker, _request(job, memory, index, len(used), rules), memory.fd)
            answers = _wait(used, workers, memory, rules.seconds)
        except BaseException:
            for worker in used:
                if worker in workers:
                    workers.remove(worker)
                    worker.end()
            raise
    outcomes = []
    for index, answer in enumerate(answers):
        if "memory" in answer:
            raise errors.MemoryLimit(f"kernel {job.kernel}: {answer['memory']}")
        if "error" in answer:
            raise errors.SimulatorError(f"kernel {job.kernel}: {answer['error']}")
        report = memory.report(index)[REPORT_HEADER:]
        outcomes.append(Outcome(answer["code"], answer["seconds"], report))
    return outcomes


def _request(
    job: Job, memory: LaunchMemory, index: int, count: int, rules: Limits
) -> dict[str, Any]:
    return {
        "library": job.library,
        "segments": memory.table(index),
        "checked": job.checked,
        "grid": job.grid,
        "threadgroup": job.threadgroup,
        "first_group": index,
        "end_group": job.groups,
        "step": count,
        "stack_bytes": rules.stack_bytes,
        "seed": job.seed,
        "threadgroup_bytes": job.threadgroup_bytes,
        "time_limit": rules.seconds,
        "memory_limit": rules.memory,
    }


def _send(worker: Worker, request: dict[str, Any], fd: int) -> None:
    try:
        worker.send(request, fd)
    except ConnectionError as error:
        raise errors.WorkerLost(
            f"the child process ended while idle (status {worker.process.poll()})"
        ) from error


def _wait(
    used: list[Worker], lent: list[Worker], memory: LaunchMemory, seconds: float
) -> list[dict[str, Any]]:
    answers: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + seconds
    poll = select.poll()
    index_of = {}
    for index, worker in enumerate(used):
        poll.register(worker.channel, select.POLLIN)
        index_of[worker.channel.fileno()] = index
    while len(answers) < len(used):
        left = deadline - time.monotonic()
        ready = poll.poll(max(0.0, left) * 1000)
        if not ready and left <= 0:
            late = next(index for index in range(len(used)) if index not in answers)
            used[late].interrupt()
            raise ProcessFailed(_failure(memory, late, timeout=True))
        for fd, _ in ready:
            index = index_of[fd]
            poll.unregister(fd)
            answer = used[index].receive()
            if answer is None:
                lent.remove(used[index])
                status = used[index].end()
                if -status == signal.SIGALRM:
                    raise ProcessFailed(_failure(memory, index, timeout=True))
                raise ProcessFailed(_failure(memory, index, signal_number=max(0, -status)))
            answers[index] = answer
            used[index].libraries = answer.get("libraries", 0)
    return [answers[index] for index in range(len(used))]


def _failure(
    memory: LaunchMemory, index: int, *, timeout: bool = False, signal_number: int = 0
) -> Failure:
    report = memory.report(index)
    finished, mapping = (ctypes.c_uint64 * 2).from_buffer_copy(report)
    return Failure(timeout, signal_number, report[REPORT_HEADER:], finished, mapping)
