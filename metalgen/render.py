"""From a config and a schedule to the source of a kernel. Knows no device."""

from __future__ import annotations

import functools
import hashlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalgen import plan, plan_cuda
from metalgen.config import AttentionConfig
from metalgen.errors import ArgumentError
from metalgen.resources import templates_dir
from metalgen.schedule import FRAGMENT, Limits, Schedule, check_schedule, padded, threadgroup_bytes
from metalgen.targets import CUDA, TARGETS

if TYPE_CHECKING:
    import jinja2

_METAL_TYPES = {"float16": "half", "bfloat16": "bfloat", "float32": "float"}
_CUDA_TYPES = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}
_TEMPLATES = {"forward": "forward", "decode": "forward", "combine": "combine"}
COMBINE_THREADS = 128
_NO_LIMITS = {"metal": Limits(), "cuda": Limits(232448, 1024, "cuda")}
"""The largest of any chip: those of compute capability 9.0 for CUDA."""


@dataclass(frozen=True)
class KernelSource:
    """A rendered kernel: what ``mx.fast.metal_kernel`` or ``cuda_kernel`` needs, and its launch.

    Args:
        name: the kernel's name; it ends in a hash of the source, so one name is one kernel.
        header, source: text before the kernel's function, and its body.
        inputs: ``q``, ``k``, ``v`` viewed as bytes, and ``scale``, which comes times log2(e); then
            ``block_mask`` where the config has one, and the captured arrays of score and mask.
        outputs: ``out``, and ``lse`` where the config asks for it.
        math_mode: Metal's ``"safe"``, ``"relaxed"`` or ``"fast"``.
        threads: threads a threadgroup.
        bq: query rows a threadgroup.
        shared_memory: bytes of dynamic shared memory (CUDA).
    """

    name: str
    header: str
    source: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    math_mode: str
    threads: int
    bq: int
    shared_memory: int = 0

    @property
    def text(self) -> str:
        """What ``metalgen render`` prints: the header, then the body that MLX wraps."""
        inputs = ", ".join(self.inputs)
        outputs = ", ".join(self.outputs)
        return (
            f"{self.header}\n// {self.name}({inputs}) -> {outputs}: the body of the kernel;"
            f" MLX writes its signature.\n{self.source}"
        )


def render(
    config: AttentionConfig, schedule: Schedule, target: str = "metal", family: str = "forward"
) -> KernelSource:
    """The kernel of a family for a config and a schedule.

    Args:
        family: ``"forward"``, ``"decode"``, or ``"combine"``, which joins what a decode schedule
            of several splits leaves.

    Raises:
        InvalidSchedule: the schedule breaks a rule (of the largest limits; a chip's are checked
            by whoever chose the schedule).
        ArgumentError: an unknown target or family.
    """
    if target not in TARGETS:
        raise ArgumentError("target", f"one of {', '.join(TARGETS)}", target)
    if family not in _TEMPLATES:
        raise ArgumentError("family", f"one of {', '.join(_TEMPLATES)}", family)
    combine = family == "combine"
    check_schedule(config, schedule, _NO_LIMITS[target], "decode" if combine else family)
    context = _context(config, schedule, target, family)
    env = _environment()
    header = env.get_template(f"targets/{target}/header.jinja").render(context)
    body = _tidy(env.get_template(f"families/{_TEMPLATES[family]}.jinja").render(context))
    digest = hashlib.sha256(f"{header}\0{body}\0{schedule.math_mode}".encode()).hexdigest()[:10]
    kind = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[config.dtype]
    return KernelSource(
        name=f"metalgen_{family}_{kind}_d{config.head_dim}_{digest}",
        header=header,
        source=body,
        inputs=("parts", "part_lse")
        if combine
        else ("q", "k", "v", "scale", *_extra_inputs(config)),
        outputs=("out", "lse") if context["lse"] else ("out",),
        math_mode="safe" if combine else schedule.math_mode,
        threads=COMBINE_THREADS if combine else schedule.threads,
        bq=schedule.bq,
        shared_memory=0
        if combine or target != "cuda"
        else threadgroup_bytes(config, schedule, CUDA),
    )


@functools.cache
def template_hash(family: str = "forward", target: str = "metal") -> str:
    """16 hexadecimal digits that change when a source rendered for a family might.

    Covers the family's templates, all features, the target's tile library, and the modules that
    decide what they substitute.
    """
    root = templates_dir()
    names = ("forward", "combine")  # forward and decode are one template
    files = [root / "families" / f"{name}.jinja" for name in names]
    files += sorted((root / "features").glob("*.jinja"))
    files += sorted((root / "targets" / target).glob("*.jinja"))
    digest = hashlib.sha256()
    plans = {"metal": plan, "cuda": plan_cuda}
    printer = Path(__file__).parent / "dsl" / "printer.py"
    for path in [*files, Path(str(plans[target].__file__)), Path(__file__), printer]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _context(
    config: AttentionConfig, schedule: Schedule, target: str, family: str
) -> dict[str, Any]:
    facts = TARGETS[target]
    rows = facts.row_block * schedule.row_blocks
    constants = {
        "D": config.head_dim,
        "DV": config.v_dim,
        "BQ": schedule.bq,
        "BK": schedule.bk,
        "SIMDGROUPS": schedule.simdgroups,
        "ROW_BLOCKS": schedule.row_blocks,
        "ROWS": rows,
        "K_FRAGMENTS": schedule.bk // FRAGMENT,
        "V_FRAGMENTS": padded(config.v_dim, facts) // FRAGMENT,
        "HEADS_PER_KV": config.heads_per_kv,
    }
    parts = schedule.splits > 1 and family == "decode"
    if schedule.splits > 1:
        constants["SPLITS"] = schedule.splits
    for name in ("window_left", "window_right"):
        if (bound := getattr(config, name)) is not None:
            constants[name.upper()] = bound
    own = _metal(config, schedule) if target == "metal" else _cuda(config, schedule)
    steps = own["plan"].steps
    return own | {
        "tile_library": f"targets/{target}/tile.jinja",
        "constants": constants | own["constants"],
        "schedule": schedule,
        "functions": _functions(config, target, family),
        "listed": config.block_mask,
        "whole": _whole(config),
        "k_steps": [step for step in steps if step.operand == "k"],
        "v_steps": [step for step in steps if step.operand == "v"],
        "masks": [_feature(name) for name in _masks(config)],
        "longest_first": config.causal,
        "packed": family == "decode",
        "lse": config.return_lse or parts,
        "Out": "float" if parts else own["T"],
        **_score(config, target),
    }


