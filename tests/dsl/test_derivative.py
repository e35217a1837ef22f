"""Derivatives of score functions, against central differences in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen.dsl.derivative import BINARY, UNARY, of_loads, slope
from metalgen.dsl.operations import BINARY as ALL_OF_TWO
from metalgen.dsl.operations import OF_FLOATS
from metalgen.dsl.operations import UNARY as ALL_OF_ONE
from metalgen.dsl.trace import trace

TABLE = mx.array([[0.3, -0.6, 1.1], [0.7, 0.2, -0.4]])
SLOPES = mx.array([0.5, -0.25], mx.float16)
STEP = 1e-6

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "arithmetic": lambda s, b, h, i, j: (3 * s - s * s + s / (2 + s * s)) / 4 - 1 / (3 + s),
    "exponentials": lambda s, b, h, i, j: mx.exp(-s) + mx.expm1(s / 3) + mx.log1p(s * s),
    "logarithms": lambda s, b, h, i, j: mx.log(s + 4) + mx.log2(s + 5) * mx.log10(s + 6),
    "sines": lambda s, b, h, i, j: mx.sin(s) * mx.cos(2 * s) + mx.tan(s / 4),
    "hyperbolic": lambda s, b, h, i, j: mx.tanh(s) + mx.sinh(s) * mx.cosh(s / 2),
    "inverse": lambda s, b, h, i, j: mx.arcsin(s / 9) + mx.arccos(s / 8) * mx.arctan(s),
    "inverse hyperbolic": lambda s, b, h, i, j: (
        mx.arcsinh(s) + mx.arccosh(s + 9) * mx.arctanh(s / 9)
    ),
    "roots": lambda s, b, h, i, j: mx.sqrt(s + 4) + mx.rsqrt(s + 5) + mx.sigmoid(s) * mx.erf(s),
    "powers": lambda s, b, h, i, j: mx.power(s + 4, 2.5) + mx.power(2.0, s) + mx.square(s),
    "of two": lambda s, b, h, i, j: (
        mx.logaddexp(s, 2 * s) + mx.maximum(s, 0.3) * mx.minimum(s, -0.2) + mx.arctan2(s, s + 5)
    ),
    "remainders": lambda s, b, h, i, j: mx.remainder(s, 0.7) + mx.remainder(5.0, s + 4),
    "absolute values": lambda s, b, h, i, j: mx.abs(s - 0.11) - mx.floor(s) * s,
    "branches": lambda s, b, h, i, j: mx.where(s > 0.1, s * s, mx.where(i > j, 2 * s, -s)),
    "tables": lambda s, b, h, i, j: s * TABLE[h, j] + TABLE[h, i] ** 2 + SLOPES[h] * s,
    "constant": lambda s, b, h, i, j: TABLE[0, j],
}
PLACES = {"b": np.int32(0), "h": np.int32(1), "q": np.int32(2), "kv": np.int32(1)}
POINTS = np.array([-1.3, -0.45, 0.05, 0.52, 1.7])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_slope_in_the_score(name: str) -> None:
    traced = trace(FUNCTIONS[name])
    arrays = [np.array(x, np.float64) for x in traced.arrays]

    def value(score: Any) -> Any:
        return traced.graph.evaluate(np, {**PLACES, "score": score}, arrays)

    wanted = (value(POINTS + STEP) - value(POINTS - STEP)) / (2 * STEP)
    found = slope(traced.graph)
    own = [arrays[n] for n in found.arrays]
    got = found.graph.evaluate(np, {**PLACES, "score": POINTS}, own)
    np.testing.assert_allclose(np.broadcast_to(got, 5), wanted, rtol=1e-6, atol=1e-7)


def test_the_slope_in_what_is_loaded() -> None:
    traced = trace(FUNCTIONS["tables"])
    arrays = [np.array(x, np.float64) for x in traced.arrays]
    inputs = {**PLACES, "score": POINTS}
    for load, derivative in of_loads(traced.graph).items():
        node = traced.graph.nodes[load]
        index = tuple(
            int(inputs[traced.graph.nodes[arg].op])
            for arg in node.args  # type: ignore[arg-type]
        )
        found = []
        for direction in (1, -1):
            moved = [x.copy() for x in arrays]
            moved[node.array or 0][index] += direction * STEP
            found.append(traced.graph.evaluate(np, inputs, moved))
        wanted = (found[0] - found[1]) / (2 * STEP)
        own = [arrays[n] for n in derivative.arrays]
        got = derivative.graph.evaluate(np, inputs, own)
        np.testing.assert_allclose(np.broadcast_to(got, 5), wanted, rtol=1e-6, atol=1e-7)


def test_a_branch_that_is_not_taken_has_no_share() -> None:
    """MLX's own derivative is NaN there: it multiplies the infinite slope of the root by 0."""

    def function(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return mx.where(s > 0, mx.sqrt(s), 0.0)

    derivative = slope(trace(function).graph).graph
    with np.errstate(divide="ignore"):
        found = derivative.evaluate(np, {**PLACES, "score": np.array([0.0, 0.25])}, [])
    assert found.tolist() == [0.0, 1.0]
    assert np.isnan(np.array(mx.grad(lambda s: function(s, 0, 0, 0, 0))(mx.array(0.0))))


def test_every_operation_of_floats_has_a_derivative_or_none_that_is_not_0() -> None:
    flat = {"sign", "floor", "ceil", "round", "logical_not"}
    assert {*ALL_OF_ONE.values()} - flat == {*UNARY} & {*ALL_OF_ONE.values()}
    assert {"log", "log2", "log10", "sqrt", "rsqrt"} <= {*UNARY}
    unlike = {"floor_divide", "maximum", "minimum"}  # flat, and two that are selected from
    compared = {"equal", "not_equal", "greater", "greater_equal", "less", "less_equal"}
    compared |= {"logical_and", "logical_or"}
    assert {*ALL_OF_TWO.values()} - compared - unlike == {*BINARY}
    assert {*UNARY, *BINARY} >= OF_FLOATS
