"""Arrays that users pass, in the types that kernels take; nothing is looked at, all stays lazy."""

from __future__ import annotations

import mlx.core as mx

from metalgen.errors import ArgumentError
from metalgen.features.fields import Fields


def _array(name: str, x: object, of: str) -> mx.array:
    if not isinstance(x, mx.array):
        raise ArgumentError(name, f"an mlx.core.array of {of}, as of mx.array(...)", brief(x))
    return x


def integers(name: str, x: object, *axes: int) -> mx.array | None:
    """As int32, of one of these numbers of axes."""
    if x is None:
        return None
    x = _array(name, x, "integers")
    if not mx.issubdtype(x.dtype, mx.integer):
        raise ArgumentError(f"{name}.dtype", "int32", str(x.dtype))
    if x.ndim not in axes:
        counts = " or ".join(map(str, axes))
        raise ArgumentError(
            f"{name}.shape", f"{counts} axes" if counts != "1" else "1 axis", x.shape
        )
    return as_int32(x)


def as_int32(x: mx.array) -> mx.array:
    """Integers as int32; one that it cannot hold becomes the nearest, not some valid number."""
    if x.dtype == mx.int32:
        return x
    if x.dtype in (mx.uint32, mx.uint64):
        x = mx.minimum(x, mx.array((1 << 31) - 1, x.dtype))
    elif x.dtype == mx.int64:
        x = mx.clip(x, mx.array(-(1 << 31), x.dtype), mx.array((1 << 31) - 1, x.dtype))
    return x.astype(mx.int32)


def numbers(name: str, x: object) -> mx.array | None:
    """As float32."""
    if x is None:
        return None
    x = _array(name, x, "numbers")
    if not mx.issubdtype(x.dtype, mx.floating):
        raise ArgumentError(f"{name}.dtype", "float32", str(x.dtype))
    return x if x.dtype == mx.float32 else x.astype(mx.float32)


def scores(x: object, dtype: mx.Dtype) -> mx.array | None:
    """A bias, with four axes, as float32 or `dtype`."""
    if x is None:
        return None
    x = _four_axes("bias", _array("bias", x, "numbers"))
    if not mx.issubdtype(x.dtype, mx.floating):
        expected = "float32 or the type of q (booleans go to mask)"
        raise ArgumentError("bias.dtype", expected, str(x.dtype))
    return x if x.dtype in (mx.float32, dtype) else x.astype(mx.float32)


def booleans(x: object) -> mx.array | None:
    """A mask, with four axes."""
    if x is None:
        return None
    x = _four_axes("mask", _array("mask", x, "booleans"))
    if x.dtype != mx.bool_:
        expected = "bool (True: the key is seen), or floats, which are added to the scores"
        raise ArgumentError("mask.dtype", expected, str(x.dtype))
    return x


def _four_axes(name: str, x: mx.array) -> mx.array:
    if x.ndim >= 4:
        return x  # more than four are refused with the other shapes
    return mx.expand_dims(x, tuple(range(4 - x.ndim)))


def dropout_key(config: Fields, key: object) -> mx.array | None:
    """The key of a call's dropout; by default from MLX's own generator, as ``mx.random`` has it."""
    if key is not None:
        if not isinstance(key, mx.array):
            expected = "an mlx.core.array, such as mx.random.key(0), or None"
            raise ArgumentError("dropout_key", expected, key)
        return key if config.dropout else None
    if not config.dropout:
        return None
    halves = mx.random.randint(0, 1 << 16, (2, 2)).astype(mx.uint32)
    return halves[0] * (1 << 16) + halves[1]


def brief(x: object) -> object:
    """What an error message says of an argument: no more than a line."""
    if isinstance(x, mx.array):
        return f"{x.dtype} {x.shape}"
    text = repr(x)
    return (
        x if len(text) <= 60 and "\n" not in text else f"a {type(x).__module__}.{type(x).__name__}"
    )
