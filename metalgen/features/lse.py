"""The log-sum-exp of each row, as a second output."""

from __future__ import annotations

from collections.abc import Iterable

from metalgen.features.base import Feature, Field
from metalgen.features.checks import switch
from metalgen.features.fields import Fields


class LogSumExp(Feature):
    """Of the scaled scores, by the natural logarithm."""

    name = "lse"
    has_backward = True
    fields = (Field("return_lse", switch, False, counted=True),)
    rank = 6

    def words(self, config: Fields) -> Iterable[str]:
        yield "lse"
