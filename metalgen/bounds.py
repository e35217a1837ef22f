"""Scores that are bounded, and need no online maximum."""

from __future__ import annotations

import math

from metalgen.features.fields import Fields

LN2 = math.log(2)
TOP, BOTTOM = 36, -109
"""Exponents of 2 that a probability may have where its row's maximum is not known: 2^40 of the
largest, times values of 2^40, sum to a float32 number, and the smallest keeps all of its bits. In a
row whose every score is near the low end, products with values below 2^-17 may be subnormal."""


def shift_of(config: Fields) -> float | None:
    """What is added to every exponent of 2 instead of a row's maximum being subtracted.

    A softcap C bounds scores to -C and C. A softmax does not change with what is subtracted from
    all scores of a row: usually their maximum, because nothing else is sure to keep exponentials
    finite. With -C to C within the exponents that a probability may have, a constant does.

    Returns:
        The shift; None where scores have no bound, or too wide a one for the type of probabilities.
    """
    if config.softcap is None or config.alibi or config.bias or config.dtype == "float16":
        return None
    width = 2 * config.softcap / LN2
    if width > TOP - BOTTOM:
        return None
    top = min(TOP, width / 2)
    # Scores of kernels reach 0 in bfloat16, and width / 2 in float32 (features/softcap.jinja).
    return top - width / 2 if config.dtype == "float32" else top
