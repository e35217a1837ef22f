"""Arrays that MLX computes before the kernel, and short rows that the kernel computes itself.

Expected values are the functions' own: each is called with scalars, element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from function_kernels import ELEMENTS, places, run
from hypothesis import given, settings
from hypothesis import strategies as st

from metalgen import flex_attention
from metalgen.dsl.trace import trace
from metalgen.testing.devices import normal

KEY = mx.random.split(mx.random.key(7), 8)
TABLE = mx.random.normal((4, 50), key=KEY[0])
SQUARE = mx.random.normal((4, 4), key=KEY[1])
NUMBERS = mx.random.randint(0, 50, (3, 50, 4), key=KEY[2])
Q_PE = mx.random.normal((3, 4, 50, 6), key=KEY[3])
K_PE = mx.random.normal((3, 50, 6), key=KEY[4])
LENGTHS = mx.array([3, 20, 2, 25])
FLAGS = mx.random.uniform(shape=(4, 50), key=KEY[5]) < 0.5

BEFORE: dict[str, Callable[..., Any]] = {
    "cumsum": lambda s, b, h, i, j: s + mx.cumsum(TABLE, axis=1)[h, i],
    "reversed cumprod": lambda s, b, h, i, j: mx.cumprod(
        TABLE, axis=0, reverse=True, inclusive=False
    )[h, i],
    "cummax": lambda s, b, h, i, j: mx.cummax(TABLE, axis=1)[h, i],
    "sort": lambda s, b, h, i, j: mx.sort(TABLE, axis=0)[h, i],
    "argsort": lambda s, b, h, i, j: s + mx.argsort(TABLE, axis=1)[h, i],
    "argmax": lambda s, b, h, i, j: s + mx.argmax(TABLE, axis=1)[h],
    "argmin": lambda s, b, h, i, j: s + mx.argmin(TABLE, axis=0, keepdims=True)[0, i],
    "topk": lambda s, b, h, i, j: mx.topk(TABLE, 3, axis=1).min(axis=1)[h],
    "matmul": lambda s, b, h, i, j: (SQUARE @ TABLE)[h, i],
    "einsum": lambda s, b, h, i, j: mx.einsum("hk,kd->dh", SQUARE, TABLE)[i, h],
    "outer": lambda s, b, h, i, j: mx.outer(TABLE[0], TABLE[-1])[i, j],
    "pad": lambda s, b, h, i, j: mx.pad(TABLE, ((0, 0), (2, 1)), constant_values=7)[h, i],
    "roll": lambda s, b, h, i, j: mx.roll(TABLE, 3, axis=1)[h, i],
    "split": lambda s, b, h, i, j: mx.split(TABLE, [10, 30], axis=1)[1][h, i % 20],
    "eye": lambda s, b, h, i, j: s * mx.eye(50)[i, j],
    "indexing by an array": lambda s, b, h, i, j: TABLE[:, NUMBERS[0, :, 0]][h, i],
    "indexing by two": lambda s, b, h, i, j: TABLE[LENGTHS % 4, LENGTHS][h],
    "take along an axis": lambda s, b, h, i, j: mx.take_along_axis(
        TABLE, mx.argsort(TABLE, axis=1), axis=1
    )[h, i],
    "put along an axis": lambda s, b, h, i, j: mx.put_along_axis(
        TABLE, mx.argmax(TABLE, axis=1, keepdims=True), mx.array(-9.0), axis=1
    )[h, i],
    "updates": lambda s, b, h, i, j: TABLE.at[:, 1:3].add(5.0)[h, i],
    "updates by an array": lambda s, b, h, i, j: TABLE.at[LENGTHS % 4].multiply(2.0)[h, i],
    "convolution": lambda s, b, h, i, j: mx.conv1d(
        TABLE[:, :, None], mx.ones((1, 3, 1)), padding=1
    )[h, i, 0],
    "FFT": lambda s, b, h, i, j: mx.abs(mx.fft.fft(TABLE))[h, i],
    "softmax": lambda s, b, h, i, j: mx.softmax(TABLE, axis=0)[h, i],
    "arange": lambda s, b, h, i, j: s + mx.arange(3, 103, 2)[i],
    "a product and a sum": lambda s, b, h, i, j: mx.addmm(
        TABLE, SQUARE, TABLE, alpha=2.0, beta=3.0
    )[h, i],
    "inverse error function": lambda s, b, h, i, j: mx.erfinv(mx.tanh(TABLE))[h, i],
    "a slice from an array": lambda s, b, h, i, j: mx.slice(
        TABLE, mx.array([1]), axes=(0,), slice_size=(2, 50)
    )[h % 2, i],
    "a slice's update": lambda s, b, h, i, j: mx.slice_update(
        TABLE, mx.zeros((2, 2)), mx.array([0, 1]), axes=(0, 1)
    )[h, i],
    "sums at places of an axis": lambda s, b, h, i, j: mx.grad(
        lambda x: mx.take_along_axis(x, mx.argsort(TABLE, axis=1)[:, :3], axis=1).sum()
    )(TABLE)[h, i],
    "a sorted row": lambda s, b, h, i, j: mx.sort(TABLE[h])[i],
    "a row's order": lambda s, b, h, i, j: s + mx.argsort(TABLE[h])[i],
    "a row's largest place": lambda s, b, h, i, j: s + mx.argmax(TABLE[h]),
    "a row's cumulative sum": lambda s, b, h, i, j: mx.cumsum(TABLE[h] * 2)[i],
    "a row's softmax": lambda s, b, h, i, j: mx.softmax(TABLE[h])[i],
    "a row's log-sum-exp": lambda s, b, h, i, j: s + mx.logsumexp(TABLE[h]),
    "a rolled row": lambda s, b, h, i, j: mx.roll(TABLE[h], 2)[i],
    "half of a row": lambda s, b, h, i, j: mx.split(TABLE[h], 2)[1][i % 25],
    "a row, backwards": lambda s, b, h, i, j: TABLE[h, ::-2][i % 25],
    "a row at places": lambda s, b, h, i, j: TABLE[h][LENGTHS][i % 4],
    "a row times a matrix": lambda s, b, h, i, j: (SQUARE[h] @ TABLE)[i],
    "a row's element from the end": lambda s, b, h, i, j: mx.cumsum(NUMBERS[b, i])[-1] + s,
    "a row of a fixed one": lambda s, b, h, i, j: mx.cumsum(NUMBERS[1, i])[h],
}
INSIDE: dict[str, Callable[..., Any]] = {
    "a dot product": lambda s, b, h, i, j: s + (Q_PE[b, h, i] * K_PE[b, j]).sum(),
    "a matrix product": lambda s, b, h, i, j: s + Q_PE[b, h, i] @ K_PE[b, j],
    "membership": lambda s, b, h, i, j: mx.where((NUMBERS[b, i] == j).any(), s, -1.0),
    "no membership": lambda s, b, h, i, j: mx.where((NUMBERS[b, i] != j).all(), s, -1.0),
    "document numbers": lambda s, b, h, i, j: mx.where(
        (mx.cumsum(LENGTHS) <= i).sum() == (mx.cumsum(LENGTHS) <= j).sum(), s, -1.0
    ),
    "a distance": lambda s, b, h, i, j: s - mx.sqrt(mx.square(K_PE[b, i] - K_PE[b, j]).sum()),
    "the largest": lambda s, b, h, i, j: s + mx.max(mx.abs(K_PE[b, j])) - mx.min(K_PE[b, i]),
    "a mean": lambda s, b, h, i, j: s * K_PE[b, j].mean(),
    "a part of a row": lambda s, b, h, i, j: s + K_PE[b, j][1:4].sum() * K_PE[b, j, ::2].prod(),
    "rows of rows": lambda s, b, h, i, j: s + (SQUARE @ Q_PE[b, :, i])[:, 2].sum(),
    "joined rows": lambda s, b, h, i, j: mx.concatenate([K_PE[b, i], K_PE[b, j]]).max() + s,
    "counts": lambda s, b, h, i, j: s + (NUMBERS[b, i] < j).sum(),
}


def called(function: Callable[..., Any]) -> Any:
    """The function's own values at `places`."""
    columns = [list(x) for x in places()]
    values = [function(*(x[n] for x in columns)) for n in range(ELEMENTS)]
    return np.array([float(mx.array(value).item()) for value in values])


