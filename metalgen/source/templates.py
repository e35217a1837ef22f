"""Which templates a kernel is rendered from: where they are, and which ones they load."""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from metalgen.families import Step
from metalgen.resources import MissingResource, template_roots

_REFERENCE = re.compile(
    r"{%[-+]?\s*(?:import|include|extends|from)\s+(.*?)"
    r"(?:\s+(?:import|as|with|without|ignore)\s.*?)?\s*[-+]?%}",
    re.DOTALL,
)
_COMMENT = re.compile(r"{#.*?#}", re.DOTALL)


def libraries(language: str, kind: str) -> dict[str, str]:
    """Names of the templates that families' templates load by a variable.

    Args:
        language: name of a language.
        kind: folder of a matrix kind; empty for kernels without matrix products.
    """
    found = {"language_library": f"languages/{language}/language.jinja"}
    return found | ({"tile_library": f"kinds/{kind}/tile.jinja"} if kind else {})


def header_of(language: str, kind: str) -> str:
    """Name of the template of a kernel's header; arguments as of `libraries`."""
    return f"kinds/{kind}/header.jinja" if kind else f"languages/{language}/header.jinja"


def body_of(step: Step) -> str:
    """Name of the template of a kernel's body."""
    return f"families/{step.template}.jinja"


def feature_macros(name: str) -> str:
    """Name of the template of a feature's macros."""
    return f"features/{name}.jinja"


def templates_behind(steps: Iterable[Step], language: str, kind: str) -> tuple[str, ...]:
    """Names of the templates that steps of a family may load, sorted.

    Where a template computes a name, all that the name may be; of features, all.
    """
    steps = tuple(steps)
    variables = libraries(language, kind)
    left = [header_of(language, kind), *map(body_of, steps)]
    if any(step.has_hooks for step in steps):
        left += _matching(feature_macros("*"))
    found: set[str] = set()
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            for pattern in references(find_template(name).read_text(encoding="utf-8"), variables):
                left += _matching(pattern)
    return tuple(sorted(found))


def references(source: str, variables: Mapping[str, str]) -> list[str]:
    """Patterns of the names of templates that a template's source loads.

    Args:
        source: of the template.
        variables: names that are known; ``*`` stands for what else is computed.
    """
    expressions = _REFERENCE.findall(_COMMENT.sub("", source))
    return ["".join(_parts(expression, variables)) for expression in expressions]


def _parts(expression: str, variables: Mapping[str, str]) -> Iterable[str]:
    for part in map(str.strip, expression.split("~")):
        text = re.fullmatch(r"\"([^\"]*)\"|'([^']*)'", part)
        yield (text[1] or text[2] or "") if text else variables.get(part, "*")


def _matching(pattern: str) -> list[str]:
    return fnmatch.filter(_names(template_roots()), pattern) if "*" in pattern else [pattern]


def find_template(name: str) -> Path:
    """The file of a template: the first among the folders in which templates are looked for.

    Raises:
        MissingResource: there is none.
    """
    for root in template_roots():
        if (path := root / name).is_file():
            return path
    raise MissingResource(f"templates: expected a file {name}, but found none")


@functools.lru_cache(maxsize=8)
def _names(roots: tuple[Path, ...]) -> tuple[str, ...]:
    return tuple(
        path.relative_to(root).as_posix() for root in roots for path in root.rglob("*.jinja")
    )
