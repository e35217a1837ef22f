"""What a measurement was taken of: a digest of the very sources that a call runs.

The template hash names files, so any edit changes it. The source hash names kernels: it stays
where an edit leaves a kernel as it was, and `metalgen.database.refresh` keeps such rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re

from metalgen.errors import MetalgenError
from metalgen.families import Schedule, decode_schedule, get_family, language_of
from metalgen.problem.config import AttentionConfig


def source_hash(config: AttentionConfig, schedule: Schedule) -> str:
    """16 hexadecimal digits that change when anything that a call compiles or launches does.

    Covers header, body, arguments, math mode, threads and shared memory of the family's kernel,
    and of the combine step where the schedule splits. Comments, spacing and the kernels' names,
    which are hashes themselves, do not count.

    Raises:
        InvalidSchedule, ArgumentError: as `metalgen.source.render.render`.
    """
    from metalgen.source.hashes import template_hash

    versions = template_hash(schedule.family, language_of(schedule))
    return _source_hash(config, schedule, versions)


class Present:
    """What the present templates make of kernels, by their keys; each is rendered once."""

    def __init__(self) -> None:
        self._sources: dict[tuple[str, str, str, str], str | None] = {}
        self._templates: dict[str, str] = {}

    def template_hash(self, target: str) -> str:
        """The hash of the present templates."""
        if target not in self._templates:
            from metalgen.source.hashes import template_hash

            self._templates[target] = template_hash(language=target)
        return self._templates[target]

    def source_hash(self, family: str, config: str, schedule: str, target: str) -> str | None:
        """The source hash of a kernel, by the keys of its config and schedule; None: no kernel."""
        place = (family, config, schedule, target)
        if place not in self._sources:
            try:
                self._sources[place] = source_hash(
                    AttentionConfig.from_dict(json.loads(config)),
                    decode_schedule(json.loads(schedule), family, target),
                )
            except (MetalgenError, ValueError, RecursionError):
                self._sources[place] = None
        return self._sources[place]


@functools.lru_cache(maxsize=1 << 12)
def _source_hash(config: AttentionConfig, schedule: Schedule, templates: str) -> str:
    from metalgen.source.render import render

    digest = hashlib.sha256(language_of(schedule).encode())
    for step in get_family(schedule.family).steps(schedule):
        kernel = render(config, schedule, step)
        facts = (
            *(step.name, kernel.inputs, kernel.outputs, kernel.math_mode, kernel.threads),
            *(kernel.bq, kernel.shared_memory),
        )
        digest.update(f"{facts}\0{code_of(kernel.header)}\0{code_of(kernel.source)}\0".encode())
    return digest.hexdigest()[:16]


TEXT_OR_COMMENT = re.compile(
    r"""(?P<text>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*') | //[^\n]* | /\*.*?\*/""",
    re.DOTALL | re.VERBOSE,
)
"""Of C++: the group ``text`` is a string or a character; a comment has none."""


def code_of(source: str) -> str:
    """A C++ source without its comments, its empty lines, and spacing that means nothing."""

    def kept(match: re.Match[str]) -> str:
        text = match["text"]
        return " " if text is None else re.sub(r"\s", lambda m: f"\\u{ord(m[0]):04x}", text)

    lines = (" ".join(line.split()) for line in TEXT_OR_COMMENT.sub(kept, source).splitlines())
    return "\n".join(line for line in lines if line)
