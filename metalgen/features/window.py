"""Sliding windows; a causal mask is one that ends at a query's own key."""

from __future__ import annotations

from collections.abc import Iterable

from metalgen.features.base import Feature, Field, Hooks, Site
from metalgen.features.bounds import Bound
from metalgen.features.checks import integer, switch
from metalgen.features.fields import Fields

MAX_WINDOW = 1 << 24


class Window(Feature):
    """A query sees keys from some before its own to some after it, aligned at the lower right."""

    name = "window"
    has_backward = True
    fields = (
        Field("causal", switch, False, "causal", counted=True),
        Field("window_left", integer(0, MAX_WINDOW), None, "window_left", counted=True),
        Field("window_right", integer(0, MAX_WINDOW), None, "window_right", counted=True),
    )

    def words(self, config: Fields) -> Iterable[str]:
        if config.causal:
            yield "causal"
        for end in ("window_left", "window_right"):
            if (keys := getattr(config, end)) is not None:
                yield f"{end}={keys}"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        constants = {
            name.upper(): bound
            for name in ("window_left", "window_right")
            if (bound := getattr(config, name)) is not None
        }
        least = None if config.window_left is None else "-WINDOW_LEFT"
        most = None if config.window_right is None else "WINDOW_RIGHT"
        most = "0" if config.causal else most
        return Hooks(bounds=[Bound("distance", least, most)], constants=constants)
