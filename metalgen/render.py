"""From a config and a schedule to the source of a kernel. Knows no device."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalgen.config import AttentionConfig
from metalgen.errors import ArgumentError
from metalgen.resources import templates_dir
from metalgen.schedule import (
    FRAGMENT,
    Limits,
    Schedule,
    check_schedule,
    threadgroup_bytes,
    value_width,
)
from metalgen.targets import CUDA, TARGETS
from metalgen.tiles import padded

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
        inputs: ``q``, ``k``, ``v`` (for Metal viewed as bytes), and ``scale``, which comes times
            log2(e); then ``block_mask`` where the config has one, the captured arrays of score and
            mask, what `metalgen.inputs.Inputs` names, and ``chunk`` with `max_work`: batch entry,
            head (or KV head) and block of rows where a dispatch begins.
        outputs: ``out``; then ``sums`` where a combine step follows (for each row, half of an
            exponent of 2 and the sum of exponentials in units of that power), else ``lse`` where
            the config asks for it.
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
    from metalgen.hooks import extra_inputs

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
        inputs=("parts", "sums") if combine else ("q", "k", "v", "scale", *extra_inputs(config)),
        outputs=("out", *(["sums"] if context["partial"] else ["lse"] if context["lse"] else [])),
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
    names = ("forward", "places", "combine")  # forward and decode are one template
    files = [root / "families" / f"{name}.jinja" for name in names]
    files += sorted((root / "features").glob("*.jinja"))
    files += sorted((root / "targets" / target).glob("*.jinja"))
    digest = hashlib.sha256()
    plan = {"metal": "plan.py", "cuda": "plan_cuda.py"}[target]
    modules = plan, "tiles.py", "targets.py", "bounds.py", "hooks.py", "dsl/printer.py"
    here = Path(__file__)
    for path in [*files, *(here.parent / module for module in modules), here]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _context(
    config: AttentionConfig, schedule: Schedule, target: str, family: str
) -> dict[str, Any]:
    facts = TARGETS[target]
    rows = facts.row_block * schedule.row_blocks
    width = config.v_dim if family == "combine" else value_width(config, schedule)
    constants = {
        "D": config.head_dim,
        "DV": width,
        "BQ": schedule.bq,
        "BK": schedule.bk,
        "SIMDGROUPS": schedule.simdgroups,
        "ROW_BLOCKS": schedule.row_blocks,
        "ROWS": rows,
        "K_FRAGMENTS": schedule.bk // schedule.key_simdgroups // FRAGMENT,
        "V_FRAGMENTS": padded(width, facts) // FRAGMENT,
        "HEADS_PER_KV": config.heads_per_kv,
    }
    parts = schedule.joined > 1 and family == "decode"
    if schedule.joined > 1:
        constants["SPLITS"] = schedule.joined if family == "combine" else schedule.splits
    if schedule.key_simdgroups > 1:
        constants["KEY_SIMDGROUPS"] = schedule.key_simdgroups
        constants["OWN_KEYS"] = schedule.bk // schedule.key_simdgroups
    if schedule.value_parts > 1:
        constants["VALUE_PARTS"] = schedule.value_parts
    for name in ("window_left", "window_right"):
        if (bound := getattr(config, name)) is not None:
            constants[name.upper()] = bound
    from metalgen.hooks import hooks

    own = _metal(config, schedule) if target == "metal" else _cuda(config, schedule, family)
    hooked = hooks(config, schedule, target, family, _feature)
    steps = own["plan"].steps
    return (
        own
        | hooked
        | {
            "tile_library": f"targets/{target}/tile.jinja",
            "constants": constants | own["constants"] | hooked["hook_constants"],
            "schedule": schedule,
            "k_steps": [step for step in steps if step.operand == "k"],
            "v_steps": [step for step in steps if step.operand == "v"],
            "longest_first": config.causal,
            "packed": family == "decode",
            "lse": config.return_lse,
            "partial": parts,
            "Out": "float" if parts else own["T"],
        }
    )


def _metal(config: AttentionConfig, schedule: Schedule) -> dict[str, Any]:
    from metalgen import plan

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


def _cuda(config: AttentionConfig, schedule: Schedule, family: str) -> dict[str, Any]:
    from metalgen import plan_cuda

    own = plan_cuda.cuda_plan(config, schedule)
    constants = {
        "D_STEPS": padded(config.head_dim, CUDA) // (8 if config.dtype == "float32" else 16),
        "THREADS": schedule.threads,
        "STAGES": schedule.buffers,
        "Q_TILE": own.q_tile,
        "KV_TILE": own.kv_tile,
    }
    if config.causal and family == "forward" and not config.varlen:
        constants["CACHED_KEYS"] = plan_cuda.cached_keys(config)
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
