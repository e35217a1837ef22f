"""What a config puts at each hook of the attention templates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from metalgen.bounds import shift_of, takes_tanh
from metalgen.config import AttentionConfig
from metalgen.inputs import asked_for
from metalgen.schedule import Schedule, share, value_width

LN2 = math.log(2)
HALF_UNIT = f"{2 / LN2:.9e}f"
"""What makes an exponent of 2 of half of a natural score."""
Feature = Callable[..., Any]
"""``feature(name, **variables)``: the macros of a feature file."""


def hooks(
    config: AttentionConfig, schedule: Schedule, target: str, family: str, feature: Feature
) -> dict[str, Any]:
    """The template's variables of all features.

    ``places``: whose rows and keys a group has; ``pages``; ``key_arrays``: what K and V are read
    from; ``scores``, ``adds``, ``masks``, ``probabilities``, ``outputs``: features with macros for
    these hooks; ``parts``: files of the target's header; ``constants``, and ``lines`` of constants.
    """
    packed = family == "decode"
    names = asked_for(config)
    score = _score(config, feature)
    shift = shift_of(config)
    places = {}
    if config.varlen:
        places["varlen"] = feature("varlen")
    if config.has_lengths:
        places["kv_lens"] = feature("kv_lens", varlen=config.varlen)
    pages = {"paged": feature("paged")} if config.page_size is not None else {}
    adds = {name: feature(name) for name in ("alibi", "bias") if getattr(config, name)}
    lines = list(score.pop("score_constants"))
    if shift is not None:
        lines.append(f"constexpr float SHIFT = {shift:.9e}f;")
    if config.sinks:
        lines.append(f"constexpr float HALF_LOG2E = {0.5 / LN2:.9e}f;")
    if adds:
        score["unit"] = HALF_UNIT
    constants = {}
    if config.page_size is not None:
        constants["PAGE"] = config.page_size
    if config.kv_bits is not None:
        constants |= {"KV_BITS": config.kv_bits, "KV_GROUP": config.kv_group}
    if config.deterministic and schedule.splits > 1:
        constants["SHARE"] = share(schedule)
    if config.dropout:
        dropped = min(round(config.dropout * 2**32), 2**32 - 1)
        lines.append(f"constexpr unsigned int DROPPED = {dropped}u;")
    position = "sequence == sequences ? 0 : rope_offset[sequence]"
    return {
        "hook_constants": constants,
        "lines": lines,
        "parts": [
            name
            for name, used in (
                ("paged", config.page_size is not None),
                ("quantized", config.kv_bits is not None),
                ("rotary", config.rope is not None),
                ("dropout", config.dropout > 0),
            )
            if used
        ],
        "bounded": shift is not None,
        "varlen": config.varlen,
        "paged": config.page_size is not None,
        "one_page": config.page_size is not None and config.page_size % schedule.bk == 0,
        "quantized": config.kv_bits is not None,
        "sequences": config.varlen
        or config.has_lengths
        or config.rope is not None
        or config.dropout > 0,
        "chunked": config.max_work is not None,
        "deterministic": config.deterministic and schedule.splits > 1,
        "key_arrays": ["k", "v", *(n for n in names if n[:2] in ("k_", "v_"))],
        "own_keys": own_keys(schedule),
        "value_part_bytes": _value_part_bytes(config, schedule),
        "tf32": config.tf32,
        "rope": config.rope,
        "turned": config.turned,
        "first_position": position if config.varlen else "rope_offset[sequence]",
        "places": places,
        "pages": pages,
        "adds": adds,
        "reads_rows": config.array_mask,
        "dropout": config.dropout > 0,
        "masks": [feature(name) for name in _masks(config)],
        "probabilities": [feature("dropout", BK=schedule.bk, k0=own_keys(schedule)[0])]
        if config.dropout
        else [],
        "outputs": [feature("sinks", less=score.pop("less"))] if config.sinks else [],
        "kept": f" * {1 / (1 - config.dropout):.9e}f" if config.dropout else "",
        "functions": _functions(config, target, packed),
        "listed": config.block_mask,
        "whole": _whole(config),
        **score,
    }


def own_keys(schedule: Schedule) -> tuple[str, str]:
    """What a kernel calls a simdgroup's first key of a pass, and the one behind its last."""
    return ("k_own", "k_own + OWN_KEYS") if schedule.key_simdgroups > 1 else ("k0", "k0 + BK")


