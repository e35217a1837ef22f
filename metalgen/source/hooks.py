"""What the features of a config put at the hooks of the attention templates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from metalgen.features import FEATURES
from metalgen.features.base import HALF_UNIT, Macros, Site
from metalgen.features.bounds import Bounds
from metalgen.problem.config import AttentionConfig

Render = Callable[..., Any]
"""``feature(name, **variables)``: the macros of a feature file."""


def hooks(config: AttentionConfig, site: Site, feature: Render) -> dict[str, Any]:
    """The template's variables of all features.

    ``places``, ``pages``, ``lists``, ``maps``, ``adds``, ``bounds``, ``masks``,
    ``probabilities``, ``outputs``, ``functions``: what stands at these hooks (see
    `metalgen.features.base.Hooks`), with rendered macros; ``parts``: files of the language's
    header; ``hook_constants``, and ``lines`` of declarations; and the variables of each
    feature. ``unit``: what a score is multiplied by to become an exponent of 2. ``natural``:
    whether scores are half of the natural ones, which they are where something is added to
    them; ``base_unit``: what makes them so. ``unbounded``: whether they may be of any size;
    ``large``: from which exponent on rounding must not show.
    """
    found = [each.hooks(config, site) for each in config.features]
    variables = _unused(config)
    for own in found:
        variables |= own.variables
    adds = {name: macros for own in found for name, macros in own.adds.items()}
    lines = list(dict.fromkeys(line for own in found for line in own.lines))
    if adds:
        if variables["base_unit"] == "half_scale":
            lines.append(f"const float half_scale = scale2 * {0.5 * math.log(2):.9e}f;")
        variables |= {"natural": True, "unit": HALF_UNIT}

    def rendered(macros: Any, **more: Any) -> Any:
        if not isinstance(macros, Macros):
            return macros  # a feature from outside may bring functions instead
        return feature(macros.file, **more, **macros.variables)

    def at(hook: str, **more: Any) -> list[Any]:
        return [rendered(macros, **more) for own in found for macros in getattr(own, hook)]

    def named(hook: str, **more: Any) -> dict[str, Any]:
        each = (pair for own in found for pair in getattr(own, hook).items())
        return {name: rendered(macros, **more) for name, macros in each}

    return variables | {
        "hook_constants": {n: value for own in found for n, value in own.constants.items()},
        "lines": lines,
        "parts": [name for own in found for name in own.header],
        "places": at("places"),
        "pages": next((rendered(own.pages) for own in found if own.pages), None),
        "lists": at("lists"),
        "maps": at("maps"),
        "adds": named("adds"),
        "bounds": Bounds(
            tuple(bound for own in found for bound in own.bounds),
            "key" if site.keys_owned else "query",
        ),
        "masks": at("masks"),
        "probabilities": at("probabilities"),
        "outputs": named("outputs", less=variables["less"]),
        "functions": [function for own in found for function in own.functions],
    }


def _unused(config: AttentionConfig) -> dict[str, Any]:
    """What templates substitute of features that a config does not use."""
    variables: dict[str, Any] = {
        "sequences": False,
        "unit": "scale2",
        "base_unit": "half_scale",
        "natural": False,
        "unbounded": True,
        # The largest probability of a row is 2^(ulp / 2) at most: within float16, or float32.
        "large": f"{1 << (28 if config.dtype == 'float16' else 30)}.0f",
        "lse_shift": "",
        "less": "",
    }
    for each in FEATURES.values():
        variables |= each.variables
    return variables
