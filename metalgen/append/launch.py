"""Making the rows that new keys and values become, on a device, and storing them in a cache."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from metalgen.devices import Device, get_device
from metalgen.devices.binding import launched
from metalgen.devices.kernel import KernelDevice
from metalgen.devices.marking import marked_outputs
from metalgen.errors import MetalgenError
from metalgen.families import Schedule
from metalgen.families.append import APPEND, append_schedule, is_placed, operands
from metalgen.features.quantized import packing
from metalgen.features.rotary import rotated
from metalgen.problem.config import AttentionConfig

Arrays = dict[str, mx.array]
Maker = Callable[[Mapping[str, mx.array]], Arrays]
"""From the arrays that `metalgen.families.append.inputs` names to those that `outputs` names."""


@functools.lru_cache(maxsize=256)
def row_maker(config: AttentionConfig, device: str | None, schedule: Schedule) -> Maker:
    """What makes the rows of a config on a device; its kernel is checked once, on a small call.

    Raises:
        ArgumentError, DeviceError: a device that is not known, or not here.
    """
    own = get_device(device)
    if not operands(config):
        return lambda given: {}
    if not isinstance(own, KernelDevice):
        return functools.partial(plain_rows, config)
    try:
        maker = kernel_rows(config, own, schedule)
        fault = rows_fault(config, maker)
    except (MetalgenError, RuntimeError, ValueError) as error:  # from a compiler or a launch
        fault = str(error)
    if fault:
        message = f"append runs in plain MLX operations: no kernel on {own.name!r}: {fault}"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return functools.partial(plain_rows, config)
    return maker


def kernel_rows(config: AttentionConfig, device: Device, schedule: Schedule) -> Maker:
    """The append kernel of a device, unchecked."""
    from metalgen.source.render import render  # brings Jinja

    if not isinstance(device, KernelDevice):
        raise TypeError(f"{device.name} runs no kernels")
    fields = schedule.to_dict()
    schedule = append_schedule(**fields, language=device.language)
    source = render(config, schedule)
    kernel, first = device.compile(source), operands(config)[0]

    @functools.lru_cache(maxsize=64)
    def arguments(batch: int, heads: int, length: int) -> dict[str, Any]:
        shape = (batch, heads, length)
        return launched(source, APPEND.main.dispatch(config, schedule, shape))

    def make(given: Mapping[str, mx.array]) -> Arrays:
        inputs = [given[name] for name in source.inputs]
        made = kernel(inputs=inputs, **arguments(*given[first].shape[:3]))
        return dict(zip(source.outputs, made, strict=True))

    return make


def plain_rows(config: AttentionConfig, given: Mapping[str, mx.array]) -> Arrays:
    """The same in plain MLX operations, wherever MLX runs."""
    found: Arrays = {}
    sequence, local, owned = _owners(config, given)
    for operand in operands(config):
        rows = given[operand]
        if operand == "k" and config.rope is not None:
            rows = _rotated(config, rows, sequence, local, given)
        bits, group = packing(config, operand)
        if bits is None:
            found[f"{operand}_rows"] = rows
        else:
            parts = mx.quantize(rows, group, bits)
            for part, array in zip(("words", "scales", "biases"), parts, strict=True):
                found[f"{operand}_{part}"] = array
    if is_placed(config):
        found["places"] = _places(config, given, sequence, local, owned)
    return found


def _owners(
    config: AttentionConfig, given: Mapping[str, mx.array]
) -> tuple[mx.array, mx.array, mx.array | bool]:
    """Of each token, ``(B, L)``: its sequence, its number in it, and whether it is in one."""
    batch, _, length, _ = given["k"].shape
    token = mx.broadcast_to(mx.arange(length), (batch, length))
    if not config.varlen:
        return mx.broadcast_to(mx.arange(batch)[:, None], (batch, length)), token, True
    cu = given["cu_seqlens"]
    sequence = mx.sum(cu[1:-1] <= token[..., None], axis=-1).astype(mx.int32)
    begin, end = mx.take(cu, sequence), mx.take(cu, sequence + 1)
    return sequence, token - begin, (begin <= token) & (token < end)


def _rotated(
    config: AttentionConfig,
    x: mx.array,
    sequence: mx.array,
    local: mx.array,
    given: Mapping[str, mx.array],
) -> mx.array:
    """Su et al. 2021, in float32, rounded to the config's type at the end."""
    position = mx.take(given["rope_offset"], sequence) + local
    if config.rope_tables:
        inside = mx.clip(position, 0, given["rope_cos"].shape[0] - 1)
        cos, sin = given["rope_cos"][inside][:, None], given["rope_sin"][inside][:, None]
    else:
        angle = position.astype(mx.float32)[..., None] * given["rope_freqs"]
        cos, sin = mx.cos(angle)[:, None], mx.sin(angle)[:, None]
    assert config.rope is not None
    return rotated(x, cos, sin, config.rope)


