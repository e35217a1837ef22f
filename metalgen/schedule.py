"""How to run an attention: tile sizes and data paths, and the rules they must keep."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

from metalgen.config import AttentionConfig
from metalgen.errors import ArgumentError, InvalidSchedule

FRAGMENT = 8
"""Rows and columns of a simdgroup matrix."""
SIMD_WIDTH = 32
ROW_PAD_BYTES = 16
"""Bytes added to a row in threadgroup memory, so that rows start in different banks."""


@dataclass(frozen=True)
class Limits:
    """What a chip allows a threadgroup: bytes of threadgroup memory, and threads."""

    threadgroup_bytes: int = 32768
    threads: int = 1024


APPLE = Limits()


@dataclass(frozen=True)
class Schedule:
    """How the forward family runs a config.

    Args:
        bq: query rows a threadgroup (``8 * row_blocks * simdgroups``).
        bk: keys a pass of the loop.
        bd: columns of K or V staged at once; smaller ones need less threadgroup memory and more
            barriers. The whole (padded) width where nothing is staged.
        simdgroups: simdgroups a threadgroup.
        row_blocks: blocks of 8 query rows a simdgroup; each K or V fragment loaded serves all.
        q_source: ``"registers"`` (loaded once) or ``"threadgroup"`` (staged once, read each pass).
        k_source, v_source: ``"threadgroup"`` (staged by the whole group) or ``"device"``.
        buffers: staging buffers; with 2 the next tile is fetched while one is used, and half of
            the barriers go.
        load_width: elements of one vector load a lane: 2, 4 or 8.
        fragment: ``"input"`` (fragments in the input's type) or ``"float32"`` (widened on load).
        math_mode: Metal's ``"safe"``, ``"relaxed"`` or ``"fast"``.
    """

    bq: int
    bk: int
    bd: int
    simdgroups: int
    row_blocks: int = 1
    q_source: str = "registers"
    k_source: str = "threadgroup"
    v_source: str = "threadgroup"
    buffers: int = 1
    load_width: int = 8
    fragment: str = "input"
    math_mode: str = "safe"

    @property
    def threads(self) -> int:
        """Threads a threadgroup."""
        return self.simdgroups * SIMD_WIDTH

    @property
    def staged(self) -> tuple[str, ...]:
        """Which of ``"k"`` and ``"v"`` go through threadgroup memory."""
        sources = (("k", self.k_source), ("v", self.v_source))
        return tuple(name for name, source in sources if source == "threadgroup")

    @functools.cached_property
    def key(self) -> str:
        """Canonical JSON; fields from ``row_blocks`` on are left out at their defaults."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))

    def to_dict(self) -> dict[str, Any]:
        """The required fields, and those that differ from their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Schedule:
        """The schedule of a dictionary as `to_dict` writes it; its values are typed and in range.

        Raises:
            ArgumentError: not a dictionary, an unknown or missing field, or a value outside the
                declared choices.
        """
        if not isinstance(fields, dict):
            raise ArgumentError("schedule", "an object of fields", fields)
        for name, value in fields.items():
            if name not in CHOICES:
                raise ArgumentError("schedule", f"fields among {', '.join(CHOICES)}", name)
            _check_choice(name, value)
        for f in dataclasses.fields(cls):
            if f.default is dataclasses.MISSING and f.name not in fields:
                raise ArgumentError("schedule", f"a field {f.name}", sorted(fields))
        return cls(**fields)

    def __str__(self) -> str:
        """A short name, such as ``64x32x64 sg4x2 q:reg k:tg v:tg buf1 w8``."""
        short = {"registers": "reg", "threadgroup": "tg", "device": "dev"}
        words = [
            f"{self.bq}x{self.bk}x{self.bd}",
            f"sg{self.simdgroups}x{self.row_blocks}",
            f"q:{short[self.q_source]} k:{short[self.k_source]} v:{short[self.v_source]}",
            f"buf{self.buffers}",
            f"w{self.load_width}",
        ]
        words += [w for w, d in ((self.fragment, "input"), (self.math_mode, "safe")) if w != d]
        return " ".join(words)


CHOICES: dict[str, tuple[Any, ...] | range] = {
    "bq": range(8, 1025, 8),
    "bk": range(8, 257, 8),
    "bd": range(8, 257, 8),
    "simdgroups": range(1, 33),
    "row_blocks": range(1, 9),
    "q_source": ("registers", "threadgroup"),
    "k_source": ("threadgroup", "device"),
    "v_source": ("threadgroup", "device"),
    "buffers": (1, 2),
    "load_width": (2, 4, 8),
    "fragment": ("input", "float32"),
    "math_mode": ("safe", "relaxed", "fast"),
}
"""Every value that a field of a schedule may take, whatever the config."""


def padded(width: int) -> int:
    """A head dimension rounded up to whole fragments."""
    return -(-width // FRAGMENT) * FRAGMENT


def staged_width(config: AttentionConfig, schedule: Schedule) -> int:
    """Columns of the widest K or V slice that is staged at once; 0 when none is."""
    widths = {"k": padded(config.head_dim), "v": padded(config.v_dim)}
    return max((min(schedule.bd, widths[name]) for name in schedule.staged), default=0)


def threadgroup_bytes(config: AttentionConfig, schedule: Schedule) -> int:
    """Bytes of threadgroup memory: the Q tile where it is re-read, and the staging buffers."""
    item = config.itemsize
    total = 0
    if schedule.q_source == "threadgroup":
        total += schedule.bq * (padded(config.head_dim) * item + ROW_PAD_BYTES)
    width = staged_width(config, schedule)
    if width:
        total += schedule.buffers * schedule.bk * (width * item + ROW_PAD_BYTES)
    return total


def register_estimate(config: AttentionConfig, schedule: Schedule) -> int:
    """Estimated 16-bit registers a thread: O, S and Q of its rows, and 85 for everything else.

    From a static study of one kernel compiled with Mesa's compiler, not Apple's; it ranks
    schedules and refuses none. The hardware has 256 a thread.
    """
    rows = FRAGMENT * schedule.row_blocks
    out = rows * padded(config.v_dim) // 16
    scores = rows * schedule.bk // 16
    wide = 4 if schedule.fragment == "float32" else config.itemsize
    queries = rows * padded(config.head_dim) * wide // 64
    return out + scores + (queries if schedule.q_source == "registers" else 0) + 85


def check_schedule(config: AttentionConfig, schedule: Schedule, limits: Limits = APPLE) -> None:
    """Whether the forward family can run `config` by `schedule` within `limits`.

    Raises:
        InvalidSchedule: with the name of the first rule that is broken.
    """

    def require(rule: str, holds: bool, detail: str) -> None:
        if not holds:
            raise InvalidSchedule(rule, detail)

    s = schedule
    for field in dataclasses.fields(Schedule):
        try:
            _check_choice(field.name, getattr(s, field.name))
        except ArgumentError as error:
            raise InvalidSchedule("choices", str(error)) from None
    rows = FRAGMENT * s.row_blocks * s.simdgroups
    require("bq", s.bq == rows, f"bq must be 8 * row_blocks * simdgroups = {rows}, not {s.bq}")
    require(
        "threads", s.threads <= limits.threads, f"{s.threads} threads of at most {limits.threads}"
    )
    widest = max(padded(config.head_dim), padded(config.v_dim))
    require("bd", s.bd <= widest, f"bd={s.bd} is wider than the padded head dimension {widest}")
    if not s.staged:
        require("bd", s.bd == widest, f"nothing is staged: bd must be {widest}, not {s.bd}")
        require("buffers", s.buffers == 1, "nothing is staged: buffers must be 1")
    require(
        "fragment",
        s.fragment == "input" or config.dtype != "float32",
        "float32 inputs need no widening: fragment must be 'input'",
    )
    size = threadgroup_bytes(config, s)
    require(
        "threadgroup memory",
        size <= limits.threadgroup_bytes,
        f"{size} bytes of at most {limits.threadgroup_bytes}",
    )


def is_valid(config: AttentionConfig, schedule: Schedule, limits: Limits = APPLE) -> bool:
    """Whether `check_schedule` finds nothing."""
    try:
        check_schedule(config, schedule, limits)
    except InvalidSchedule:
        return False
    return True


def default_schedule(config: AttentionConfig, limits: Limits = APPLE) -> Schedule:
    """The schedule that runs a config before anything was tuned, and that races in every search.

    Four simdgroups; 16 rows each where the accumulator leaves room, else 8; 32 keys a pass; K and
    V staged, Q in registers; then halved until it fits the limits.
    """
    widest = max(padded(config.head_dim), padded(config.v_dim))
    for row_blocks in (2, 1) if config.v_dim <= 64 else (1,):
        for bk, bd in ((32, widest), (16, widest), (16, min(widest, 64)), (8, min(widest, 32))):
            schedule = Schedule(
                bq=FRAGMENT * row_blocks * 4,
                bk=bk,
                bd=bd,
                simdgroups=4,
                row_blocks=row_blocks,
            )
            if is_valid(config, schedule, limits):
                return schedule
    raise InvalidSchedule("default", f"no default schedule for {config} fits {limits}")


def _check_choice(name: str, value: object) -> None:
    choices = CHOICES[name]
    expected = (
        f"an integer of {choices.start}, {choices.start + choices.step}, ... {choices[-1]}"
        if isinstance(choices, range)
        else "one of " + ", ".join(map(repr, choices))
    )
    if isinstance(value, bool) or type(value) is not type(choices[0]) or value not in choices:
        raise ArgumentError(name, expected, value)
