"""A chip, its facts and its limits, found by name."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from metalgen.chips import facts
from metalgen.errors import ArgumentError
from metalgen.languages import CUDA, METAL
from metalgen.schedules import Limits

LANGUAGES = {"apple": METAL, "nvidia": CUDA}
"""The language of a chip's kernels, by its kind."""


class UnknownChip(ArgumentError):
    """A chip name that is not known; ``nearest`` holds the names that come closest."""

    def __init__(self, name: object, nearest: tuple[str, ...] = ()) -> None:
        self.nearest = nearest
        hint = f"; the nearest: {', '.join(nearest)}" if nearest else ""
        super().__init__("chip", f"one that `metalgen chips` lists{hint}", name)

    def __reduce__(self) -> tuple[type, tuple[object, tuple[str, ...]]]:  # type: ignore[override]
        return type(self), (self.got, self.nearest)


class IncompleteChip(ArgumentError):
    """A chip without the figures that a calculation needs; ``missing`` names them."""

    def __init__(self, name: str, missing: tuple[str, ...]) -> None:
        self.name = name
        self.missing = missing
        super().__init__(
            "chip", f"a chip whose {', '.join(missing)} {_are(missing)} on record", name
        )

    def __reduce__(self) -> tuple[type, tuple[str, tuple[str, ...]]]:  # type: ignore[override]
        return type(self), (self.name, self.missing)


def _are(names: tuple[str, ...]) -> str:
    return "is" if len(names) == 1 else "are"


@dataclass(frozen=True)
class Origin:
    """Where a figure came from, and whether it is only an estimate."""

    source: str
    estimated: bool


@dataclass(frozen=True)
class Chip:
    """The facts of one GPU model; a figure that is not known is None, and `origins` tells why not.

    Args:
        name: ``"M3Max"`` for the full chip, ``"M3Max-30"`` for one with fewer cores.
        kind: ``"apple"`` or ``"nvidia"``.
        generation: ``"M3"``; ``"Hopper"``.
        tier: ``""``, ``"Pro"``, ``"Max"`` or ``"Ultra"``.
        cores: GPU cores (streaming multiprocessors), of ``full_cores`` on the full chip.
        clock_ghz: highest clock, GHz.
        dram_gbs: memory bandwidth by the vendor, 10^9 bytes a second.
        l2_bytes, slc_bytes: second-level and system-level cache, bytes.
        lanes, schedulers: float32 lanes and instruction schedulers a core.
        resident_threads: most threads that a core holds.
        register_bytes, core_threadgroup_bytes: memory of a core, bytes.
        data_cache_bytes, instruction_cache_bytes: caches of a core, bytes.
        threadgroup_bytes, threads: limits of one threadgroup.
        on_core_bytes_per_cycle, l2_bytes_per_cycle, slc_bytes_per_cycle: bandwidth to one core.
        dynamic_registers: registers come from a shared on-chip memory as they are needed.
        parallel_issue: float, half and integer instructions issue side by side.
        direct_reads: published kernels read K and V from device memory there.
        neural_accelerators: matrix units beside the 8x8 simdgroup matrices.
        neural_tflops: what they reach, float16.
        warp_group_products: four warps multiply together (wgmma).
        origins: each figure's `Origin`, by field name.
    """

    name: str
    kind: str
    generation: str
    tier: str
    cores: int
    full_cores: int
    clock_ghz: float | None = None
    dram_gbs: float | None = None
    l2_bytes: int | None = None
    slc_bytes: int | None = None
    lanes: int | None = None
    schedulers: int | None = None
    resident_threads: int | None = None
    register_bytes: int | None = None
    core_threadgroup_bytes: int | None = None
    data_cache_bytes: int | None = None
    instruction_cache_bytes: int | None = None
    threadgroup_bytes: int | None = None
    threads: int | None = None
    on_core_bytes_per_cycle: float | None = None
    l2_bytes_per_cycle: float | None = None
    slc_bytes_per_cycle: float | None = None
    dynamic_registers: bool = False
    parallel_issue: bool = False
    direct_reads: bool = False
    neural_accelerators: bool = False
    neural_tflops: float | None = None
    warp_group_products: bool = False
    origins: Mapping[str, Origin] = field(default_factory=dict, compare=False, repr=False)

    @property
    def family(self) -> str:
        """The chip whatever its core count: ``"M3Max"`` for ``"M3Max-30"``."""
        return self.name.partition("-")[0]

    @property
    def limits(self) -> Limits:
        """What a threadgroup may use. Raises `IncompleteChip` when that is not on record."""
        self.require("threadgroup_bytes", "threads")
        assert self.threadgroup_bytes is not None and self.threads is not None
        instructions = ("wgmma",) if self.warp_group_products else ()
        return Limits(self.threadgroup_bytes, self.threads, LANGUAGES[self.kind].name, instructions)

    @property
    def fp32_tflops(self) -> float | None:
        """Peak of float32 multiply-adds, 10^12 a second: cores * lanes * 2 * clock."""
        if self.lanes is None or self.clock_ghz is None:
            return None
        return self.cores * self.lanes * 2 * self.clock_ghz / 1000

    @property
    def fp16_tflops(self) -> float | None:
        """Peak of float16 multiply-adds outside tensor units: on these chips that of float32."""
        return self.fp32_tflops if self.kind == "apple" else None

    @property
    def product(self) -> str:
        """The vendor and the chip: ``"Apple M3 Max"``, ``"NVIDIA RTX4090"``."""
        if self.kind != "apple":
            return f"NVIDIA {self.family}"
        return f"Apple {self.generation} {self.tier}".rstrip()

    def require(self, *fields: str) -> None:
        """Raise `IncompleteChip` that names every one of `fields` that is not known."""
        missing = tuple(name for name in fields if getattr(self, name) is None)
        if missing:
            raise IncompleteChip(self.name, missing)

    def __str__(self) -> str:
        return f"{self.product} ({self.cores} GPU cores)"


