"""Softcap: scores x become C tanh(x / C)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from metalgen.arguments import as_number
from metalgen.bounds import shift_of, takes_tanh
from metalgen.errors import ArgumentError
from metalgen.features.base import Feature, Field, Hooks, Macros, Site, unused
from metalgen.features.fields import Fields

LN2 = math.log(2)


def _cap(name: str, value: Any, config: Fields) -> float | None:
    if value is None:
        return None
    number = as_number(value)
    if number is None or not 1e-3 <= number <= 1e6:
        raise ArgumentError(name, "a number from 0.001 to 1000000", value)
    return number


class Softcap(Feature):
    """Bounds scores, before anything is added to them."""

    name = "softcap"
    fields = (Field("softcap", _cap, None, "softcap", counted=True),)
    variables = unused(bounded=False)

    def words(self, config: Fields) -> Iterable[str]:
        yield f"softcap{config.softcap:g}"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        cap = config.softcap
        assert cap is not None
        exact = takes_tanh(config)
        # scale2 is in units of log2: times ln 2 / C it is that of x / C, times 2 / C that of
        # 2 x / C.
        inner, natural = (LN2 / cap, cap) if exact else (2 / cap, 2 * cap)
        lines = [
            f"const float cap_in = scale2 * {inner:.9e}f;",
            f"constexpr float UNIT = {natural / LN2:.9e}f;",
        ]
        if (shift := shift_of(config)) is not None:
            lines.append(f"constexpr float SHIFT = {shift:.9e}f;")
        return Hooks(
            maps=[Macros("softcap", {"exact": exact})],
            lines=lines,
            variables={
                "bounded": shift is not None,
                "unit": "UNIT",
                "base_unit": f"{natural / 2:.9e}f",
                "unbounded": False,
                "lse_shift": "" if exact else f" + {cap:.9e}f",
                "less": "" if exact else f" - {cap:.9e}f",
            },
        )