@dataclass(frozen=True)
class Function:
    """A printed score or mask function; ``role`` is ``"score"`` or ``"mask"``."""

    role: str
    group: tuple[str, ...]
    row: tuple[str, ...]
    element: tuple[str, ...]
    result: str


_PLACES = {"score": "score", "b": "batch", "h": "head", "q": "q_idx", "kv": "kv_idx"}


def _graphs(config: AttentionConfig) -> dict[str, Any]:
    from metalgen.dsl.graph import parse

    texts = {"score": config.score_mod, "mask": config.mask_mod}
    return {role: parse(text) for role, text in texts.items() if text is not None}


def _extra_inputs(config: AttentionConfig) -> list[str]:
    from metalgen.dsl.printer import array_names

    names = ["block_mask"] if config.block_mask else []
    for role, graph in _graphs(config).items():
        names += array_names(graph, role)
    return names


def _functions(config: AttentionConfig, target: str, family: str) -> list[Function]:
    from metalgen.dsl.printer import print_graph

    packed = family == "decode"  # rows of several heads
    places = _PLACES | {"h": "q_head"} if packed else _PLACES
    rows = ("h", "q") if packed else ("q",)
    found = []
    for role, graph in _graphs(config).items():
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
    }
    return [name for name, used in found.items() if used]


def _score(config: AttentionConfig, target: str) -> dict[str, Any]:
    """What fills the score hook: features, and how their scores become exponents of 2."""
    if config.score_mod is not None:  # its scores are natural ones
        constant = f"const float score_scale = scale2 * {math.log(2):.9e}f;"
        log2e = f"{1 / math.log(2):.9e}f"
        return {"scores": [], "score_constants": [constant], "unit": log2e, "lse_shift": ""}
    if config.softcap is None:
        return {"scores": [], "score_constants": [], "unit": "scale2", "lse_shift": ""}
    cap, ln2 = config.softcap, math.log(2)
    exact = config.dtype == "float32"
    exp2 = {"metal": "fast::exp2({})", "cuda": "mg_exp2({})"}[target]
    # scale2 is in units of log2: times ln 2 / C it is that of x / C, times 2 / C that of 2 x / C.
    inner, unit = (ln2 / cap, cap / ln2) if exact else (2 / cap, 2 * cap / ln2)
    return {
        "scores": [_feature("softcap", exact=exact, exp2=exp2.format)],
        "score_constants": [
            f"const float cap_in = scale2 * {inner:.9e}f;",
            f"constexpr float UNIT = {unit:.9e}f;",
        ],
        "unit": "UNIT",
        "lse_shift": "" if exact else f" + {cap:.9e}f",
    }


def _metal(config: AttentionConfig, schedule: Schedule) -> dict[str, Any]:
    own = plan.forward_plan(config, schedule)
    constants = {"D_FRAGMENTS": padded(config.head_dim) // FRAGMENT}
    if own.staged:
        constants |= {"KV_STRIDE": own.slot_stride, "KV_SLOT": own.slot}
    if own.q_copy:
        constants |= {"Q_STRIDE": own.q_stride}
    element = _METAL_TYPES[config.dtype]
    return {
        "plan": own,
        "constants": constants,
        "T": element,
        "F": "float" if schedule.fragment == "float32" else element,
    }


def _cuda(config: AttentionConfig, schedule: Schedule) -> dict[str, Any]:
    own = plan_cuda.cuda_plan(config, schedule)
    constants = {
        "D_STEPS": padded(config.head_dim, CUDA) // (8 if config.dtype == "float32" else 16),
        "THREADS": schedule.threads,
        "STAGES": schedule.buffers,
        "Q_TILE": own.q_tile,
        "KV_TILE": own.kv_tile,
    }
    return {"plan": own, "constants": constants, "T": _CUDA_TYPES[config.dtype]}


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.fspath(templates_dir())),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        keep_trailing_newline=True,
    )


def _feature(name: str, **variables: Any) -> Any:
    """The macros of a feature file."""
    return _environment().get_template(f"features/{name}.jinja").make_module(variables)


def _tidy(text: str) -> str:
    """Indent by braces, drop spare blank lines and zeros added: templates need not mind layout."""
    lines: list[str] = []
    depth = 1
    for raw in text.splitlines():
        line = re.sub(r"(?<![\w.])0 \+ ", "", raw.strip())
        closes = line.startswith("}")
        if not lines or not lines[-1] or lines[-1].endswith("{") or closes:
            if not line:
                continue
            while closes and lines and not lines[-1]:
                lines.pop()
        depth -= closes
        lines.append("  " * depth + line if line else "")
        depth += line.count("{") - line.count("}") + closes
    return "\n".join(lines).rstrip() + "\n"
