"""A bound on the work of one dispatch: a call with more is cut into several."""

from __future__ import annotations

from collections.abc import Iterable

from metalgen.features.base import Feature, Field, Hooks, Site, unused
from metalgen.features.checks import integer
from metalgen.features.fields import Fields

MIN_WORK = 1 << 16


class MaxWork(Feature):
    """Most scores that a dispatch computes."""

    name = "max_work"
    fields = (Field("max_work", integer(MIN_WORK, 1 << 62), None, "max_work"),)
    variables = unused(chunked=False)
    rank = 4

    def words(self, config: Fields) -> Iterable[str]:
        yield f"work{config.max_work}"

    def launch_inputs(self, config: Fields) -> list[str]:
        return ["chunk"]

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(variables={"chunked": True})
