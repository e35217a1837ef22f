"""Pages: keys and values lie in pages of a pool, which a block table lists."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mlx.core as mx

from metalgen.arguments import check_integer
from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays
from metalgen.features.base import Feature, Field, Hooks, Macros, OptionalInput, Site, unused
from metalgen.features.conversions import integers
from metalgen.features.fields import Fields

MIN_PAGE, MAX_PAGE = 8, 1 << 16


def _page_size(name: str, value: Any, config: Fields) -> int | None:
    if value is None:
        return None
    size = check_integer(name, value, MIN_PAGE, MAX_PAGE)
    if size % 8:
        raise ArgumentError(name, f"a multiple of 8 from {MIN_PAGE} to {MAX_PAGE}", size)
    return size


def _table(array: mx.array, arrays: Arrays) -> str | None:
    if array.ndim == 2 and array.shape[0] == arrays.sequences:
        return None
    return f"2 axes, ({arrays.sequences}, pages of a sequence)"


def _known(values: Any, arrays: Arrays) -> Iterable[tuple[Any, str]]:
    import numpy as np

    if arrays.inputs.kv_lens is None:
        return
    begins = np.arange(values.shape[1]) * arrays.k.shape[2]
    used = begins[None, :] < np.array(arrays.inputs.kv_lens)[:, None]
    count = arrays.k.shape[0]
    expected = f"a page from 0 to {count - 1}, or -1 for keys that are not seen"
    yield used & ((values < -1) | (values >= count)), expected


class Pages(Feature):
    """A number in the table that is no page's stands for keys that are not seen."""

    name = "pages"
    has_backward = True
    freezes_keys = True
    fields = (Field("page_size", _page_size, None, "k.shape, keys of a page"),)
    inputs = (
        OptionalInput(
            "block_table",
            ("int32",),
            _table,
            option="block_table",
            convert=lambda option, x, config: integers(option, x, 2),
            contents=_known,
            cut="entries",
        ),
    )
    variables = unused(paged=False)
    rank = 4

    def words(self, config: Fields) -> Iterable[str]:
        yield f"pages{config.page_size}"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        size = config.page_size
        assert size is not None
        return Hooks(
            pages=Macros("paged"),
            masks=[Macros("paged")],
            constants={"PAGE": size},
            header=["pages"],
            variables={"paged": True},
        )