@functools.cache
def all_chips() -> tuple[Chip, ...]:
    """Every chip, by generation and tier, the full one before its binned ones; NVIDIA's last."""
    chips = []
    for (generation, tier), (counts, own) in facts.APPLE_CHIPS.items():
        for cores in counts:
            name = generation + tier + ("" if cores == counts[0] else f"-{cores}")
            figures = facts.GENERATIONS[generation] | own | facts.BINNED.get(name, {})
            chips.append(_chip(name, "apple", generation, tier, cores, counts[0], figures))
    for family, (generation, capability, counts, own) in facts.NVIDIA_CHIPS.items():
        for cores in counts:
            name = family + ("" if cores == counts[0] else f"-{cores}")
            figures = facts.CAPABILITIES[capability] | own | facts.BINNED.get(name, {})
            chips.append(_chip(name, "nvidia", generation, "", cores, counts[0], figures))
    return tuple(chips)


def _chip(
    name: str,
    kind: str,
    generation: str,
    tier: str,
    cores: int,
    full_cores: int,
    figures: Mapping[str, facts.Figure],
) -> Chip:
    types = Chip.__annotations__
    values: dict[str, bool | int | float] = {}
    origins = {}
    for key, (value, source) in figures.items():
        convert = bool if types[key] == "bool" else int if "int" in types[key] else float
        values[key] = convert(value)
        origins[key] = Origin(facts.SOURCES[source.rstrip("?")], source.endswith("?"))
    own = (name, kind, generation, tier, cores, full_cores)
    return Chip(*own, origins=origins, **values)  # type: ignore[arg-type]


@functools.cache
def get_chip(name: str) -> Chip:
    """The chip of a name such as ``"M3Max"``, ``"m3 max"``, ``"M3Max-30"`` or ``"Apple M3 Max"``.

    Raises:
        UnknownChip: with the nearest known names.
    """
    chip = _by_key().get(_key(name)) if isinstance(name, str) else None
    if chip is None:
        raise UnknownChip(name, nearest_names(name) if isinstance(name, str) else ())
    return chip


def nearest_names(name: str) -> tuple[str, ...]:
    """Known names that resemble `name`, the nearest first; a known chip's own other sizes too."""
    import difflib

    key = _key(name)
    names = {_key(chip.name): chip.name for chip in all_chips()}
    family = key.partition("-")[0]
    own = [n for n in names.values() if _key(n).partition("-")[0] == family]
    close = difflib.get_close_matches(key, names, n=3, cutoff=0.5)
    return tuple(dict.fromkeys(own + [names[k] for k in close]))[:4]


@functools.cache
def _by_key() -> dict[str, Chip]:
    chips = {_key(chip.name): chip for chip in all_chips()}
    chips |= {f"{_key(c.name)}-{c.cores}": c for c in all_chips() if c.cores == c.full_cores}
    return chips


def _key(name: str) -> str:
    """`name` in lower case, without vendor, spaces and the word "core": ``"m3max-30"``."""
    text = re.sub(r"^(apple|nvidia)\s+", "", name.strip().lower())
    text = re.sub(r"[\s-]*cores?$", "", text)
    text = re.sub(r"[\s-]+(\d+)$", r"-\1", text)
    return re.sub(r"\s+", "", text)


def neighbours(chip: Chip) -> tuple[str, ...]:
    """Chips whose tuning records may stand in for `chip`'s, the nearest first.

    The same chip with another core count, nearest count first; then others of its generation.
    """

    def order(other: Chip) -> tuple[bool, int, int]:
        return other.family != chip.family, abs(other.cores - chip.cores), -other.cores

    others = [c for c in all_chips() if c.generation == chip.generation and c.name != chip.name]
    return tuple(c.name for c in sorted(others, key=order))
