"""Where captured arrays are found, and that finding them neither evaluates nor changes anything."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from metalgen import and_masks, flex_attention
from metalgen.dsl.errors import FunctionError
from metalgen.dsl.trace import trace

TABLE = mx.arange(20).astype(mx.float32)


def helper(i: Any) -> Any:
    return TABLE[i]


def by_a_global(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s + helper(i)


def by_a_default(s: Any, b: Any, h: Any, i: Any, j: Any, table: mx.array = TABLE) -> Any:
    return s + table[i]


class Biased(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = TABLE
        self.inner = nn.Linear(2, 20)
        self.inner.bias = TABLE

    def score_mod(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.table[i]

    def nested(self) -> Callable[..., Any]:
        return lambda s, b, h, i, j: s + self.inner.bias[i]


class Callable_:
    def __init__(self) -> None:
        self.table = TABLE

    def __call__(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.table[i]


class Inherited(Callable_):
    pass


class Indirect(nn.Module):
    """By a method that the method calls, and a property."""

    def __init__(self) -> None:
        super().__init__()
        self.table = TABLE

    @property
    def alias(self) -> mx.array:
        return self.table

    def at(self, i: Any) -> Any:
        return self.alias[i]

    def __call__(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.at(i)

    def captured(self) -> Callable[..., Any]:
        return lambda s, b, h, i, j: mx.add(self.at(i), s)


class OfClass:
    table = TABLE

    def by_self(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.table[i]

    @staticmethod
    def helper(i: Any) -> Any:
        return TABLE[i]

    def by_helper(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.helper(i)


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
    table: mx.array = TABLE

    def __call__(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.table[i]


tables = types.ModuleType("tables")
vars(tables)["table"] = TABLE


def in_a_list() -> Callable[..., Any]:
    tables = {"one": [TABLE]}
    return lambda s, b, h, i, j: s + tables["one"][0][i]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "closure": (lambda t: lambda s, b, h, i, j: s + t[i])(TABLE),
    "global": by_a_global,
    "default": by_a_default,
    "partial": functools.partial(lambda t, s, b, h, i, j: s + t[i], TABLE),
    "method": Biased().score_mod,
    "attribute": Biased().nested(),
    "callable object": Callable_(),
    "list in a dictionary": in_a_list(),
    "inherited method": Inherited(),
    "method of a method": Indirect(),
    "method of a captured object": Indirect().captured(),
    "class": OfClass().by_self,
    "static method": OfClass().by_helper,
    "slots": Slots(),
    "module": lambda s, b, h, i, j: s + tables.table[i],
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_captured_arrays_are_found(name: str) -> None:
    traced = trace(FUNCTIONS[name])
    assert traced.graph.text == trace(FUNCTIONS["closure"]).graph.text
    (array,) = traced.arrays
    assert array is TABLE


def test_lazy_arrays_stay_lazy_and_are_captured_whole() -> None:
    lazy = mx.random.normal((20,)) * 2 + 1
    traced = trace(lambda s, b, h, i, j: s + lazy[i])
    assert traced.graph.text == trace(FUNCTIONS["closure"]).graph.text
    assert traced.arrays[0] is lazy


def test_gradients_reach_parameters_that_a_method_of_a_method_uses() -> None:
    module = Indirect()
    q = mx.random.normal((1, 1, 20, 8), key=mx.random.key(0))

    def loss(parameters: Any) -> mx.array:
        module.update(parameters)
        out = flex_attention(q, q, q, lambda s, b, h, i, j: s * module.at(j), device="reference")
        return (out * out).sum()

    table = mx.random.normal((20,), key=mx.random.key(1))
    gradient = np.array(mx.grad(loss)({"table": table})["table"])
    step = mx.zeros((20,)).at[7].add(1e-2)
    ends = [loss({"table": table + sign * step}).item() for sign in (1, -1)]
    assert abs(gradient[7] - (ends[0] - ends[1]) / 2e-2) < 2e-3 * abs(gradient).max()
    assert (gradient != 0).all()


class Hidden:
    @property
    def table(self) -> mx.array:
        return TABLE  # a global variable, which is not looked for in properties

    def score_mod(self, s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + self.table[i]


def test_what_is_found_nowhere_is_taken_by_value_unless_it_is_found_elsewhere_too() -> None:
    assert len(trace(Hidden().score_mod).arrays) == 1
    hidden = Hidden()
    with pytest.raises(FunctionError, match="reached in one way each.*make it a global variable"):
        trace(lambda s, b, h, i, j: hidden.score_mod(s, b, h, i, j) + TABLE[j])


def test_the_function_is_left_as_it_was() -> None:
    before = by_a_global.__globals__["TABLE"]
    module = Biased()
    trace(by_a_global)
    trace(module.score_mod)
    trace(OfClass().by_self)
    trace(FUNCTIONS["module"])
    assert tables.table is TABLE and "table" not in vars(OfClass())
    assert by_a_global.__globals__["TABLE"] is before
    assert module.table is TABLE and module.inner.bias is TABLE


def test_arrays_of_a_gradient_are_seen_by_value() -> None:
    lazy = mx.arange(20).astype(mx.float32) + 0.5
    traced = trace(mx.grad(lambda s, b, h, i, j: s * s * lazy[i]))
    assert [a.shape for a in traced.graph.arrays] == [(20,)]
    np.testing.assert_array_equal(np.array(traced.arrays[0]), np.arange(20) + 0.5)


def test_what_is_computed_from_captured_arrays_alone_is_computed_before() -> None:
    traced = trace(lambda s, b, h, i, j: s + mx.softmax(TABLE.reshape(4, 5) * 2, axis=-1)[h, i])
    assert [node.op for node in traced.graph.nodes].count("exp") == 0
    wanted = mx.softmax(TABLE.reshape(4, 5) * 2, axis=-1)
    np.testing.assert_allclose(np.array(traced.arrays[0]), np.array(wanted), rtol=1e-6)


def test_combined_masks_capture_what_their_parts_do() -> None:
    ids = mx.array([0, 0, 1, 1])
    both = and_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: ids[i] == ids[j])
    traced = trace(both, "mask_mod")
    assert traced.arrays[0] is ids
    written = trace(lambda b, h, i, j: (i >= j) & (ids[i] == ids[j]), "mask_mod")
    assert traced.graph == written.graph


def test_inside_transformations_captured_arrays_are_those_that_are_transformed() -> None:
    def loss(table: mx.array) -> mx.array:
        traced = trace(lambda s, b, h, i, j: s * table[i])
        return (traced.arrays[0] * traced.arrays[0]).sum()

    np.testing.assert_allclose(np.array(mx.grad(loss)(TABLE)), 2 * np.arange(20.0))
    assert mx.compile(loss)(TABLE).item() == (np.arange(20.0) ** 2).sum()
