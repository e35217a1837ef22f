"""What a measurement was taken of: a digest of the very sources that a call runs.

The template hash names files, so any edit changes it. The source hash names kernels: it stays
where an edit leaves a kernel as it was, and `metalgen.database.refresh` keeps such rows.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection

from metalgen.errors import MetalgenError
from metalgen.families import Schedule, decode_schedule, get_family, language_of
from metalgen.problem.config import AttentionConfig
from metalgen.source.hashes import present_templates, template_hash

FAULTS = (MetalgenError, ValueError, RecursionError)
"""What reading keys of configs and schedules may raise."""


def source_hash(config: AttentionConfig, schedule: Schedule) -> str:
    """16 hexadecimal digits that change when anything that a call compiles or launches does.

    Covers header, body, arguments, math mode, threads and shared memory of the family's kernel,
    and of the combine step where the schedule splits. Comments, spacing and the kernels' names,
    which are hashes themselves, do not count.

    Raises:
        InvalidSchedule, ArgumentError: as `metalgen.source.render.render`.
    """
    return _source_hash(config, schedule, template_hash(schedule))


class Present:
    """What the present templates make of kernels, by their keys; each is rendered once."""

    def __init__(self) -> None:
        self._sources: dict[tuple[str, str, str, str], str | None] = {}
        self._schedules: dict[tuple[str, str, str], Schedule | None] = {}

    @property
    def template_hashes(self) -> Collection[str]:
        """The present hashes of all families and kinds."""
        return present_templates()

    def template_hash(self, family: str, schedule: str, language: str) -> str:
        """The present hash of a kernel's family and kind, by the schedule's key; empty: no kind."""
        found = self._schedule(family, schedule, language)
        return template_hash(found) if found else ""

    def source_hash(self, family: str, config: str, schedule: str, language: str) -> str | None:
        """The source hash of a kernel, by the keys of its config and schedule; None: no kernel."""
        kernel = (family, config, schedule, language)
        if kernel not in self._sources:
            found = self._schedule(family, schedule, language)
            try:
                made = AttentionConfig.from_dict(json.loads(config))
                self._sources[kernel] = source_hash(made, found) if found else None
            except FAULTS:
                self._sources[kernel] = None
        return self._sources[kernel]

    def _schedule(self, family: str, key: str, language: str) -> Schedule | None:
        own = (family, key, language)
        if own not in self._schedules:
            try:
                self._schedules[own] = decode_schedule(json.loads(key), family, language)
            except FAULTS:
                self._schedules[own] = None
        return self._schedules[own]


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
