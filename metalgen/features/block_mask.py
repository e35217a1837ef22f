"""Block masks: which blocks of queries and keys a mask function leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays
from metalgen.features.base import Binder, Feature, Field, Hooks, Macros, Site
from metalgen.features.checks import switch
from metalgen.features.fields import Fields

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler


class Blocks(Feature):
    """A kernel visits the tiles that the blocks of its mask function touch, and no others."""

    name = "block_mask"
    has_backward = True
    fields = (Field("block_mask", switch, False),)
    rank = 1
    captures = True
    one_head = True

    def check(self, config: Fields) -> None:
        if config.mask_mod is None:
            raise ArgumentError("block_mask", "a mask_mod that it comes from", None)

    def words(self, config: Fields) -> Iterable[str]:
        yield "blocks"

    def kernel_inputs(self, config: Fields) -> list[str]:
        return ["block_mask"]

    def bind(self, config: Fields, inputs: Any, binder: Binder) -> list[mx.array]:
        if binder.keys_owned:
            return [inputs.blocks.lists(binder.bk, binder.bq, by_keys=True)]
        return [inputs.blocks.lists(binder.bq, binder.bk)]

    def check_captured(self, arrays: Arrays) -> None:
        blocks, asked = arrays.inputs.blocks, arrays.config.block_mask
        if asked != (blocks is not None) or (asked and not hasattr(blocks, "lists")):
            expected = "a BlockMask" if asked else "None"
            raise ArgumentError("block_mask", f"{expected}, as the config says", blocks)
        if asked:
            batch, heads, q_len, _ = arrays.q.shape
            blocks.check(batch, heads, q_len, arrays.max_kv_len)

    def sample(self, sampler: Sampler) -> dict[str, Any]:
        return {}  # the blocks come with the captured arrays of their function

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(lists=[Macros("block_mask")])
