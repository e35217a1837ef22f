"""The process that executes kernels: maps shared buffers, calls ``mg_run``, answers.

Started by ``executor.py`` as a bare script (``-I -S``) so that it imports neither metalgen nor
MLX and is ready in a few hundredths of a second. It speaks over the socket whose descriptor is
its only argument: length-prefixed ``marshal`` messages, the launch's memory attached to each.
It ends when the socket closes.
"""

from __future__ import annotations

import array
import ctypes
import marshal
import mmap
import os
import signal
import socket
import sys
import time

TYPE_CHECKING = False  # typing itself would double the time to start
if TYPE_CHECKING:
    from typing import Any

try:
    import resource
except ImportError:  # pragma: no cover - not a Unix system
    resource = None  # type: ignore[assignment]

PAGE = mmap.PAGESIZE
GUARD = 1 << 20
"""Bytes kept free on each side of a buffer: inaccessible, or a red zone in checked mode."""

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED = 1, 2, 0x10
MAP_ANONYMOUS = 0x1000 if sys.platform == "darwin" else 0x20
MAP_NORESERVE = 0x40 if sys.platform == "darwin" else 0x4000
MAP_FAILED = ctypes.c_void_p(-1).value


class Buffer(ctypes.Structure):
    """``mg_buffer`` of the runtime."""

    _fields_ = [
        ("base", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("lead", ctypes.c_uint64),
    ]


class Launch(ctypes.Structure):
    """``mg_launch`` of the runtime."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("first_group", ctypes.c_uint64),
        ("end_group", ctypes.c_uint64),
        ("step", ctypes.c_uint64),
        ("buffer_count", ctypes.c_uint32),
        ("buffers", ctypes.POINTER(Buffer)),
        ("fibre_stack_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("report", ctypes.c_void_p),
        ("report_bytes", ctypes.c_uint64),
        ("progress", ctypes.c_void_p),
        ("threadgroup_bytes", ctypes.c_uint32 * 31),
    ]


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


LIBC = _libc()


def pages(size: int) -> int:
    """Round ``size`` up to whole pages, at least one."""
    return max(PAGE, -(-size // PAGE) * PAGE)


def map_or_raise(
    address: int | None, size: int, protection: int, flags: int, fd: int, at: int
) -> int:
    found: int = LIBC.mmap(address, size, protection, flags, fd, at)
    if found == MAP_FAILED:
        raise MemoryError(f"mmap of {size} bytes: {os.strerror(ctypes.get_errno())}")
    return found


Segment = tuple[int, int, int, int]
"""File offset, bytes, bytes before the origin, flags."""


class Mapping:
    """The buffers and the report of one launch, with guards around each buffer."""

    def __init__(self, fd: int, segments: list[Segment], checked: bool) -> None:
        self.size = GUARD + sum(pages(size) + GUARD for _, size, _, _ in segments)
        flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
        # A red zone takes the access that the checker has just reported, so the run goes on.
        around = PROT_READ | PROT_WRITE if checked else PROT_NONE
        self.start = map_or_raise(None, self.size, around, flags, -1, 0)
        self.addresses: list[int] = []
        try:
            at = self.start + GUARD
            for offset, size, _, _ in segments:
                map_or_raise(
                    at, pages(size), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset
                )
                self.addresses.append(at)
                at += pages(size) + GUARD
            LIBC.mprotect(self.start, PAGE, PROT_NONE)
            LIBC.mprotect(self.start + self.size - PAGE, PAGE, PROT_NONE)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        LIBC.munmap(self.start, self.size)


LIBRARIES: dict[str, ctypes.CDLL] = {}


def data_limit(request: dict[str, Any]) -> int:
    """Return the bytes of private memory that this process may have mapped during the launch.

    That is what it has now (kernels that were loaded before keep their stacks mapped) and what the
    launch may add. The checker maps a shadow of 32 bytes for each byte of a writable buffer, of
    which it touches only what the kernel does.
    """
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[5]) * PAGE
    limit: int = request["memory_limit"] + mapped
    if request["checked"]:
        limit += 40 * sum(size for _, size, _, flags in request["segments"] if flags & 1)
    return limit


def run(request: dict[str, Any], fd: int) -> dict[str, Any]:
    """Execute one request; the last of its ``segments`` is the report."""
    path = request["library"]
    library = LIBRARIES.get(path)
    if library is None:
        library = LIBRARIES[path] = ctypes.CDLL(path)
        library.mg_run.restype = ctypes.c_int
        library.mg_run.argtypes = [ctypes.POINTER(Launch)]
    segments = request["segments"]
    mapping = Mapping(fd, segments, request["checked"])
    try:
        *buffers, report = zip(segments, mapping.addresses, strict=True)
        table = (Buffer * max(1, len(buffers)))()
        for entry, ((_, size, lead, flags), address) in zip(table, buffers, strict=False):
            entry.base, entry.bytes = address + lead, size - lead
            entry.flags, entry.lead = flags, lead
        (_, report_bytes, _, _), report_address = report
        launch = Launch(
            grid=(ctypes.c_uint32 * 3)(*request["grid"]),
            threadgroup=(ctypes.c_uint32 * 3)(*request["threadgroup"]),
            first_group=request["first_group"],
            end_group=request["end_group"],
            step=request["step"],
            buffer_count=len(buffers),
            buffers=table,
            fibre_stack_bytes=request["stack_bytes"],
            seed=request["seed"],
            report=report_address + 64,
            report_bytes=report_bytes - 64,
            progress=report_address,
            threadgroup_bytes=(ctypes.c_uint32 * 31)(*request["threadgroup_bytes"]),
        )
        ctypes.memmove(
            report_address + 8, (ctypes.c_uint64 * 1)(mapping.start), 8
        )  # lets the parent place a fault address
        started = time.perf_counter()
        code = library.mg_run(ctypes.byref(launch))
        seconds = time.perf_counter() - started
        return {"code": code, "seconds": seconds, "libraries": len(LIBRARIES)}
    finally:
        mapping.close()


def receive(channel: socket.socket) -> tuple[dict[str, Any], int] | None:
    """Read one message and the descriptor attached to it; None when the peer is gone."""
    head, ancillary, _, _ = channel.recvmsg(8, socket.CMSG_SPACE(4))
    if not head:
        return None
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[:4])
    while len(head) < 8:
        head += channel.recv(8 - len(head)) or sys.exit(0)
    size = int.from_bytes(head, "little")
    body = bytearray()
    while len(body) < size:
        part = channel.recv(size - len(body))
        if not part:
            return None
        body += part
    return marshal.loads(bytes(body)), (fds[0] if fds else -1)


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        message = receive(channel)
        if message is None:
            return
        request, fd = message
        try:
            if resource is not None and sys.platform.startswith("linux"):
                hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
                resource.setrlimit(resource.RLIMIT_DATA, (data_limit(request), hard))
            # Should the parent die, an endless kernel must not outlive it.
            signal.setitimer(signal.ITIMER_REAL, request["time_limit"] + 2.0)
            answer = run(request, fd)
        except MemoryError as error:
            answer = {"memory": str(error)}
        except OSError as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.close(fd)
        body = marshal.dumps(answer)
        channel.sendall(len(body).to_bytes(8, "little") + body)


if __name__ == "__main__":
    main()