def _value_part_bytes(config: AttentionConfig, schedule: Schedule) -> dict[str, int]:
    """Bytes of a threadgroup's share of a row, by array of the values."""
    width = value_width(config, schedule)
    if config.kv_bits is None:
        return {"v": width * config.itemsize}
    groups = width // config.kv_group * config.itemsize
    return {"v": width * config.kv_bits // 8, "v_scales": groups, "v_biases": groups}


@dataclass(frozen=True)
class Function:
    """A printed score or mask function; ``role`` is ``"score"`` or ``"mask"``."""

    role: str
    group: tuple[str, ...]
    row: tuple[str, ...]
    element: tuple[str, ...]
    result: str


def graphs(config: AttentionConfig) -> dict[str, Any]:
    """The graphs of a config's score and mask functions, by role."""
    from metalgen.dsl.graph import parse

    texts = {"score": config.score_mod, "mask": config.mask_mod}
    return {role: parse(text) for role, text in texts.items() if text is not None}


def extra_inputs(config: AttentionConfig) -> list[str]:
    """A kernel's inputs beside q, k, v and the scale, in order."""
    from metalgen.dsl.printer import array_names

    names = ["block_mask"] if config.block_mask else []
    for role, graph in graphs(config).items():
        names += array_names(graph, role)
    names += asked_for(config)
    return names + (["chunk"] if config.max_work is not None else [])


def _functions(config: AttentionConfig, target: str, packed: bool) -> list[Function]:
    from metalgen.dsl.printer import print_graph

    places = {"score": "score", "b": "batch", "h": "head", "q": "q_idx", "kv": "kv_idx"}
    if packed:  # rows of several heads
        places["h"] = "q_head"
    if config.varlen:
        places["b"] = "sequence"
    rows = ("h", "q") if packed else ("q",)
    found = []
    for role, graph in graphs(config).items():
        printed = print_graph(graph, target, role, places, rows)
        found.append(Function(role, printed.group, printed.row, printed.element, printed.result))
    return found


def _whole(config: AttentionConfig) -> str:
    """What else it takes for a tile to need no mask."""
    if config.mask_mod is None:
        return ""
    return " && unmasked" if config.block_mask else " && false"


def _masks(config: AttentionConfig) -> list[str]:
    found = {
        "causal": config.causal,
        "window_left": config.window_left is not None,
        "window_right": config.window_right is not None,
        "paged": config.page_size is not None,
        "array_mask": config.array_mask,
    }
    return [name for name, used in found.items() if used]


def _score(config: AttentionConfig, feature: Feature) -> dict[str, Any]:
    """What fills the score hook: features, and how their scores become exponents of 2."""
    found: dict[str, Any] = {"scores": [], "score_constants": [], "lse_shift": "", "less": ""}
    if config.score_mod is not None:  # its scores are natural ones
        constant = f"const float score_scale = scale2 * {LN2:.9e}f;"
        return found | {"score_constants": [constant], "unit": HALF_UNIT, "base_unit": "1.0f"}
    if config.softcap is None:
        if config.alibi or config.bias:
            constant = f"const float half_scale = scale2 * {LN2 / 2:.9e}f;"
            found |= {"score_constants": [constant], "base_unit": "half_scale"}
        return found | {"unit": "scale2"}
    cap = config.softcap
    exact = takes_tanh(config)
    # scale2 is in units of log2: times ln 2 / C it is that of x / C, times 2 / C that of 2 x / C.
    inner, natural = (LN2 / cap, cap) if exact else (2 / cap, 2 * cap)
    return found | {
        "scores": [feature("softcap", exact=exact)],
        "score_constants": [
            f"const float cap_in = scale2 * {inner:.9e}f;",
            f"constexpr float UNIT = {natural / LN2:.9e}f;",
        ],
        "unit": "UNIT",
        "base_unit": f"{natural / 2:.9e}f",
        "lse_shift": "" if exact else f" + {cap:.9e}f",
        "less": "" if exact else f" - {cap:.9e}f",
    }
