"""Scores that are bounded, and need no online maximum."""

from __future__ import annotations

import math

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
    if config.softcap is None or config.alibi or config.bias or config.dtype == "float16":
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
