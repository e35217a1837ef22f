"""Bits that depend on a row's own sequence alone."""

from __future__ import annotations

from metalgen.features.base import Feature, Field, Hooks, Site, unused
from metalgen.features.checks import switch
from metalgen.features.fields import Fields


class Deterministic(Feature):
    """Keys are shared out in the same way whatever else is in the call."""

    name = "deterministic"
    has_backward = True
    fields = (Field("deterministic", switch, False, "deterministic"),)
    variables = unused(deterministic=False)
    rank = 2

    def hooks(self, config: Fields, site: Site) -> Hooks:
        if site.share is None:
            return Hooks()
        return Hooks(constants={"SHARE": site.share}, variables={"deterministic": True})
