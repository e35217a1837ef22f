"""Sliding windows; a causal mask is one that ends at a query's own key."""

from __future__ import annotations

from collections.abc import Iterable

from metalgen.features.base import Feature, Field, Hooks, Macros, Site
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
        sides = [("right", "")] if config.causal else []
        sides += [("left", "WINDOW_LEFT")] if config.window_left is not None else []
        sides += [("right", "WINDOW_RIGHT")] if config.window_right is not None else []
        masks = [Macros("window", {"side": side, "width": width}) for side, width in sides]
        return Hooks(masks=masks, constants=constants)
