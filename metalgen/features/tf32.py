"""Products of float32 that keep 11 bits of each factor, where a GPU has them."""

from __future__ import annotations

from metalgen.errors import ArgumentError
from metalgen.features.base import Feature, Field, Hooks, Site, unused
from metalgen.features.checks import switch
from metalgen.features.fields import Fields


class Tf32(Feature):
    """For CUDA; Metal has no such type, and computes in float32."""

    name = "tf32"
    has_backward = True
    fields = (Field("tf32", switch, False, "tf32"),)
    variables = unused(tf32=False)
    rank = 2

    def check(self, config: Fields) -> None:
        if config.dtype != "float32":
            raise ArgumentError("tf32", f"False beside {config.dtype}", True)

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(variables={"tf32": True})
