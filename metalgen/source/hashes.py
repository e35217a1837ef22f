"""The template hash: digits that change when a kernel of a family and a kind might.

It covers the templates that may be loaded for it, and the modules behind what is rendered, both
found by following references. Features count for all families, since configs are made of them; so
do Python and templates from outside of metalgen.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from metalgen.families import FAMILIES, Schedule
from metalgen.features import FEATURES
from metalgen.features.base import Feature
from metalgen.imports import code_digest, modules_behind
from metalgen.kinds import KINDS
from metalgen.resources import template_roots
from metalgen.schedules import schedule_types
from metalgen.source.templates import find_template, templates_behind

START = "metalgen.source.render"
"""What renders, and with what it imports decides what templates substitute."""
REGISTRIES = ("metalgen.families.registry", "metalgen.features", "metalgen.kinds")
"""Modules that import families, kinds and features to list them."""


def template_hash(schedule: Schedule | type[Schedule]) -> str:
    """16 hexadecimal digits that change when a kernel of a schedule's family and kind might."""
    made = schedule if isinstance(schedule, type) else type(schedule)
    return _hash(made, tuple(FEATURES.values()), template_roots())


def template_hashes(family: str, language: str) -> frozenset[str]:
    """The present hashes of a family with every kind of a language."""
    types = (made for made in schedule_types() if made.family == family)
    return frozenset(template_hash(made) for made in types if made.language == language)


def named_hashes() -> dict[str, str]:
    """All present hashes, by ``family/kind``, or ``family/language`` where there is no kind."""
    types = schedule_types()
    return {f"{made.family}/{made.kind or made.language}": template_hash(made) for made in types}


def present_templates() -> frozenset[str]:
    """All present hashes; rows of any other do not count."""
    return frozenset(named_hashes().values())


def hashed_modules(made: type[Schedule]) -> tuple[str, ...]:
    """Names of the modules that a template hash covers."""
    family = FAMILIES[made.family]
    own = [family, *family.possible_steps, *FEATURES.values()]
    if made.kind:
        own.append(KINDS[made.kind])
    others = (*FAMILIES.values(), *KINDS.values(), *FEATURES.values())
    starts = sorted({START, *map(_module, own)})
    return modules_behind(starts, REGISTRIES, {*map(_module, others)})


def hashed_templates(made: type[Schedule]) -> tuple[str, ...]:
    """Names of the templates that a template hash covers."""
    kind = KINDS[made.kind].templates if made.kind else ""
    return templates_behind(FAMILIES[made.family].possible_steps, made.language, kind)


@functools.lru_cache(maxsize=1 << 8)
def _hash(made: type[Schedule], features: tuple[Feature, ...], roots: tuple[Path, ...]) -> str:
    names = f"{made.family}\0{made.kind}\0{made.language}\0{[each.name for each in features]}\0"
    digest = hashlib.sha256(names.encode() + code_digest(hashed_modules(made)))
    for name in hashed_templates(made):
        path = find_template(name)
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _module(thing: object) -> str:
    return type(thing).__module__
