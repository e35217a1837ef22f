"""Softcap: scores x become C tanh(x / C)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from metalgen.arguments import as_number
from metalgen.errors import ArgumentError
from metalgen.features.base import Feature, Field, Hooks, Macros, Site, unused
from metalgen.features.fields import Fields

LN2 = math.log(2)
TOP, BOTTOM = 36, -109
"""Exponents of 2 that a probability may have where its row's maximum is not known: 2^40 of the
largest, times values of 2^40, sum to a float32 number, and the smallest keeps all of its bits. In a
row whose every score is near the low end, products with values below 2^-17 may be subnormal."""
WIDEST_RECIPROCAL = 64
"""Largest softcap of 16-bit types whose rounding does not show: 2^-23 of it is below 1e-5."""


def shift_of(config: Fields) -> float | None:
    """What is added to every exponent of 2 instead of a row's maximum being subtracted.

    A softcap C bounds scores to -C and C. A softmax does not change with what is subtracted from
    all scores of a row: usually their maximum, because nothing else is sure to keep exponentials
    finite. With -C to C within the exponents that a probability may have, a constant does.

    Returns:
        The shift; None where scores have no bound, or too wide a one for the type of probabilities.
    """
    if config.softcap is None or config.dtype == "float16":
        return None
    if any(feature.adds for feature in config.features):
        return None
    width = 2 * config.softcap / LN2
    if width > TOP - BOTTOM:
        return None
    top = min(TOP, width / 2)
    # Scores of kernels reach width / 2 by the tangent, and 0 otherwise (features/softcap.jinja).
    return top - width / 2 if takes_tanh(config) else top


def takes_tanh(config: Fields) -> bool:
    """Whether a softcap is computed by the hyperbolic tangent, not by a reciprocal of 1 + 2^x.

    The reciprocal is cheaper. Its rounding, and that of adding the cap to the log-sum-exp, are of
    the cap's magnitude, whatever the score's.
    """
    return config.softcap is not None and (
        config.dtype == "float32" or config.softcap > WIDEST_RECIPROCAL
    )


def lse_shift(config: Fields) -> float:
    """What is added to the log-sum-exp of scores as kernels have them: they may lack the cap."""
    return 0.0 if config.softcap is None or takes_tanh(config) else config.softcap


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
    has_backward = True
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
