"""How many of each sequence's queries there are, where calls have room for more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from metalgen.features.arrays import Arrays, per_sequence, vector
from metalgen.features.base import Feature, Field, Hooks, Macros, OptionalInput, Site
from metalgen.features.bounds import Bound
from metalgen.features.checks import switch
from metalgen.features.conversions import integers
from metalgen.features.fields import Fields


def _within(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    most = arrays.q.shape[2]
    yield (values < 0) | (values > most), f"0 to {most} (rows of q)"


class Used(Feature):
    """Queries behind the last one see no key, and are not looked at; masks align to the others."""

    name = "seqused_q"
    has_backward = True
    fields = (Field("seqused_q", switch, False, "seqused_q"),)
    inputs = (
        OptionalInput(
            "seqused_q",
            ("int32",),
            vector(per_sequence),
            option="seqused_q",
            convert=lambda option, x, config: integers(option, x, 1),
            contents=_within,
            cut="entries",
        ),
    )
    rank = 2

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(
            places=[Macros("seqused_q", {"varlen": config.varlen})],
            bounds=[Bound("query", most="q_used - 1")],
            variables={"sequences": True, "query_offset": "kv_len - q_used"},
        )
