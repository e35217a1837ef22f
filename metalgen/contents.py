"""What arrays of a call must contain: looked at only when asked for, for that waits for the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.problem.inputs import Inputs, max_kv_len

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

    if inputs.cu_q is not None:
        _check_starts("cu_q", inputs.cu_q, q.shape[2], "q")
    if inputs.cu_k is not None:
        _check_starts("cu_k", inputs.cu_k, k.shape[2], "k")
    if inputs.kv_lens is not None:
        places = max_kv_len(config, k, inputs)
        whose = "keys of k" if config.page_size is None else "keys of the block table's pages"
        lengths = np.array(inputs.kv_lens)
        wrong = (lengths < 0) | (lengths > places)
        _first("kv_lens", lengths, wrong, f"0 to {places} ({whose})")
    if inputs.block_table is not None and inputs.kv_lens is not None:
        table = np.array(inputs.block_table)
        begins = np.arange(table.shape[1]) * k.shape[2]
        used = begins[None, :] < np.array(inputs.kv_lens)[:, None]
        wrong = used & ((table < -1) | (table >= k.shape[0]))
        expected = f"a page from 0 to {k.shape[0] - 1}, or -1 for keys that are not seen"
        _first("block_table", table, wrong, expected)
    if inputs.rope_offset is not None:
        offsets = np.array(inputs.rope_offset)
        _first("rope_offset", offsets, offsets < 0, "a position, 0 or more")
    for name in ("rope_freqs", "alibi_slopes"):
        if (array := getattr(inputs, name)) is not None:
            numbers = np.array(array)
            _first(name, numbers, ~np.isfinite(numbers), "a finite number")
    for name in ("bias", "sinks"):
        if (array := getattr(inputs, name)) is not None:
            numbers = np.array(array.astype(mx.float32))
            wrong = np.isnan(numbers) | np.isposinf(numbers)
            _first(name, numbers, wrong, "a finite number or -inf")


def _check_starts(name: str, array: mx.array, size: int, of: str) -> None:
    import numpy as np

    starts = np.array(array).astype(np.int64)
    _first(name, starts, (np.arange(starts.size) == 0) & (starts != 0), "0, the first start")
    before = np.concatenate([starts[:1], starts[:-1]])
    for index in np.flatnonzero(starts < before)[:1]:
        expected = f"{before[index]} or more, as {name}[{index - 1}] is"
        raise ArgumentError(f"{name}[{index}]", expected, int(starts[index]))
    _first(name, starts, starts > size, f"at most {size}, the rows of {of}")


def _first(name: str, values: NDArray[np.generic], wrong: NDArray[np.bool_], expected: str) -> None:
    """Complain about the first element that is wrong."""
    import numpy as np

    for index in np.argwhere(wrong)[:1]:
        place = tuple(int(n) for n in index)
        raise ArgumentError(f"{name}[{', '.join(map(str, place))}]", expected, values[place].item())
