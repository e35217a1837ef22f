"""From a config and a schedule to the source of a kernel. Knows no device."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metalgen.families import Limits, Schedule, Step, check_schedule, get_family
from metalgen.families.operands import attention_operands
from metalgen.kinds import Kind, get_kind, value_width
from metalgen.languages import LANGUAGES
from metalgen.problem.config import AttentionConfig
from metalgen.resources import templates_dir

if TYPE_CHECKING:
    import jinja2

COMBINE_THREADS = 128
_LARGEST = {"metal": Limits(), "cuda": Limits(232448, 1024, "cuda")}
"""The largest limits of any chip by language: for CUDA those of compute capability 9.0."""


@dataclass(frozen=True)
class KernelSource:
    """A rendered kernel: what ``mx.fast.metal_kernel`` or ``cuda_kernel`` needs, and its launch.

    Args:
        name: the kernel's name; it ends in a hash of the source, so one name is one kernel.
        header, source: text before the kernel's function, and its body.
        inputs: ``q``, ``k``, ``v`` (for Metal viewed as bytes), and ``scale``, which comes times
            log2(e); then ``block_mask`` where the config has one, the captured arrays of score and
            mask, what `metalgen.problem.inputs.Inputs` names, and ``chunk`` with `max_work`: batch
            entry, head (or KV head) and block of rows where a dispatch begins.
        outputs: ``out``; then ``sums`` where a combine step follows (for each row, half of an
            exponent of 2, and the sum of exponentials in units of that power), else ``lse`` where
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


def render(config: AttentionConfig, schedule: Schedule, step: Step | None = None) -> KernelSource:
    """The kernel of a step of a schedule's family.

    Args:
        config: what to compute.
        schedule: how; it names the family, and by its matrix kind the language.
        step: one of the family's steps; None: its main one.

    Raises:
        InvalidSchedule: the schedule breaks a rule (of the largest limits; a chip's are checked
            when a schedule is chosen).
    """
    from metalgen.source.hooks import extra_inputs

    kind = get_kind(schedule.kind)
    step = step or get_family(schedule.family).main
    check_schedule(config, schedule, _LARGEST[kind.language])
    context = _context(config, schedule, kind, step)
    env = _environment()
    header = env.get_template(f"kinds/{kind.name}/header.jinja").render(context)
    body = _tidy(env.get_template(f"families/{step.template}.jinja").render(context))
    math_mode = "safe" if step.merges else getattr(schedule, "math_mode", "safe")
    digest = hashlib.sha256(f"{header}\0{body}\0{math_mode}".encode()).hexdigest()[:10]
    dtype = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[config.dtype]
    return KernelSource(
        name=f"metalgen_{step.name}_{dtype}_d{config.head_dim}_{digest}",
        header=header,
        source=body,
        inputs=("parts", "sums")
        if step.merges
        else ("q", "k", "v", "scale", *extra_inputs(config)),
        outputs=("out", *(["sums"] if context["partial"] else ["lse"] if context["lse"] else [])),
        math_mode=math_mode,
        threads=COMBINE_THREADS if step.merges else schedule.threads,
        bq=schedule.bq,
        shared_memory=0 if step.merges else kind.dynamic_bytes(config, schedule),
    )


def _context(config: AttentionConfig, schedule: Schedule, kind: Kind, step: Step) -> dict[str, Any]:
    from metalgen.source.hooks import hooks

    few_rows = get_family(schedule.family).few_rows
    sharing = getattr(schedule, "key_simdgroups", 1)
    splits = getattr(schedule, "splits", 1)
    width = config.v_dim if step.merges else value_width(config, schedule)
    constants = {
        "D": config.head_dim,
        "DV": width,
        "BQ": schedule.bq,
        "BK": schedule.bk,
        "SIMDGROUPS": schedule.simdgroups,
        "ROW_BLOCKS": schedule.row_blocks,
        "ROWS": kind.row_block * schedule.row_blocks,
        "K_FRAGMENTS": schedule.bk // sharing // 8,
        "V_FRAGMENTS": kind.padded(width) // 8,
        "HEADS_PER_KV": config.heads_per_kv,
    }
    partial = schedule.partials > 1 and not step.merges
    if schedule.partials > 1:
        constants["SPLITS"] = schedule.partials if step.merges else splits
    if sharing > 1:
        constants["KEY_SIMDGROUPS"] = sharing
        constants["OWN_KEYS"] = schedule.bk // sharing
    if schedule.value_parts > 1:
        constants["VALUE_PARTS"] = schedule.value_parts
    for name in ("window_left", "window_right"):
        if (bound := getattr(config, name)) is not None:
            constants[name.upper()] = bound

    plan = kind.plan(attention_operands(config, schedule, head_rows=few_rows), schedule)
    element = LANGUAGES[kind.language].elements[config.dtype]
    wide = getattr(schedule, "fragment", "input") == "float32"
    hooked = hooks(config, schedule, kind.language, schedule.family, _feature)
    return hooked | {
        "plan": plan,
        "T": element,
        "F": "float" if wide else element,
        "language_library": f"languages/{kind.language}/language.jinja",
        "tile_library": f"kinds/{kind.name}/tile.jinja",
        "constants": constants | plan.constants | hooked["hook_constants"],
        "schedule": schedule,
        "key_simdgroups": sharing,
        "splits": splits,
        "longest_first": config.causal,
        "packed": few_rows,
        "lse": config.return_lse,
        "partial": partial,
        "Out": "float" if partial else element,
    }


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
    """Indent by braces, drop spare blank lines: templates need not mind layout."""
    lines: list[str] = []
    depth = 1
    for raw in text.splitlines():
        line = raw.strip()
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
