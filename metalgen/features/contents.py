"""What numbers in the arrays of a call must be."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from metalgen.features.arrays import Arrays


def finite(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    """Neither infinite nor NaN."""
    import numpy as np

    yield ~np.isfinite(values), "a finite number"


def finite_or_masked(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    """The same, or -inf, which takes a key away."""
    import numpy as np

    yield np.isnan(values) | np.isposinf(values), "a finite number or -inf"
