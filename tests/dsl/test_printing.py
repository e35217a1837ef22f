"""Printed graphs, executed as Metal in the simulator, against the functions themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from function_kernels import ELEMENTS, places, run

from metalgen.dsl.trace import trace

TABLE = mx.random.normal((4, 9), key=mx.random.key(0))
DEEP = mx.random.normal((3, 4, 5, 6), key=mx.random.key(1))
SMALL = mx.array([0.5, -1.5, 2.5])
BYTES = mx.array([0, 3, 250, 7, 130], mx.uint8)
LONGS = mx.array([-3, 1 << 40, 5], mx.int64)
FLAGS = mx.array([[True, False], [False, True]])
FACTOR = mx.array(1.75)
HALF = mx.random.normal((50,), key=mx.random.key(2)).astype(mx.float16)
BRAIN = mx.random.normal((50,), key=mx.random.key(3)).astype(mx.bfloat16)

FLOAT = {
    "arithmetic": lambda s, b, h, i, j: (s + 2) * (s - 3) / (s * s + 1) - -s,
    "exponentials": lambda s, b, h, i, j: mx.exp(s / 4) + mx.expm1(s * 1e-3) + mx.sigmoid(s),
    "logarithms": lambda s, b, h, i, j: (
        mx.log(s * s + 1) + mx.log2(s * s + 1) + mx.log10(s * s + 2) + mx.log1p(s * s * 1e-4)
    ),
    "trigonometry": lambda s, b, h, i, j: mx.sin(s) + mx.cos(s) * mx.tan(s / 9) + mx.arctan(s),
    "inverse functions": lambda s, b, h, i, j: (
        mx.arcsin(mx.sin(s) / 2) + mx.arccos(mx.cos(s) / 2) + mx.arctan2(s, s * s + 1)
    ),
    "hyperbolic": lambda s, b, h, i, j: (
        mx.tanh(s * 30) + mx.sinh(s / 3) + mx.cosh(s / 3) + mx.arcsinh(s)
    ),
    "more hyperbolic": lambda s, b, h, i, j: (
        mx.arccosh(s * s + 1) + mx.arctanh(mx.sin(s) * 0.9) + mx.logaddexp(s, 1 - s)
    ),
    "roots and powers": lambda s, b, h, i, j: (
        mx.sqrt(mx.abs(s)) + mx.rsqrt(s * s + 1) + mx.square(s) + mx.abs(s) ** 1.5 + s**3
    ),
    "error function": lambda s, b, h, i, j: mx.erf(s) + mx.erf(s / 5),
    "rounding": lambda s, b, h, i, j: (
        mx.floor(s) + 2 * mx.ceil(s) + 3 * mx.round(s * 2) + 5 * mx.sign(s)
    ),
    "smallest and largest": lambda s, b, h, i, j: (
        mx.maximum(s, 0.5) * mx.minimum(s, i) + mx.clip(s, -1, 1)
    ),
    "remainders": lambda s, b, h, i, j: s % 0.75 + s % -0.75 + s // 0.5,
    "selection": lambda s, b, h, i, j: mx.where((i > j) & (s > 0) | (h == 2), s, -s),
    "minus infinity": lambda s, b, h, i, j: mx.where(i >= j, s, -mx.inf),
    "casts": lambda s, b, h, i, j: (
        (s * 10).astype(mx.int32).astype(mx.float32) + (s > 0).astype(mx.float32) + i / 3
    ),
    "half": lambda s, b, h, i, j: (s.astype(mx.float16) * 3 + HALF[i]).astype(mx.float32),
    "bfloat": lambda s, b, h, i, j: (s.astype(mx.bfloat16) * 3 + BRAIN[i]).astype(mx.float32),
    "gather": lambda s, b, h, i, j: s * TABLE[h, j % 9] + TABLE[h][i % 9] + TABLE[-1, i % 9],
    "gather from the end": lambda s, b, h, i, j: TABLE[h, -1 - (j % 9)] + SMALL[-1] + SMALL[0],
    "gather of rank four": lambda s, b, h, i, j: DEEP[b, h, i % 5, j % 6] + DEEP[b, 1][i % 5, 2],
    "gather across": lambda s, b, h, i, j: mx.take(TABLE, j % 9, axis=1)[h] + TABLE.T[i % 9, h],
    "gather of a gather": lambda s, b, h, i, j: s + SMALL[BYTES[i % 5].astype(mx.int32) % 3],
    "captured scalar": lambda s, b, h, i, j: s * FACTOR + FACTOR * FACTOR,
    "computed from captured arrays": lambda s, b, h, i, j: (
        mx.softmax(TABLE, axis=-1)[h, i % 9] + TABLE.flatten()[j] + mx.arange(50)[i] + SMALL[1:][0]
    ),
    "flags": lambda s, b, h, i, j: mx.where(FLAGS[i % 2, j % 2], s, 0) + ~FLAGS[0, 1],
    "long integers": lambda s, b, h, i, j: s + (LONGS[i % 3] // (1 << 38)).astype(mx.float32),
    "no argument": lambda s, b, h, i, j: 1.5,
    "gradient": mx.grad(lambda s, b, h, i, j: mx.tanh(s / 5) * 5 + TABLE[h, j % 9] * s * s),
    "vjp": lambda s, b, h, i, j: mx.vjp(lambda x: mx.exp(-x * x), [s], [s])[1][0],
}
INTEGER = {
    "division rounds down": lambda s, b, h, i, j: (i - j) // 3 + (i - j) // -4,
    "remainder has the divisor's sign": lambda s, b, h, i, j: (i - j) % 3 + (i - j) % -4 * 100,
    "divmod": lambda s, b, h, i, j: mx.divmod(i - j, 5)[0] * 7 + mx.divmod(i - j, 5)[1],
    "bits": lambda s, b, h, i, j: (i & 12) | (j ^ 5) + (i << 2) + ((i - j) >> 1) + (i ^ -1),
    "absolute value and sign": lambda s, b, h, i, j: mx.abs(i - j) * mx.sign(i - j) + -i,
    "powers": lambda s, b, h, i, j: i**2 + (i - j) ** 3 + 2 ** (i % 8),
    "bytes wrap": lambda s, b, h, i, j: (BYTES[i % 5] + BYTES[j % 5]).astype(mx.int32),
    "bytes multiply": lambda s, b, h, i, j: (BYTES[i % 5] * BYTES[j % 5]).astype(mx.int32),
    "maximum": lambda s, b, h, i, j: mx.maximum(i, 2 * j) - mx.minimum(i - j, h),
    "logic": lambda s, b, h, i, j: (
        mx.logical_and(i, j > 2).astype(mx.int32) + mx.logical_or(i > 3, h) + mx.logical_not(j)
    ),
    "comparisons": lambda s, b, h, i, j: (
        (i < j) + 2 * (i <= j) + 4 * (i > j) + 8 * (i >= j) + 16 * (i == j) + 32 * (i != j)
    ),
}


SHIFTS = {
    f"{name} of {dtype}": lambda s, b, h, i, j, f=f, dtype=dtype: f(
        i.astype(getattr(mx, dtype)), (j * 3 - 40).astype(getattr(mx, dtype))
    )
    for name, f in (("left", mx.left_shift), ("right", mx.right_shift))
    for dtype in ("int8", "uint8", "int16", "int32", "uint32", "int64")
}
BOOLS = {
    "difference": lambda s, b, h, i, j: s * ((i < j) - (h < 2)),
    "sum": lambda s, b, h, i, j: s * ((i < j) + (h < 2)),
    "remainder": lambda s, b, h, i, j: s * ((i < j) % (h < 2)) + ((i < j) // (h < 2)),
}


def checked(functions: Sequence[Callable[..., Any]]) -> list[tuple[Any, Any]]:
    """What the simulator computes for functions, and what they give for whole arrays."""
    got = run([trace(f) for f in functions])
    wanted = []
    for function in functions:
        value = function(*places())
        if not isinstance(value, mx.array):
            value = mx.array(value)
        wanted.append(np.array(mx.broadcast_to(value.astype(mx.float32), (ELEMENTS,))))
    return list(zip(got, wanted, strict=True))


def test_floating_point_functions_are_those_of_mlx() -> None:
    scalar = {n: f for n, f in FLOAT.items() if n not in ("gradient", "vjp")}
    # Functions of whole rows do not apply to arrays of indices; indexing them at once does.
    whole: dict[str, Callable[..., Any]] = {
        "gather": lambda s, b, h, i, j: s * TABLE[h, j % 9] + TABLE[h, i % 9] + TABLE[-1, i % 9],
        "gather of rank four": lambda s, b, h, i, j: (
            DEEP[b, h, i % 5, j % 6] + DEEP[b, 1, i % 5, 2]
        ),
        "gather across": lambda s, b, h, i, j: TABLE[h, j % 9] + TABLE[h, i % 9],
    }
    results = run([trace(f) for f in scalar.values()])
    for name, got in zip(scalar, results, strict=True):
        value = (scalar | whole)[name](*places())
        value = value if isinstance(value, mx.array) else mx.array(value)
        wanted = np.array(mx.broadcast_to(value.astype(mx.float32), (ELEMENTS,)))
        tolerance = {"half": 1e-2, "bfloat": 5e-2}.get(name, 2e-6)
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance, err_msg=name)
        assert len(np.unique(got)) > 1 or name == "no argument", name


def test_integer_functions_are_exactly_those_of_mlx() -> None:
    for name, (got, wanted) in zip(INTEGER, checked(list(INTEGER.values())), strict=True):
        np.testing.assert_array_equal(got, wanted, err_msg=name)
        assert len(np.unique(got)) > 1, name


def test_kernels_mlx_and_numpy_evaluate_a_graph_alike_where_mlx_leaves_it_open() -> None:
    """Shifts by more bits than there are, differences of booleans."""
    traced = [trace(f) for f in (*SHIFTS.values(), *BOOLS.values())]
    inputs = dict(zip(("score", "b", "h", "q", "kv"), places(), strict=True))
    exact = {name: np.array(x) for name, x in inputs.items()}
    for name, function, got in zip((*SHIFTS, *BOOLS), traced, run(traced), strict=True):
        plain = function.graph.evaluate(mx, inputs, []).astype(mx.float32)
        np.testing.assert_array_equal(got, np.array(plain), err_msg=name)
        wanted = function.graph.evaluate(np, exact, []).astype(np.float32)
        np.testing.assert_array_equal(got, wanted, err_msg=name)
    value = np.array(run([trace(lambda s, b, h, i, j: mx.left_shift(i * 0 + 3, j * 0 + 33))])[0])
    np.testing.assert_array_equal(value, 6)


def test_gradients_are_printed_too() -> None:
    got = run([trace(FLOAT["gradient"]), trace(FLOAT["vjp"])])
    s, _, h, _, j = (
        np.array(x, dtype=np.float64 if n == 0 else np.int64) for n, x in enumerate(places())
    )
    table = np.array(TABLE, dtype=np.float64)
    by_hand = 1 / np.cosh(s / 5) ** 2 + 2 * s * table[h, j % 9]
    np.testing.assert_allclose(got[0], by_hand, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(got[1], -2 * s * np.exp(-s * s) * s, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("extent", [1, 3, 7, 8, 60])
def test_an_index_outside_reads_the_nearest_element(extent: int) -> None:
    """Checked: not one access outside of a buffer. Negative ones count from the end, once."""
    table = mx.arange(extent).astype(mx.float32) + 100
    got = run([trace(lambda s, b, h, i, j: table[(i - j) * 3])], checked=True)[0]
    index = (np.array(places()[3]) - np.array(places()[4])) * 3
    index = np.where(index < 0, index + extent, index)
    np.testing.assert_array_equal(got, 100 + np.clip(index, 0, extent - 1))
    assert index.max() >= extent or extent == 60
    assert index.min() < 0


def test_integer_division_by_zero_gives_zero() -> None:
    got = run([trace(lambda s, b, h, i, j: i // (j - j)), trace(lambda s, b, h, i, j: i % (j - j))])
    assert not np.any(got)
