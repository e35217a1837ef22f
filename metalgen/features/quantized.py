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


def _value_bits(name: str, value: Any, config: Fields) -> int | None:
    """None where values have the bits of keys."""
    if config.kv_bits is None:
        if value is not None:
            raise ArgumentError(name, "None without kv_bits, which quantizes the keys", value)
        return None
    found: int | None = one_of(name, value, (None, *KV_BITS))
    return None if found == config.kv_bits else found


def _value_group(name: str, value: Any, config: Fields) -> int | None:
    """None where values have the groups of keys."""
    if config.kv_bits is None:
        return None
    found: int | None = one_of(name, value, (None, *KV_GROUPS))
    return None if found == config.kv_group else found


def packing(config: Fields, operand: str) -> tuple[int | None, int]:
    """Bits and group of quantized keys (``"k"``) or values (``"v"``)."""
    return (config.v_bits, config.v_group) if operand == "v" else (config.kv_bits, config.kv_group)


def _groups(operand: str) -> Callable[[Arrays], tuple[int, ...]]:
    """The shape of an operand's scales, and of its biases."""

    def shape(arrays: Arrays) -> tuple[int, ...]:
        config = arrays.config
        array, width = (arrays.k, config.head_dim) if operand == "k" else (arrays.v, config.v_dim)
        return (*array.shape[:3], width // packing(config, operand)[1])

    return shape


class Quantized(Feature):
    """Rows are words of 32 bits, with a scale and a bias per group of columns.

    Values are quantized as keys are, unless `value_bits` or `value_group` says otherwise.
    """

    name = "quantized"
    has_backward = True
    freezes_keys = True
    fields = (
        Field("kv_bits", _bits),
        Field("kv_group", _group, NO_GROUP),
        Field("value_bits", _value_bits),
        Field("value_group", _value_group),
    )
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
        for name, width, field, group in (
            ("head_dim", config.head_dim, "kv_group", config.kv_group),
            ("value_head_dim", config.v_dim, "value_group", config.v_group),
        ):
            if width % group:
                named = "kv_group" if config.value_group is None else field
                expected = f"a multiple of {named}={group}, as mx.quantize has it"
                raise ArgumentError(name, expected, width)

    def words(self, config: Fields) -> Iterable[str]:
        if config.quantized_apart:
            yield f"k{config.kv_bits}:{config.kv_group}"
            yield f"v{config.v_bits}:{config.v_group}"
        else:
            yield f"kv{config.kv_bits}:{config.kv_group}"

    def hooks(self, config: Fields, site: Site) -> Hooks:
        if config.quantized_apart:
            both = {"K": packing(config, "k"), "V": packing(config, "v")}
        else:
            both = {"KV": packing(config, "k")}
        constants = {f"{name}_BITS": bits for name, (bits, _) in both.items() if bits is not None}
        constants |= {f"{name}_GROUP": group for name, (_, group) in both.items()}
        return Hooks(constants=constants, header=["quantized"])