@pytest.mark.parametrize("name", [*BEFORE, *INSIDE])
def test_a_function_has_the_values_that_it_has_in_mlx(name: str) -> None:
    function = (BEFORE | INSIDE)[name]
    traced = trace(function)
    score, *indices = (np.array(x) for x in places())
    given = dict(zip(("score", "b", "h", "q", "kv"), (score, *indices), strict=True))
    arrays = [np.array(a) for a in traced.arrays]
    wide = np.broadcast_to(traced.graph.evaluate(np, given, arrays), (ELEMENTS,))
    np.testing.assert_allclose(wide, called(function), rtol=2e-5, atol=2e-5)
    if name in BEFORE:  # one element of one array, whatever it took to make that
        assert len(traced.arrays) <= 1
        assert sum(node.op == "load" for node in traced.graph.nodes) <= 1


def test_kernels_compute_the_same() -> None:
    functions = BEFORE | INSIDE
    traced = [trace(f) for f in functions.values() if f is not BEFORE["FFT"]]
    found = [values for n in range(0, len(traced), 12) for values in run(traced[n : n + 12])]
    names = [name for name in functions if name != "FFT"]
    for name, values in zip(names, found, strict=True):
        wanted = called(functions[name])
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("device", ["reference", "simulator"])
def test_decoupled_rotary_scores_and_top_k_in_one_attention(device: str) -> None:
    """Scores of a second pair of rows, and the keys that an indexer chose."""
    q, k, v = (normal((3, 4, n, 32), "float32", s) for s, n in ((1, 50), (2, 50), (3, 50)))

    def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        return s + (Q_PE[b, h, i] * K_PE[b, j]).sum()

    def mask_mod(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (NUMBERS[b, i] == j).any()

    out = flex_attention(q, k, v, score_mod, mask_mod, device=device)
    scores = np.array(q) @ np.array(k).swapaxes(-1, -2) * 32**-0.5
    scores = scores + np.einsum("bhid,bjd->bhij", np.array(Q_PE), np.array(K_PE))
    chosen = (np.array(NUMBERS)[:, :, :, None] == np.arange(50)).any(axis=2)[:, None]
    likely = np.where(chosen, np.exp(scores), 0)
    expected = likely / likely.sum(axis=-1, keepdims=True) @ np.array(v)
    np.testing.assert_allclose(np.array(out), expected, rtol=2e-4, atol=2e-5)


def test_gradients_reach_arrays_that_are_computed_before_and_rows() -> None:
    q, k, v = (normal((1, 2, 9, 16), "float32", s) for s in (1, 2, 3))

    def loss(table: mx.array, rows: mx.array) -> mx.array:
        def score_mod(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            return s + mx.cumsum(table, axis=1)[h, i] * (rows[i] * rows[j]).sum()

        return flex_attention(q, k, v, score_mod, device="reference").square().sum()

    def by_hand(table: mx.array, rows: mx.array) -> mx.array:
        scores = q @ k.swapaxes(-1, -2) * 0.25
        scores = scores + mx.cumsum(table, axis=1)[:, :, None] * (rows @ rows.T)
        return (mx.softmax(scores, axis=-1) @ v).square().sum()

    given = TABLE[:2, :9], normal((9, 5), "float32", 4)
    for got, wanted in zip(
        mx.grad(loss, argnums=(0, 1))(*given), mx.grad(by_hand, argnums=(0, 1))(*given), strict=True
    ):
        np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=1e-3, atol=1e-4)


ROW_OPERATIONS = st.sampled_from(
    [
        lambda x: x + 1,
        mx.abs,
        mx.square,
        lambda x: x[::-1],
        lambda x: x[x.shape[0] // 3 : x.shape[0] // 3 + 3],
        lambda x: mx.concatenate([x, 2 * x])[:6],
        lambda x: x * mx.array([1.0, -1, 2, 0.5, 3, -2])[: x.shape[0]],
        lambda x: mx.where(x > 0, x, -2 * x),
        lambda x: mx.maximum(x, x.mean()),
        lambda x: x.reshape(-1, 1).T[0],
    ]
)
REDUCTIONS = st.sampled_from(
    [mx.sum, mx.max, mx.min, mx.prod, mx.mean, lambda x: (x > 0).any(), lambda x: (x > -1).all()]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(ROW_OPERATIONS, max_size=4), REDUCTIONS)
def test_any_chain_of_operations_on_a_row(operations: list[Any], reduce: Any) -> None:
    def function(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        row = K_PE[b, i] - K_PE[b, j]
        for operation in operations:
            row = operation(row)
        return s + reduce(row)

    traced = trace(function)
    score, *indices = (np.array(x) for x in places())
    given = dict(zip(("score", "b", "h", "q", "kv"), (score, *indices), strict=True))
    wide = traced.graph.evaluate(np, given, [np.array(a) for a in traced.arrays])
    np.testing.assert_allclose(wide, called(function), rtol=1e-4, atol=1e-4)
