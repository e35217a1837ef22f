"""How to run an attention: tile sizes and data paths, and the rules they must keep."""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from typing import Any

from metalgen.arguments import as_integer
from metalgen.config import AttentionConfig
from metalgen.errors import ArgumentError, InvalidSchedule
from metalgen.targets import CUDA, METAL, TARGETS, Target
from metalgen.tiles import CudaTiles, cuda_tiles, padded, row_bytes

FRAGMENT = 8
"""Rows and columns of a simdgroup matrix."""
SIMD_WIDTH = 32
REGISTERS = 250
"""Estimated 16-bit registers a thread up to which a kernel is likely not to spill (of 256)."""
SHARED_KEYS = 16384
"""A share of a deterministic decode has this many keys over its splits, however many there are."""


@dataclass(frozen=True)
class Limits:
    """What a chip allows a threadgroup: bytes of threadgroup memory, threads, and the language."""

    threadgroup_bytes: int = 32768
    threads: int = 1024
    target: str = "metal"


APPLE = Limits()


@dataclass(frozen=True)
class Schedule:
    """How the forward or decode family runs a config.

    Args:
        bq: query rows a threadgroup (``row_blocks * simdgroups / key_simdgroups`` blocks of 8, on
            CUDA of 16).
        bk: keys a pass of the loop.
        bd: columns of K or V staged at once; smaller ones need less threadgroup memory and more
            barriers. The whole (padded) width where nothing is staged.
        simdgroups: simdgroups a threadgroup.
        row_blocks: blocks of rows a simdgroup; each K or V fragment loaded serves all.
        q_source: ``"registers"`` (loaded once) or ``"threadgroup"`` (staged once, read each pass).
        k_source, v_source: ``"threadgroup"`` (staged by the whole group) or ``"device"``.
        buffers: staging buffers; from 2 on later tiles are fetched while one is used, and half of
            the barriers go.
        load_width: elements of one vector load a lane: 2, 4 or 8.
        fragment: ``"input"`` (fragments in the input's type) or ``"float32"`` (widened on load).
        math_mode: Metal's ``"safe"``, ``"relaxed"`` or ``"fast"``.
        splits: threadgroups that share out the keys of a row (decode only). A combine step joins
            what they leave.
        value_parts: threadgroups that share out the columns of the values of one block of rows,
            each with scores of its own: for outputs too wide for the registers.
        key_simdgroups: simdgroups that share the same rows, and share out the keys of each pass
            (decode on CUDA only): few rows keep several busy. Each leaves an output of its own to
            the combine step.
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
    splits: int = 1
    value_parts: int = 1
    key_simdgroups: int = 1

    def __post_init__(self) -> None:
        for name in _INTEGERS:  # what is none, `check_schedule` and `from_dict` refuse
            value = getattr(self, name)
            if type(value) is not int and (number := as_integer(value)) is not None:
                object.__setattr__(self, name, number)

    @property
    def threads(self) -> int:
        """Threads a threadgroup."""
        return self.simdgroups * SIMD_WIDTH

    @property
    def joined(self) -> int:
        """Outputs of each row that the combine step joins; 1: there is none."""
        return self.splits * self.key_simdgroups

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
            number = as_integer(value)
            _check_choice(name, value if number is None else number)
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
        words += [f"split{self.splits}"] if self.splits > 1 else []
        words += [f"parts{self.value_parts}"] if self.value_parts > 1 else []
        words += [f"keys{self.key_simdgroups}"] if self.key_simdgroups > 1 else []
        words += [w for w, d in ((self.fragment, "input"), (self.math_mode, "safe")) if w != d]
        return " ".join(words)


CHOICES: dict[str, tuple[Any, ...] | range] = {
    "bq": range(8, 1025, 8),
    "bk": range(8, 257, 8),
    "bd": range(8, 577, 8),
    "simdgroups": range(1, 33),
    "row_blocks": range(1, 9),
    "q_source": ("registers", "threadgroup"),
    "k_source": ("threadgroup", "device"),
    "v_source": ("threadgroup", "device"),
    "buffers": (1, 2, 3, 4),
    "load_width": (2, 4, 8),
    "fragment": ("input", "float32"),
    "math_mode": ("safe", "relaxed", "fast"),
    "splits": (1, 2, 4, 8, 16, 32, 64, 128, 256),
    "value_parts": (1, 2, 4),
    "key_simdgroups": (1, 2, 4, 8),
}
"""Every value that a field of a schedule may take, whatever the config."""
_INTEGERS = tuple(name for name, choices in CHOICES.items() if type(choices[0]) is int)


def share(schedule: Schedule) -> int:
    """Keys of one share of a deterministic decode: whole tiles."""
    tiles = -(-SHARED_KEYS // (schedule.splits * schedule.bk))
    return tiles * schedule.bk


def value_width(config: AttentionConfig, schedule: Schedule) -> int:
    """Columns of the values that one threadgroup computes with."""
    return config.v_dim // schedule.value_parts


def widest_row(config: AttentionConfig, value_parts: int, target: Target = METAL) -> int:
    """The wider of a row of K and a threadgroup's share of a row of V, padded."""
    return max(padded(config.head_dim, target), padded(config.v_dim // value_parts, target))


def staged_width(config: AttentionConfig, schedule: Schedule) -> int:
    """Columns of the widest K or V slice that is staged at once; 0 when none is (Metal)."""
    widths = {"k": padded(config.head_dim), "v": padded(value_width(config, schedule))}
    return max((min(schedule.bd, widths[name]) for name in schedule.staged), default=0)


def shared_tiles(config: AttentionConfig, schedule: Schedule) -> CudaTiles:
    """The tiles of a schedule in shared memory (CUDA)."""
    s, width = schedule, value_width(config, schedule)
    sharing = s.simdgroups // s.key_simdgroups
    return cuda_tiles(config, bq=s.bq, bk=s.bk, v_width=width, sharing=sharing)


def threadgroup_bytes(config: AttentionConfig, schedule: Schedule, target: Target = METAL) -> int:
    """Bytes of threadgroup memory: the Q tile where it is staged, and the staging buffers.

    On CUDA Q always is, and quantized tiles may be dequantized into one more.
    """
    if target.name == "cuda":
        tiles = shared_tiles(config, schedule)
        return tiles.q + tiles.work + schedule.buffers * tiles.kv
    total = 0
    if schedule.q_source == "threadgroup":
        total += schedule.bq * row_bytes(config.head_dim, config.itemsize)
    width = staged_width(config, schedule)
    if width:
        total += schedule.buffers * schedule.bk * row_bytes(width, config.itemsize)
    return total


def register_estimate(config: AttentionConfig, schedule: Schedule) -> int:
    """Estimated 16-bit registers a thread: O, S and Q of its rows, and 85 for everything else.

    From a static study of one kernel compiled with Mesa's compiler, not Apple's; it ranks
    schedules and refuses none. The hardware has 256 a thread.
    """
    rows = FRAGMENT * schedule.row_blocks
    out = rows * padded(value_width(config, schedule)) // 16
    scores = rows * schedule.bk // 16
    wide = 4 if schedule.fragment == "float32" else config.itemsize
    queries = rows * padded(config.head_dim) * wide // 64
    return out + scores + (queries if schedule.q_source == "registers" else 0) + 85


def check_schedule(
    config: AttentionConfig, schedule: Schedule, limits: Limits = APPLE, family: str = "forward"
) -> None:
    """Whether a family can run `config` by `schedule` within `limits`.

    Raises:
        InvalidSchedule: with the name of the first rule that is broken.
    """

    def require(rule: str, holds: bool, detail: str) -> None:
        if not holds:
            raise InvalidSchedule(rule, detail)

    s, target = schedule, TARGETS[limits.target]
    for field in dataclasses.fields(Schedule):
        try:
            _check_choice(field.name, getattr(s, field.name))
        except ArgumentError as error:
            raise InvalidSchedule("choices", str(error)) from None
    for name, allowed in target.choices:
        value = getattr(s, name)
        require("target", value in allowed, f"{target.name} has {name} in {allowed}, not {value!r}")
    require("dtype", config.dtype in target.dtypes, f"{target.name} has no {config.dtype} kernels")
    require(
        "buffers",
        s.buffers <= target.buffers,
        f"{target.name} has at most {target.buffers} buffers, not {s.buffers}",
    )
    shared = s.key_simdgroups > 1
    require(
        "key_simdgroups",
        s.simdgroups % s.key_simdgroups == 0,
        f"simdgroups must be a multiple of key_simdgroups={s.key_simdgroups}, not {s.simdgroups}",
    )
    require(
        "key_simdgroups",
        not shared or family == "decode",
        "only in decode do simdgroups share rows",
    )
    rows = target.row_block * s.row_blocks * s.simdgroups // s.key_simdgroups
    factors = "row_blocks * simdgroups" + (" / key_simdgroups" if shared else "")
    require(
        "bq",
        s.bq == rows,
        f"bq must be {target.row_block} * {factors} = {rows}, not {s.bq}",
    )
    most = min(limits.threads, target.threads)
    require("threads", s.threads <= most, f"{s.threads} threads of at most {most}")
    depth = target.depth * s.key_simdgroups
    require("bk", s.bk % depth == 0, f"bk must be a multiple of {depth}, not {s.bk}")
    group = 1 if config.kv_bits is None else config.kv_group
    require(
        "value_parts",
        s.value_parts == 1 or config.v_dim % (s.value_parts * max(target.depth, group)) == 0,
        f"value_parts must cut {config.v_dim} columns into whole matrices and groups",
    )
    widest = widest_row(config, s.value_parts, target)
    require("bd", s.bd <= widest, f"bd={s.bd} is wider than the padded head dimension {widest}")
    if target.name == "cuda":
        require("bd", s.bd == widest, f"cuda stages whole rows: bd must be {widest}, not {s.bd}")
    if not s.staged:
        require("bd", s.bd == widest, f"nothing is staged: bd must be {widest}, not {s.bd}")
        require("buffers", s.buffers == 1, "nothing is staged: buffers must be 1")
    require(
        "fragment",
        s.fragment == "input" or config.dtype != "float32",
        "float32 inputs need no widening: fragment must be 'input'",
    )
    require("family", family == "forward" or not config.block_mask, "decode takes no block mask")
    require("splits", family == "decode" or s.splits == 1, "only decode shares out the keys")
    size = threadgroup_bytes(config, s, target)
    require(
        "threadgroup memory",
        size <= limits.threadgroup_bytes,
        f"{size} bytes of at most {limits.threadgroup_bytes}",
    )


def is_valid(
    config: AttentionConfig, schedule: Schedule, limits: Limits = APPLE, family: str = "forward"
) -> bool:
    """Whether `check_schedule` finds nothing."""
    try:
        check_schedule(config, schedule, limits, family)
    except InvalidSchedule:
        return False
    return True


def default_value_parts(config: AttentionConfig, target: Target) -> int:
    """Shares of the values of which one fits the registers: of 256 columns at most."""
    group = max(target.depth, 1 if config.kv_bits is None else config.kv_group)
    parts = [n for n in (1, 2, 4) if config.v_dim % (n * group) == 0]
    return next((n for n in parts if config.v_dim // n <= 256), 1)


def default_schedule(
    config: AttentionConfig, limits: Limits = APPLE, family: str = "forward"
) -> Schedule:
    """The schedule that runs a config before anything was tuned, and that races in every search.

    Forward: four simdgroups, or fewer where their rows do not fit; two row blocks each where the
    accumulator leaves room, else one; K and V staged; the longest pass and the widest slice that
    fit the limits; Q in registers where they are likely to suffice. Decode: one simdgroup of one
    row block, and eight splits; on CUDA as `_cuda_decode` says.
    """
    target = TARGETS[limits.target]
    parts = default_value_parts(config, target)
    widest = widest_row(config, parts, target)
    if family == "decode" and limits.target == "cuda":
        candidates = _cuda_decode(config, parts, widest)
    else:
        candidates = _in_general(config, limits, family, parts, widest)
    valid = [s for s in candidates if is_valid(config, s, limits, family)]
    if not valid:
        raise InvalidSchedule("default", f"no default schedule for {config} fits {limits}")
    if limits.target == "metal":
        valid = [s for s in valid if register_estimate(config, s) <= REGISTERS] or valid
    return valid[0]


def _in_general(
    config: AttentionConfig, limits: Limits, family: str, parts: int, widest: int
) -> list[Schedule]:
    """Defaults of both families, the best first, but for decode on CUDA."""
    target = TARGETS[limits.target]
    decode = family == "decode"
    sources: tuple[str, ...]
    if limits.target == "cuda":
        sizes = [(bk, widest) for bk in (64, 32, 16) if bk * config.itemsize <= 128]
        roomy, buffers, sources = 256 // config.itemsize, 2, ("threadgroup",)
    else:
        sizes = [(32, widest), (16, widest), (16, min(widest, 64)), (8, min(widest, 32))]
        roomy, buffers, sources = 64, 1, ("registers", "threadgroup")
    return [
        Schedule(
            bq=target.row_block * row_blocks * simdgroups,
            bk=bk,
            bd=bd,
            simdgroups=simdgroups,
            row_blocks=row_blocks,
            q_source=source,
            buffers=staged,
            splits=8 if decode else 1,
            value_parts=parts,
        )
        for staged in sorted({buffers, 1}, reverse=True)  # one where two do not fit
        for simdgroups in ((1,) if decode else (4, 2, 1))
        for row_blocks in ((2, 1) if config.v_dim // parts <= roomy and not decode else (1,))
        for bk, bd in sizes
        for source in sources
    ]


def _cuda_decode(config: AttentionConfig, parts: int, widest: int) -> list[Schedule]:
    """Defaults of decode on CUDA, the best first: one of them fits.

    Sixteen splits keep a GPU of a hundred cores busy with one token of few heads. Two pairs of
    warps have 32 rows, more than most calls have, and share out the keys of a tile; a ring of four
    tiles covers the way to memory. Of quantized keys 32 splits, of one warp each.
    """
    if config.kv_bits is not None:
        sizes, splits = [(1, 1, bk, n) for bk in (64, 32, 16) for n in (2, 1)], 32
    else:
        most = min(256 // config.itemsize, 128 if config.page_size is None else 64)
        lengths = [bk for bk in (128, 64, 32) if bk <= (most if widest <= 256 else 32)]
        sizes = [(4, 2, bk, n) for bk in lengths for n in ((4, 3, 2) if widest <= 256 else (2, 1))]
        sizes += [(2, 2, 32, 2), (2, 2, 32, 1), (1, 1, 16, 2), (1, 1, 16, 1)]
        splits = 16
    kept = config.kv_bits is None and config.head_dim * config.itemsize <= 256
    return [
        Schedule(
            bq=CUDA.row_block * warps // sharing,
            bk=bk,
            bd=widest,
            simdgroups=warps,
            key_simdgroups=sharing,
            q_source="registers" if kept else "threadgroup",
            buffers=buffers,
            splits=splits,
            value_parts=parts,
        )
        for warps, sharing, bk, buffers in sizes
    ]


def _check_choice(name: str, value: object) -> None:
    choices = CHOICES[name]
    expected = (
        f"an integer of {choices.start}, {choices.start + choices.step}, ... {choices[-1]}"
        if isinstance(choices, range)
        else "one of " + ", ".join(map(repr, choices))
    )
    if isinstance(value, bool) or type(value) is not type(choices[0]) or value not in choices:
        raise ArgumentError(name, expected, value)
