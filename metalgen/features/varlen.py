"""Packed sequences: q, k and v hold several, one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import mlx.core as mx

from metalgen.features.arrays import Arrays, vector
from metalgen.features.base import Feature, Field, Hooks, Macros, OptionalInput, Site, unused
from metalgen.features.checks import switch
from metalgen.features.conversions import integers
from metalgen.features.fields import Fields


def _starts(array: mx.array, arrays: Arrays) -> str | None:
    if array.ndim != 1:
        return "1 axis"
    return None if array.size > 1 else "2 elements or more"


def _ascending(of: str) -> Any:
    """Contents of starts of the sequences in the rows of q or k: from 0 on, none before another."""

    def contents(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
        import numpy as np

        starts = values.astype(np.int64)
        before = np.concatenate([starts[:1], starts[:-1]])
        yield (np.arange(starts.size) == 0) & (starts != 0), "0, the first start"
        yield starts < before, "{before} or more, as {name}[{index}] is"
        rows = getattr(arrays, of).shape[2]
        yield starts > rows, f"at most {rows}, the rows of {of}"

    return contents


class Varlen(Feature):
    """Sequences in one batch entry, of any lengths."""

    name = "varlen"
    has_backward = True
    fields = (Field("varlen", switch, False, "cu_seqlens_q"),)
    inputs = (
        OptionalInput(
            "cu_q",
            ("int32",),
            _starts,
            option="cu_seqlens_q",
            convert=lambda option, x, config: integers(option, x, 1),
            contents=_ascending("q"),
        ),
        OptionalInput(
            "cu_k",
            ("int32",),
            vector(lambda arrays: arrays.sequences + 1),
            option="cu_seqlens_k",
            required=lambda config: config.page_size is None,
            contents=_ascending("k"),
        ),
    )
    variables = unused(varlen=False)
    rank = 2

    def excludes(self, config: Fields) -> Mapping[str, str]:
        counted = "which counts the queries and keys of each sequence from 0"
        instead = {
            "bias": f"a score_mod, {counted}",
            "array_mask": f"a mask_mod, {counted}",
            "block_mask": "the mask_mod alone",
            "kv_lens": "cu_k, which says the lengths",
            "max_work": "fewer sequences a call",
        }
        return {name: f"its default with varlen; use {other}" for name, other in instead.items()}

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(places=[Macros("varlen")], variables={"varlen": True, "sequences": True})
