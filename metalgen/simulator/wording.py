"""The words of each kind of finding, from the numbers that the runtime reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from metalgen.plurals import counted

if TYPE_CHECKING:
    from metalgen.simulator.report import RawFinding

ACCESSES = {1: "read", 2: "write", 3: "atomic read", 4: "atomic write", 5: "atomic update"}
THREADGROUP = 2
"""A finding's space, where it is threadgroup memory."""
_UNDEFINED = {
    1: "signed integer overflow",
    2: "shift by an amount outside of the type",
    3: "integer division by zero, or of the least integer by -1",
    4: "index outside of a thread's own array",
}


def _touched(raw: RawFinding, verb: str, memory: str) -> str:
    return f"{verb} of {counted(raw.bytes, 'byte')} of {memory} at byte {raw.offset}"


def _race(raw: RawFinding, verb: str, memory: str) -> str:
    other = ACCESSES.get(raw.other_access, "access")
    flag = "mem_threadgroup" if raw.space == THREADGROUP else "mem_device"
    return (
        f"{_touched(raw, verb, memory)}, and no barrier with {flag} "
        f"orders it after a {other} by another thread"
    )


def _race_threadgroups(raw: RawFinding, verb: str, memory: str) -> str:
    other = ACCESSES.get(raw.other_access, "access")
    return (
        f"{_touched(raw, verb, memory)}, where another threadgroup "
        f"did a {other}; nothing orders threadgroups"
    )


def _race_atomic(raw: RawFinding, verb: str, memory: str) -> str:
    other = ACCESSES.get(raw.other_access, "access")
    return (
        f"{verb} of {memory} at byte {raw.offset} and {other} of the same bytes by another thread: "
        "an atomic and a plain access with nothing to order them"
    )


def _out_of_bounds(raw: RawFinding, verb: str, memory: str) -> str:
    if raw.offset < 0:
        where = f"starts {counted(-raw.offset, 'byte')} before"
    else:
        where = f"ends {counted(raw.offset + raw.bytes - raw.limit, 'byte')} past the end of"
    size, room = counted(raw.bytes, "byte"), counted(raw.limit, "byte")
    return f"{verb} of {size} {where} {memory}, which has {room}"


def _wild(raw: RawFinding, verb: str, memory: str) -> str:
    text = f"{verb} of {counted(raw.bytes, 'byte')} at {raw.memory:#x}, which is near no buffer"
    if abs(raw.offset - (raw.bytes << 32)) < 1 << 30:  # from the start of the nearest one
        text += "; 2^32 elements too far, as an unsigned index below zero is"
    return text


def _uninitialised(raw: RawFinding, verb: str, memory: str) -> str:
    return f"{_touched(raw, 'read', memory)}, which nothing has written"


def _read_only(raw: RawFinding, verb: str, memory: str) -> str:
    return f"{verb} to {memory}, which the kernel may only read"


def _misaligned(raw: RawFinding, verb: str, memory: str) -> str:
    return f"{_touched(raw, verb, memory)}, which is not a multiple of {raw.value}"


def _divergent_barrier(raw: RawFinding, verb: str, memory: str) -> str:
    some = counted(raw.value, "thread")
    return f"only {some} reached this barrier while others wait elsewhere or are done"


def _divergent_collective(raw: RawFinding, verb: str, memory: str) -> str:
    return f"only {counted(raw.value, 'lane')} reached this simdgroup function together"


def _inactive_lane(raw: RawFinding, verb: str, memory: str) -> str:
    return f"reads lane {raw.value}, which is not active here: the value is undefined"


def _undefined(raw: RawFinding, verb: str, memory: str) -> str:
    return _UNDEFINED.get(raw.value, "undefined behaviour")


def _too_large(raw: RawFinding, verb: str, memory: str) -> str:
    return f"{raw.value} bytes of threadgroup memory, and a threadgroup has 32768"


def _too_many_buffers(raw: RawFinding, verb: str, memory: str) -> str:
    return f"{raw.value} buffers, and Metal binds 31"


def _too_many_threads(raw: RawFinding, verb: str, memory: str) -> str:
    return f"{raw.value} threads in a threadgroup, and Metal allows 1024"


def _unknown(raw: RawFinding, verb: str, memory: str) -> str:
    return f"a finding of kind {raw.kind} that this version does not know"


_KINDS: dict[int, tuple[str, Callable[[RawFinding, str, str], str]]] = {
    1: ("race", _race),
    2: ("race between threadgroups", _race_threadgroups),
    3: ("atomic and plain access", _race_atomic),
    4: ("out of bounds", _out_of_bounds),
    5: ("wild access", _wild),
    6: ("uninitialised read", _uninitialised),
    7: ("write to read-only memory", _read_only),
    8: ("misaligned access", _misaligned),
    9: ("divergent barrier", _divergent_barrier),
    10: ("divergent collective", _divergent_collective),
    11: ("inactive lane", _inactive_lane),
    12: ("undefined integer behaviour", _undefined),
    13: ("too much threadgroup memory", _too_large),
    14: ("too many buffers", _too_many_buffers),
    15: ("too many threads", _too_many_threads),
}
KINDS = tuple(name for name, _ in _KINDS.values())


def describe(raw: RawFinding, memory: str) -> tuple[str, str]:
    """Return the kind of a finding and its message; ``memory`` is the name of what it touched."""
    kind, write = _KINDS.get(raw.kind, ("unknown", _unknown))
    return kind, write(raw, ACCESSES.get(raw.access, "access"), memory)
