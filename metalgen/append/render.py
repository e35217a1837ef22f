"""From a config and a schedule to the source of an append kernel. Knows no device."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from metalgen.arguments import as_integer
from metalgen.errors import ArgumentError, InvalidSchedule
from metalgen.languages import LANGUAGES
from metalgen.problem.config import AttentionConfig
from metalgen.source.render import KernelSource, _environment, _tidy

THREADS = (32, 64, 128, 256, 512, 1024)
ELEMENTS = (1, 2, 4, 8, 16, 32, 64)
MAX_BYTES = 32768
"""Most bytes of threadgroup memory, as on Apple's GPUs."""

_TYPES = {
    "metal": {"float16": "half", "bfloat16": "bfloat", "float32": "float"},
    "cuda": {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"},
}
_HEADERS = {
    "metal": "#include <metal_simdgroup>\n#include <metal_math>\n\nusing namespace metal;\n",
    "cuda": "",
}


@dataclass(frozen=True)
class AppendSchedule:
    """How an append kernel runs.

    Args:
        threads: threads a threadgroup: 32 to 1024, a power of two.
        elements: columns that a thread makes, 1 to 64, a power of two; together they say how many
            rows a threadgroup takes: one at least, and no more than threads.
    """

    threads: int = 128
    elements: int = 8

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("threads", self.threads, THREADS),
            ("elements", self.elements, ELEMENTS),
        ):
            number = as_integer(value)
            if number is None or number not in choices:
                raise ArgumentError(name, f"one of {', '.join(map(str, choices))}", value)
            object.__setattr__(self, name, number)

    def rows(self, config: AttentionConfig) -> int:
        """Rows of a threadgroup.

        Raises:
            InvalidSchedule: they would take too much threadgroup memory.
        """
        width = max(config.head_dim, config.v_dim)
        rows = min(self.threads, max(1, self.threads * self.elements // width))
        a_row = 8 + 4 * (config.rope is not None)  # where it stands, and its position
        if config.kv_bits is not None:
            a_row += width * config.itemsize
        if rows * a_row > MAX_BYTES:
            detail = f"{rows} rows of {a_row} bytes take more than {MAX_BYTES}"
            raise InvalidSchedule("threadgroup memory", detail)
        return rows


def is_placed(config: AttentionConfig) -> bool:
    """Whether rows go to places of their own, rather than all behind one slot."""
    return config.has_lengths


def operands(config: AttentionConfig) -> tuple[str, ...]:
    """What the kernel makes rows of: k and v, k alone, or nothing that there is to make.

    Where rows go as they are into one slice of the cache, MLX needs no kernel for that.
    """
    if is_placed(config) or config.kv_bits is not None:
        return ("k", "v")
    return ("k",) if config.rope is not None else ()


def outputs(config: AttentionConfig) -> tuple[str, ...]:
    """Names of what the kernel makes, in order."""
    parts = ("rows",) if config.kv_bits is None else ("words", "scales", "biases")
    names = [f"{x}_{part}" for x in operands(config) for part in parts]
    return (*names, "places") if is_placed(config) else tuple(names)


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
        names += ["rope_freqs", "rope_offset"]
    return tuple(names)


def render_append(
    config: AttentionConfig, schedule: AppendSchedule | None = None, target: str = "metal"
) -> KernelSource:
    """The append kernel of a config.

    Args:
        config: of its fields, what keys and values are and where they go counts: `head_dim`,
            `value_head_dim`, `dtype`, `varlen`, `kv_lens`, `page_size`, `kv_bits`, `kv_group`,
            `rope` and `rope_dims`.

    Raises:
        InvalidSchedule: the schedule takes too much threadgroup memory.
        ArgumentError: an unknown target, or a config for which no kernel is needed.
    """
    if target not in LANGUAGES:
        raise ArgumentError("target", f"one of {', '.join(LANGUAGES)}", target)
    if not operands(config):
        raise ArgumentError("config", "one that places, rotates or quantizes rows", str(config))
    schedule = schedule or AppendSchedule()
    env, header = _environment(), _HEADERS[target]
    body = _tidy(
        env.get_template("families/append.jinja").render(
            language_library=f"languages/{target}/language.jinja",
            T=_TYPES[target][config.dtype],
            constants=_constants(config, schedule),
            operands=[_operand(config, name) for name in operands(config)],
            rope=config.rope,
            bits=config.kv_bits,
            placed=is_placed(config),
            packed=config.varlen,
            page_size=config.page_size,
        )
    )
    digest = hashlib.sha256(f"{header}\0{body}".encode()).hexdigest()[:10]
    kind = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[config.dtype]
    return KernelSource(
        name=f"metalgen_append_{kind}_d{config.head_dim}_{digest}",
        header=header,
        source=body,
        inputs=inputs(config),
        outputs=outputs(config),
        math_mode="safe",  # quantizing needs divisions that are rounded right
        threads=schedule.threads,
        bq=schedule.rows(config),
    )


def _constants(config: AttentionConfig, schedule: AppendSchedule) -> dict[str, int]:
    found = {"ROWS": schedule.rows(config), "THREADS": schedule.threads}
    if config.rope is not None:
        found["PAIRS"] = config.rotary_dim // 2
    if config.page_size is not None:
        found["PAGE"] = config.page_size
    if config.kv_bits is not None:
        bits = config.kv_bits
        found |= {
            "BITS": bits,
            "BINS": (1 << bits) - 1,
            "EACH": 32 // bits,  # columns of a word
            "LANES": config.kv_group * bits // 32,  # words of a group, and who makes them
            "WIDEST": max(config.head_dim, config.v_dim),
        }
    return found


def _operand(config: AttentionConfig, name: str) -> dict[str, Any]:
    width = config.head_dim if name == "k" else config.v_dim
    pairs = config.rotary_dim // 2 if name == "k" and config.rope is not None else 0
    bits = config.kv_bits or 0
    return {
        "name": name,
        "width": width,
        "pairs": pairs,
        "columns": width - pairs,
        "words": width * bits // 32,
        "groups": width // config.kv_group,
    }
