"""The template hash: digits that change when a kernel that is rendered might."""

from __future__ import annotations

import functools
import hashlib

from metalgen.families import FAMILIES
from metalgen.imports import code_digest
from metalgen.kinds import KINDS
from metalgen.languages import LANGUAGES
from metalgen.resources import templates_dir

START = "metalgen.source.render"
"""What renders, and with what it imports decides what templates substitute."""


@functools.cache
def template_hash(family: str = "forward", language: str = "metal") -> str:
    """16 hexadecimal digits that change when a source rendered in a language might.

    Covers all templates but those of other languages and their kinds, and the modules by which
    they are rendered (`metalgen.imports.code_digest`).
    """
    root = templates_dir()
    others = {other for other in LANGUAGES if other != language}
    others |= {kind.name for kind in KINDS.values() if kind.language != language}
    digest = hashlib.sha256(code_digest(START))
    for path in sorted(root.rglob("*.jinja")):
        parts = path.relative_to(root).with_suffix("").parts
        if not others & {*parts}:
            digest.update("/".join(parts).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def present_templates() -> set[str]:
    """The template hashes of all families and languages; rows of any other do not count."""
    return {template_hash(family, language) for family in FAMILIES for language in LANGUAGES}
