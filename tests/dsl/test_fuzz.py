"""Random expression trees: traced, printed as Metal and executed, against MLX and NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from function_kernels import ELEMENTS, places, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metalgen.dsl.graph import parse
from metalgen.dsl.trace import trace

Function = Callable[..., Any]
TABLE = mx.random.normal((4, 30), key=mx.random.key(0))
INTS = mx.random.randint(-5, 60, (50,), key=mx.random.key(1))


def leaf(name: str) -> Function:
    at = ("s", "b", "h", "i", "j").index(name)
    return lambda *x: x[at]


def apply(function: Function, *parts: Function) -> Function:
    return lambda *x: function(*(part(*x) for part in parts))


def small(x: Any) -> Any:
    """Integers kept from overflowing, which no language defines."""
    return x % 1009


integers: st.SearchStrategy[Function] = st.recursive(
    st.sampled_from("bhij").map(leaf)
    | st.integers(-9, 9).map(lambda n: lambda *x: mx.array(n, mx.int32)),
    lambda inner: st.one_of(
        st.tuples(
            st.sampled_from(
                [
                    mx.add,
                    mx.subtract,
                    lambda x, y: small(x) * small(y),
                    lambda x, y: x // (mx.abs(y) + 1),
                    lambda x, y: x % (-mx.abs(y) - 1),
                    mx.maximum,
                    mx.minimum,
                    mx.bitwise_and,
                    mx.bitwise_or,
                    mx.bitwise_xor,
                    lambda x, y: small(x) << (y & 3),
                    lambda x, y: x >> (y & 7),
                ]
            ),
            inner,
            inner,
        ).map(lambda t: apply(*t)),
        st.tuples(
            st.sampled_from([mx.negative, mx.abs, mx.sign, small, lambda x: INTS[x % 50]]), inner
        ).map(lambda t: apply(*t)),
        st.tuples(
            st.sampled_from([mx.less, mx.greater_equal, mx.equal]), inner, inner, inner, inner
        ).map(
            lambda t: apply(
                lambda op, *x: mx.where(op(x[0], x[1]), x[2], x[3]), lambda *_: t[0], *t[1:]
            )
        ),
    ),
    max_leaves=8,
)


def bounded(x: Any) -> Any:
    return mx.clip(x, -8, 8)


floats: st.SearchStrategy[Function] = st.recursive(
    st.just(leaf("s"))
    | st.floats(-4, 4, width=16).map(lambda n: lambda *x: mx.array(n))
    | st.tuples(integers, integers).map(lambda t: apply(lambda x, y: TABLE[x % 4, y % 30], *t)),
    lambda inner: st.one_of(
        st.tuples(
            st.sampled_from(
                [
                    mx.add,
                    mx.subtract,
                    mx.multiply,
                    mx.maximum,
                    mx.minimum,
                    lambda x, y: x / (mx.square(bounded(y)) + 1),
                ]
            ),
            inner,
            inner,
        ).map(lambda t: apply(*t)),
        st.tuples(
            st.sampled_from(
                [
                    mx.tanh,
                    mx.sin,
                    mx.sigmoid,
                    mx.abs,
                    mx.negative,
                    mx.erf,
                    lambda x: mx.exp(bounded(x)),
                    lambda x: mx.log(mx.abs(x) + 1),
                    lambda x: mx.sqrt(mx.abs(x)),
                ]
            ),
            inner,
        ).map(lambda t: apply(*t)),
        st.tuples(integers, inner, inner).map(
            lambda t: apply(lambda n, x, y: mx.where(n > 3, x, y), *t)
        ),
    ),
    max_leaves=8,
)
SETTINGS = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def evaluated(function: Function) -> Any:
    return np.array(mx.broadcast_to(function(*places()), (ELEMENTS,)).astype(mx.float32))


@SETTINGS
@given(st.lists(integers, min_size=25, max_size=25))
def test_any_integer_function_is_exactly_that_of_mlx(functions: list[Function]) -> None:
    graphs = [trace(f) for f in functions]
    for function, graph, got in zip(functions, graphs, run(graphs), strict=True):
        np.testing.assert_array_equal(got, evaluated(function), err_msg=graph.graph.text)
        assert parse(graph.graph.text) == graph.graph


@SETTINGS
@given(st.lists(floats, min_size=25, max_size=25))
def test_any_floating_point_function_is_that_of_mlx(functions: list[Function]) -> None:
    """As close to the same graph in float64 as MLX in float32 is, or to a few units."""
    names = ("score", "b", "h", "q", "kv")
    inputs = {name: np.array(x) for name, x in zip(names, places(), strict=True)}
    inputs["score"] = inputs["score"].astype(np.float64)
    graphs = [trace(f) for f in functions]
    for function, graph, got in zip(functions, graphs, run(graphs), strict=True):
        arrays = [np.array(a) for a in graph.arrays]
        exact = np.broadcast_to(graph.graph.evaluate(np, inputs, arrays), (ELEMENTS,))
        own = evaluated(function)
        allowed = 4 * np.abs(own - exact) + 2e-6 * np.maximum(1, np.abs(exact)) * 16
        worst = np.abs(got - exact) - allowed
        assert (worst <= 0).all() or not np.isfinite(own).all(), graph.graph.text


@SETTINGS
@given(st.lists(floats, min_size=25, max_size=25))
def test_the_gradient_of_any_function_prints(functions: list[Function]) -> None:
    gradients = [mx.grad(f) for f in functions]
    graphs = [trace(g) for g in gradients]
    for gradient, graph, got in zip(gradients, graphs, run(graphs), strict=True):
        wanted = np.array(
            [np.array(gradient(*(x[n] for x in places()))) for n in range(0, ELEMENTS, 9)]
        )
        if np.isfinite(wanted).all():
            scale = np.maximum(1, np.abs(wanted))
            close = np.abs(got[::9] - wanted) <= 1e-4 * scale
            assert close.all(), graph.graph.text
