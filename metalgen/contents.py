"""What arrays of a call must contain: looked at only when asked for, for that waits for the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays
from metalgen.problem.inputs import Inputs

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from metalgen.problem.config import AttentionConfig


def check_contents(config: AttentionConfig, q: mx.array, k: mx.array, inputs: Inputs) -> None:
    """Whether the arrays of a call, whose shapes and types `check_call` found right, make sense.

    Evaluates them. Without this check kernels clamp lengths, skip pages that there are not, and
    read nothing outside of the arrays.

    Raises:
        ArgumentError: naming the first element that does not, its index, what was expected and
            what is there.
    """
    import numpy as np

    arrays = Arrays(config, q, k, k, inputs)
    for each in config.inputs:
        array = inputs.get(each.name)
        if each.contents is None or array is None:
            continue
        # NumPy has no bfloat16.
        values = np.array(array.astype(mx.float32) if array.dtype == mx.bfloat16 else array)
        for wrong, expected in each.contents(values, arrays):
            _first(inputs.spoken(each.name), values, wrong, expected)


def _first(name: str, values: NDArray[np.generic], wrong: NDArray[np.bool_], expected: str) -> None:
    """Complain about the first element that is wrong."""
    import numpy as np

    for index in np.argwhere(wrong)[:1]:
        place = tuple(int(n) for n in index)
        before = (*place[:-1], place[-1] - 1)
        said = expected.format(name=name, index=before[-1], before=values[before])
        raise ArgumentError(f"{name}[{', '.join(map(str, place))}]", said, values[place].item())
