"""What is said of a function that cannot become part of a kernel: before anything runs."""

from __future__ import annotations

import math
import pickle
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from metalgen import ArgumentError, MetalgenError
from metalgen.dsl.errors import FunctionError
from metalgen.dsl.trace import trace

WIDE = mx.zeros((30, 200))
TABLE = mx.zeros((4, 7))
COMPLEX = mx.array([1j, 2j])


def branches(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s if i >= j else -s


def converts(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return s * float(i)


def loops(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    for _ in range(i):
        s = s + 1
    return s


def by_numpy(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
    return np.tanh(s)


def forgets_to_return(s: Any, b: Any, h: Any, i: Any, j: Any) -> None:
    mx.tanh(s)


SCORES = {
    "branches on a value": (branches, "branches on a value.*write mx.where"),
    "asks for a value": (converts, r"asks for it.*no item\(\), int\(\), float\(\) or bool\(\)"),
    "loops": (loops, "branches on a value or asks for it"),
    "calls math": (lambda s, b, h, i, j: math.tanh(s), "asks for it.*no item"),
    "indexes a list": (lambda s, b, h, i, j: s * [1, 2, 3, 4][h], "asks for it"),
    "looks up in a dictionary": (
        lambda s, b, h, i, j: s * {0: 1.0}[h],
        r"a dictionary; put its values into an mx.array, and index that, as in table\[h\]",
    ),
    "calls NumPy": (by_numpy, "NumPy.*use the functions of mlx.core: mx.tanh for np.tanh"),
    "returns NumPy": (lambda *x: np.float32(1), "one scalar array, but got a numpy.float32"),
    "returns a tuple": (lambda s, b, h, i, j: (s, s), "got a tuple; return a single value"),
    "returns a list": (lambda s, b, h, i, j: [s], "got a list; return a single value"),
    "returns an axis": (lambda s, b, h, i, j: s[None], r"got an array of shape \(1,\); index"),
    "returns text": (lambda s, b, h, i, j: "s", "one scalar array, but got a builtins.str"),
    "returns nothing": (forgets_to_return, "got None; end the function with return"),
    "returns a row": (
        lambda s, b, h, i, j: s + TABLE[h],
        r"an array of shape \(7,\); index captured arrays in every axis",
    ),
    "returns a mask": (lambda s, b, h, i, j: i >= j, "got bool; give a mask as mask_mod"),
    "is no function": (3, r"a function score_mod\(score, b, h, q_idx, kv_idx\), but got 3"),
    "takes too few": (lambda s, b, h, i: s, "too many positional arguments"),
    "takes too many": (lambda s, b, h, i, j, k: s, "missing a required argument: 'k'"),
    "draws random numbers": (
        lambda s, b, h, i, j: s + mx.random.normal(),
        "MLX's RandomBits.*no random numbers; capture an array",
    ),
    "sums a long row": (
        lambda s, b, h, i, j: s + mx.sum(WIDE[h] * s),
        r"an array of shape \(200,\); compute it before",
    ),
    "sorts a row": (
        lambda s, b, h, i, j: mx.sort(TABLE[h] * s)[3],
        r"MLX's Sort on an array of shape \(7,\); compute it before",
    ),
    "multiplies long rows": (
        lambda s, b, h, i, j: s + mx.inner(WIDE[h], WIDE[i]),
        r"an array of shape \(1, 200\)",
    ),
    "is complex": (lambda s, b, h, i, j: mx.real(COMPLEX[h]), "but got complex64"),
    "cannot be exported": (
        lambda s, b, h, i, j: s + mx.bitwise_invert(i),
        r"MLX's BitwiseInvert; write x \^ -1",
    ),
}
MASKS = {
    "returns a number": (lambda b, h, i, j: i - j, "got int32; return a comparison"),
    "returns a pair": (lambda b, h, i, j: (j <= i, i < 3), "got a tuple; return a single value"),
    "compares in a chain": (lambda b, h, i, j: 0 <= i - j < 3, "& | ~ for and, or, not"),
    "takes a score": (lambda s, b, h, i, j: i >= j, "missing a required argument"),
    "branches with and": (lambda b, h, i, j: i >= j and i < 5, "& | ~ for and, or, not"),
}


@pytest.mark.parametrize("name", SCORES)
def test_a_score_function_that_does_not_fit(name: str) -> None:
    function, message = SCORES[name]
    with pytest.raises(FunctionError, match=f"^score_mod: expected .*{message}"):
        trace(function)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MASKS)
def test_a_mask_function_that_does_not_fit(name: str) -> None:
    function, message = MASKS[name]
    with pytest.raises(FunctionError, match=f"^mask_mod: expected .*{message}"):
        trace(function, "mask_mod")


def test_an_error_of_the_function_itself_is_handed_on() -> None:
    def broken(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        trace(broken)


def test_too_many_captured_arrays() -> None:
    arrays = [mx.zeros((n + 1,)) for n in range(17)]

    def many(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        for array in arrays:
            s = s + array[i]
        return s

    with pytest.raises(FunctionError, match="at most 16 captured arrays, but got 17"):
        trace(many)


def test_errors_are_of_the_family_and_survive_pickling() -> None:
    with pytest.raises(FunctionError) as caught:
        trace(branches)
    error = caught.value
    assert isinstance(error, ArgumentError) and isinstance(error, MetalgenError)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert error.argument == "score_mod"
