"""Quantized keys and values, as of ``mx.quantize``, dequantized in the kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from metalgen.errors import ArgumentError
from metalgen.features.arrays import Arrays, exactly
from metalgen.features.base import Feature, Field, Hooks, OptionalInput, Site
from metalgen.features.checks import one_of
from metalgen.features.fields import Fields

KV_BITS, KV_GROUPS = (4, 8), (32, 64, 128)
NO_GROUP = 64
"""The group where nothing is quantized."""


def _bits(name: str, value: Any, config: Fields) -> int | None:
    found: int | None = one_of(name, value, (None, *KV_BITS))
    return found


def _group(name: str, value: Any, config: Fields) -> int:
    return NO_GROUP if config.kv_bits is None else int(one_of(name, value, KV_GROUPS))


def _groups(operand: str) -> Callable[[Arrays], tuple[int, ...]]:
    """The shape of an operand's scales, and of its biases."""

    def shape(arrays: Arrays) -> tuple[int, ...]:
        config = arrays.config
        array, width = (arrays.k, config.head_dim) if operand == "k" else (arrays.v, config.v_dim)
        return (*array.shape[:3], width // config.kv_group)

    return shape


class Quantized(Feature):
    """Rows are words of 32 bits, with a scale and a bias per group of columns."""

    name = "quantized"
    fields = (Field("kv_bits", _bits), Field("kv_group", _group, NO_GROUP))
    inputs = tuple(
        OptionalInput(
            f"{operand}_{part}",
            ("config",),
            exactly(_groups(operand)),
            option=f"{operand}[{place}]",
            cut="keys",
            binding="rows",
        )
        for operand in ("k", "v")
        for place, part in ((1, "scales"), (2, "biases"))
    )
    rank = 4

    def check(self, config: Fields) -> None:
        for name, width in (("head_dim", config.head_dim), ("value_head_dim", config.v_dim)):
            if width % config.kv_group:
                expected = f"a multiple of kv_group={config.kv_group}, as mx.quantize has it"
                raise ArgumentError(name, expected, width)

    def words(self, config: Fields) -> Iterable[str]:
        yield f"kv{config.kv_bits}:{config.kv_group}"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        assert config.kv_bits is not None
        return Hooks(
            constants={"KV_BITS": config.kv_bits, "KV_GROUP": config.kv_group},
            header=["quantized"],
        )
