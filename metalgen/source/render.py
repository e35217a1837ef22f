"""From a config and a schedule to the source of a kernel. Knows no device."""

from __future__ import annotations

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metalgen.families import Limits, Schedule, Step, check_schedule, get_family
from metalgen.kinds import get_kind
from metalgen.languages import Language, get_language
from metalgen.problem.config import AttentionConfig
from metalgen.resources import template_roots
from metalgen.source.templates import body_of, feature_macros, header_of, libraries

if TYPE_CHECKING:
    import jinja2


@dataclass(frozen=True)
class KernelSource:
    """A rendered kernel: what ``mx.fast.metal_kernel`` or ``cuda_kernel`` needs, and its launch.

    Args:
        name: the kernel's name; it ends in a hash of the source, so one name is one kernel.
        header, source: text before the kernel's function, and its body.
        inputs: names, as the family's step declares them. Of attention: ``q``, ``k``, ``v`` (for
            Metal viewed as bytes), and ``scale``, which comes times log2(e); then ``block_mask``
            where the config has one, the captured arrays of score and mask, what
            `metalgen.problem.inputs.Inputs` names, and ``chunk`` with `max_work`: batch entry, head
            (or KV head) and block of rows where a dispatch begins.
        outputs: names. Of attention: ``out``; then ``sums`` where a combine step follows (for each
            row, half of an exponent of 2, and the sum of exponentials in units of that power), else
            ``lse`` where the config asks for it.
        math_mode: Metal's ``"safe"``, ``"relaxed"`` or ``"fast"``.
        threads: threads per threadgroup.
        bq: rows per threadgroup.
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
        schedule: how; it names the family, the matrix kind if there is one, and the language.
        step: one of the family's steps; None: its main one.

    Raises:
        InvalidSchedule: the schedule breaks a rule (of the largest limits; a chip's are checked
            when a schedule is chosen).
    """
    family, language = get_family(schedule.family), get_language(schedule.language)
    step = step or family.main
    limits = Limits(
        language.threadgroup_bytes, language.threads, language.name, language.instructions
    )
    check_schedule(config, schedule, limits)
    context, env = _context(config, schedule, language, step), _environment()
    folder = get_kind(schedule.kind).templates if schedule.kind else ""
    header = env.get_template(header_of(language.name, folder)).render(context)
    body = _tidy(env.get_template(body_of(step)).render(context))
    # The first kernels' names were digests with their math mode; those without products had none.
    mode = step.math_mode(schedule)
    digest = hashlib.sha256("\0".join((header, body, *([mode] if schedule.kind else []))).encode())
    dtype = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[config.dtype]
    return KernelSource(
        name=f"metalgen_{step.name}_{dtype}_d{config.head_dim}_{digest.hexdigest()[:10]}",
        header=header,
        source=body,
        inputs=step.inputs(config, schedule),
        outputs=step.outputs(config, schedule),
        math_mode=mode,
        threads=step.threads(schedule),
        bq=step.rows(config, schedule),
        shared_memory=step.dynamic_bytes(config, schedule),
    )


def _context(
    config: AttentionConfig, schedule: Schedule, language: Language, step: Step
) -> dict[str, Any]:
    from metalgen.source.hooks import hooks

    element = language.types[config.dtype]
    context = step.variables(config, schedule)
    constants = context["constants"]
    context |= {
        "schedule": schedule,
        "T": element,
        "F": "float" if getattr(schedule, "fragment", "input") == "float32" else element,
        "Out": "float" if context.get("partial") else element,
    }
    context |= libraries(language.name, "")
    if (operands := step.operands(config, schedule)) is not None:
        kind = get_kind(schedule.kind)
        plan = kind.plan(operands, schedule)
        constants |= plan.constants
        context |= {"plan": plan} | libraries(language.name, kind.templates)
    if (site := step.site(config, schedule)) is not None:
        hooked = hooks(config, site, _feature)
        constants |= hooked["hook_constants"]
        context = hooked | context
    return context | {"constants": constants}


def _environment() -> jinja2.Environment:
    return _environment_of(template_roots())


@functools.cache
def _environment_of(roots: tuple[Path, ...]) -> jinja2.Environment:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([os.fspath(root) for root in roots]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
        keep_trailing_newline=True,
    )


def _feature(name: str, **variables: Any) -> Any:
    """The macros of a feature file."""
    return _environment().get_template(feature_macros(name)).make_module(variables)


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
