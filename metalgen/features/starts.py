"""Starts of keys: which of a sequence's keys is the first one, as of batches padded on the left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from metalgen.features.arrays import Arrays, per_sequence, vector
from metalgen.features.base import Feature, Field, Hooks, OptionalInput, Site
from metalgen.features.bounds import Bound
from metalgen.features.checks import switch
from metalgen.features.conversions import integers
from metalgen.features.fields import Fields


def _within(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    most = arrays.max_kv_len
    yield (values < 0) | (values > most), f"0 to {most} (keys of a sequence)"


class Starts(Feature):
    """Keys before a sequence's first one are not looked at; all are counted from 0 nevertheless."""

    name = "kv_starts"
    fields = (Field("kv_starts", switch, False, "kv_starts"),)
    inputs = (
        OptionalInput(
            "kv_starts",
            ("int32",),
            vector(per_sequence),
            option="kv_starts",
            convert=lambda option, x, config: integers(option, x, 1),
            contents=_within,
            cut="entries",
        ),
    )
    rank = 2
    has_backward = True

    def hooks(self, config: Fields, site: Site) -> Hooks:
        start = "min(max(kv_starts[sequence], 0), kv_len)"
        start = f"sequence == sequences ? 0 : {start}" if config.varlen else start
        return Hooks(
            bounds=[Bound("key", least="kv_start")],
            lines=[f"const int kv_start = {start};"],
            variables={"sequences": True},
        )
