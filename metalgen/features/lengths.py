"""Lengths of keys: how many of a batch entry's keys there are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from metalgen.features.arrays import Arrays, per_sequence, vector
from metalgen.features.base import Feature, Field, Hooks, Macros, OptionalInput, Site
from metalgen.features.checks import switch
from metalgen.features.conversions import integers
from metalgen.features.fields import Fields


def _lengths(name: str, value: Any, config: Fields) -> bool:
    given = switch(name, value, config)
    return given and config.page_size is None  # pages say it


def _within(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    most = arrays.max_kv_len
    pages = arrays.config.page_size is not None
    whose = "keys of the block table's pages" if pages else "keys of k"
    yield (values < 0) | (values > most), f"0 to {most} ({whose})"


class Lengths(Feature):
    """The rest of k and v is not looked at, and masks align to the lengths."""

    name = "kv_lens"
    has_backward = True
    fields = (Field("kv_lens", _lengths, False, "kv_lens"),)
    used_by = ("page_size",)
    inputs = (
        OptionalInput(
            "kv_lens",
            ("int32",),
            vector(per_sequence),
            option="kv_lens",
            convert=lambda option, x, config: integers(option, x, 1),
            contents=_within,
            cut="entries",
        ),
    )
    rank = 2

    def words(self, config: Fields) -> Iterable[str]:
        return ("kv_lens",) if config.kv_lens else ()

    def hooks(self, config: Fields, site: Site) -> Hooks:
        lengths = Macros("kv_lens", {"varlen": config.varlen})
        return Hooks(places=[lengths], variables={"sequences": True})