def _places(
    config: AttentionConfig,
    given: Mapping[str, mx.array],
    sequence: mx.array,
    local: mx.array,
    owned: mx.array | bool,
) -> mx.array:
    batch, heads = given["k"].shape[:2]
    slot = mx.take(given["offset"], sequence) + local
    limit = given["limit"]
    spare = limit - 1
    head = mx.arange(heads)[:, None]
    if config.page_size is None:
        slot = mx.where((slot >= 0) & (slot < spare), slot, spare)
        entry = mx.arange(batch)[:, None, None]
        return ((entry * heads + head) * limit + slot[:, None]).astype(mx.int32)
    table, page = given["table"], config.page_size
    listed = (slot >= 0) & (slot < table.shape[1] * page) & owned
    column = mx.where(listed, slot // page, 0)
    flat = mx.contiguous(table).reshape(-1)
    number = mx.where(listed, mx.take(flat, sequence * table.shape[1] + column), -1)
    kept = (number >= 0) & (number < spare)
    number, slot = mx.where(kept, number, spare), mx.where(kept, slot % page, 0)
    return ((number[:, None] * heads + head) * page + slot[:, None]).astype(mx.int32)


def rows_fault(config: AttentionConfig, maker: Maker) -> str:
    """What is wrong with a kernel, on a small ragged call; empty where nothing is."""
    from metalgen.append.samples import sample_rows

    given = sample_rows(config)
    with marked_outputs():
        got = maker(given)
    expected = plain_rows(config, given)
    bound = {"float32": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}[config.dtype]
    if is_placed(config) and not mx.array_equal(got["places"], expected["places"]):
        return "rows go to wrong places"
    for name in operands(config):
        if config.kv_bits is None:
            x, y = got[f"{name}_rows"], expected[f"{name}_rows"]
        else:
            x, y = (_dequantized(config, name, made) for made in (got, expected))
        # A value near the middle of two levels may go to either of them.
        step = 0.0
        if config.kv_bits is not None:
            step = float(mx.max(mx.abs(expected[f"{name}_scales"])))
        error = float(mx.max(mx.abs(x.astype(mx.float32) - y.astype(mx.float32))))
        if not error <= bound * float(mx.max(mx.abs(y))) + 1.01 * step:
            return f"rows of {name} are wrong by {error:.1e}"
    return ""


def _dequantized(config: AttentionConfig, name: str, made: Arrays) -> mx.array:
    words, scales, biases = (made[f"{name}_{part}"] for part in ("words", "scales", "biases"))
    bits, group = packing(config, name)
    return mx.dequantize(words, scales, biases, group, bits)


def store_slice(cache: mx.array, rows: mx.array, start: int) -> mx.array:
    """The cache with `rows` from slot `start` on; in place where nothing else holds its buffer."""
    fresh = cache.reshape(cache.shape)  # the caller's array stays what it is
    fresh[:, :, start : start + rows.shape[2]] = rows
    return fresh


def store_places(cache: mx.array, rows: mx.array, places: mx.array) -> mx.array:
    """The cache, seen as rows, with `rows` at `places`; in place as `store_slice`."""
    width = cache.shape[-1]
    flat = cache.reshape(-1, width)
    flat[places.reshape(-1)] = rows.reshape(-1, width)
    return flat.reshape(cache.shape)
