"""Block masks: which blocks of queries and keys a mask leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays
from metalgen.features.base import Binder, Feature, Field, Hooks, Macros, Site
from metalgen.features.checks import switch
from metalgen.features.fields import Fields
from metalgen.features.tiles import blocks_of, listed

if TYPE_CHECKING:
    from metalgen.features.sampler import Sampler


class Blocks(Feature):
    """A kernel visits the tiles that its mask function or its array mask touches, and no others.

    They are those of the function where there are both. The tiles of an array are found from it
    where a call brings no block mask.
    """

    name = "block_mask"
    has_backward = True
    fields = (Field("block_mask", switch, False),)
    rank = 1
    captures = True
    one_head = True

    def check(self, config: Fields) -> None:
        if config.mask_mod is None and not config.array_mask:
            raise ArgumentError(
                "block_mask", "a mask_mod or an array_mask that it comes from", None
            )

    def words(self, config: Fields) -> Iterable[str]:
        yield "blocks"

    def kernel_inputs(self, config: Fields) -> list[str]:
        return ["block_mask"]

    def bind(self, config: Fields, inputs: Any, binder: Binder) -> list[mx.array]:
        bq, bk = (binder.bk, binder.bq) if binder.keys_owned else (binder.bq, binder.bk)
        if inputs.blocks is not None:
            return [inputs.blocks.lists(bq, bk, by_keys=binder.keys_owned)]
        q_len, kv_len = binder.scores[2:]
        found = blocks_of(inputs.array_mask, q_len, kv_len, bq, bk)
        return [listed(*found, by_keys=binder.keys_owned)]

    def check_captured(self, arrays: Arrays) -> None:
        blocks, asked = arrays.inputs.blocks, arrays.config.block_mask
        needed = asked and arrays.config.mask_mod is not None
        given = blocks is not None
        if (needed and not given) or (given and not (asked and hasattr(blocks, "lists"))):
            expected = "a BlockMask" if asked else "None"
            raise ArgumentError("block_mask", f"{expected}, as the config says", blocks)
        if given:
            if (blocks.mask is None) == needed:
                of = "a mask function" if needed else "an array"
                raise ArgumentError("block_mask", f"that of {of}, as the config says", blocks)
            batch, heads, q_len, _ = arrays.q.shape
            blocks.check(batch, heads, q_len, arrays.max_kv_len)

    def sample(self, sampler: Sampler) -> dict[str, Any]:
        return {}  # they come with the captured arrays of their function, or follow from the array

    def hooks(self, config: Fields, site: Site) -> Hooks:
        return Hooks(lists=[Macros("block_mask")])
