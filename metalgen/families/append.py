"""Append: the rows that new keys and values become in a cache, and where they go.

It makes no matrix products, so its schedules have a language and no matrix kind.
"""

from __future__ import annotations

from typing import Any

from metalgen.errors import ArgumentError
from metalgen.families.base import Dispatch, Family, Output, Step
from metalgen.features.quantized import packing
from metalgen.kinds import Kind
from metalgen.kinds.base import Require
from metalgen.problem.config import AttentionConfig
from metalgen.schedules import Knob, Schedule, schedule_type

MAX_BYTES = 32768
"""Most bytes of threadgroup memory, as on Apple's GPUs."""
THREADS = Knob(
    "threads",
    (32, 64, 128, 256, 512, 1024),
    "Threads per threadgroup.",
    128,
    cost="more: more rows share the search for their sequences; fewer groups",
)
ELEMENTS = Knob(
    "elements",
    (1, 2, 4, 8, 16, 32, 64),
    "Columns that a thread makes.",
    8,
    cost="with the threads, how many rows a threadgroup takes: from one to as many as threads",
)


def is_placed(config: AttentionConfig) -> bool:
    """Whether rows go to slots of their own, rather than all behind one slot."""
    return config.has_lengths


def operands(config: AttentionConfig) -> tuple[str, ...]:
    """What the kernel makes rows of: k and v, k alone, or nothing that there is to make.

    Where rows go as they are into one slice of the cache, MLX needs no kernel for that.
    """
    if is_placed(config) or config.kv_bits is not None:
        return ("k", "v")
    return ("k",) if config.rope is not None else ()


def inputs(config: AttentionConfig) -> tuple[str, ...]:
    """Names of the kernel's inputs, in order."""
    names = list(operands(config))
    if config.varlen:
        names.append("cu_seqlens")
    if is_placed(config):
        names += ["offset", "limit"]
    if config.page_size is not None:
        names.append("table")
    if config.rope is not None:
        names += ["rope_cos", "rope_sin"] if config.rope_tables else ["rope_freqs"]
        names.append("rope_offset")
    return tuple(names)


def outputs(config: AttentionConfig) -> tuple[str, ...]:
    """Names of what the kernel makes, in order."""
    return tuple(output.name for output in _outputs(config, (1, 1, 1)))


def _outputs(config: AttentionConfig, shape: tuple[int, int, int]) -> list[Output]:
    """What the kernel makes of keys and values of a shape ``(B, H, L)``."""
    found: list[Output] = []
    for name in operands(config):
        width = config.head_dim if name == "k" else config.v_dim
        bits, group = packing(config, name)
        if bits is None:
            found.append(Output(f"{name}_rows", (*shape, width), config.dtype))
            continue
        words, groups = width * bits // 32, width // group
        found.append(Output(f"{name}_words", (*shape, words), "uint32"))
        for part in ("scales", "biases"):
            found.append(Output(f"{name}_{part}", (*shape, groups), config.dtype))
    if is_placed(config):
        found.append(Output("places", shape, "int32"))
    return found


def row_bytes(config: AttentionConfig) -> int:
    """Bytes of threadgroup memory of a row: where it is read, its position, its columns."""
    found = 8 + 4 * (config.rope is not None)
    if config.kv_bits is not None:
        found += max(config.head_dim, config.v_dim) * config.itemsize
    return found


class MakeRows(Step):
    """The only step: rotates rows, quantizes them, and finds where they go."""

    name = "append"
    template = "append"

    def inputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        return inputs(config)

    def outputs(self, config: AttentionConfig, schedule: Schedule) -> tuple[str, ...]:
        return outputs(config)

    def threads(self, schedule: Schedule) -> int:
        return schedule.threads

    def rows(self, config: AttentionConfig, schedule: Schedule) -> int:
        """Between one and as many as there are threads."""
        width = max(config.head_dim, config.v_dim)
        made = schedule.threads * int(schedule.elements) // width
        return min(schedule.threads, max(1, made))

    def dispatch(
        self, config: AttentionConfig, schedule: Schedule, shape: tuple[int, int, int]
    ) -> Dispatch:
        """The launch for keys and values of a shape ``(B, H, L)``."""
        batch, heads, length = shape
        blocks = -(-batch * heads * length // self.rows(config, schedule))
        return Dispatch((blocks, len(operands(config)), 1), tuple(_outputs(config, shape)))

    def variables(self, config: AttentionConfig, schedule: Schedule) -> dict[str, Any]:
        return {
            "constants": self._constants(config, schedule),
            "operands": [_operand(config, name) for name in operands(config)],
            "rope": config.rope,
            "rope_tables": config.rope_tables,
            "bits": config.kv_bits,
            "placed": is_placed(config),
            "varlen": config.varlen,
            "page_size": config.page_size,
        }

    def _constants(self, config: AttentionConfig, schedule: Schedule) -> dict[str, int]:
        found = {"ROWS": self.rows(config, schedule), "THREADS": schedule.threads}
        if config.rope is not None:
            found["PAIRS"] = config.rotary_dim // 2
        if config.page_size is not None:
            found["PAGE"] = config.page_size
        if not config.quantized_apart:
            found |= _packed(config, "k")
        if config.kv_bits is not None:
            found["WIDEST"] = max(config.head_dim, config.v_dim)
        return found


class Append(Family):
    """Rows of a cache from new keys and values."""

    name = "append"
    main: MakeRows = MakeRows()

    def knobs(self, kind: Kind | None) -> tuple[Knob, ...]:
        return (THREADS, ELEMENTS)

    def check(self, config: AttentionConfig, schedule: Schedule, require: Require) -> None:
        """Raises `ArgumentError` for a config for which no kernel is needed."""
        if not operands(config):
            expected = "one that places, rotates or quantizes rows"
            raise ArgumentError("config", expected, str(config))
        rows, each = self.main.rows(config, schedule), row_bytes(config)
        detail = f"{rows} rows of {each} bytes take more than {MAX_BYTES}"
        require("threadgroup memory", rows * each <= MAX_BYTES, detail)


def append_schedule(threads: int = 128, elements: int = 8, *, language: str = "metal") -> Schedule:
    """How an append kernel runs.

    Args:
        threads: per threadgroup: 32 to 1024, a power of two.
        elements: columns that a thread makes: 1 to 64, a power of two. With the threads they say
            how many rows a threadgroup takes: one at least, and no more than threads.
        language: name of the language that it is for.

    Raises:
        ArgumentError: another number, or an unknown language.
    """
    made = schedule_type(APPEND.name, language)
    return made.from_dict({"threads": threads, "elements": elements})


def _packed(config: AttentionConfig, name: str) -> dict[str, int]:
    """Constants of quantized keys or values."""
    bits, group = packing(config, name)
    if bits is None:
        return {}
    return {
        "BITS": bits,
        "BINS": (1 << bits) - 1,
        "EACH": 32 // bits,  # columns of a word
        "LANES": group * bits // 32,  # words of a group, one for each lane
    }


def _operand(config: AttentionConfig, name: str) -> dict[str, Any]:
    width = config.head_dim if name == "k" else config.v_dim
    pairs = config.rotary_dim // 2 if name == "k" and config.rope is not None else 0
    bits, group = packing(config, name)
    return {
        "name": name,
        "width": width,
        "pairs": pairs,
        "columns": width - pairs,
        "words": width * (bits or 0) // 32,
        "groups": width // group,
        "constants": _packed(config, name) if config.quantized_apart else {},
    }


APPEND = Append()
