"""Gradients of what scores are made of besides q and k: sums by query, by key, and by pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import metalgen
from metalgen import simulator
from metalgen.calls import backward, resolve
from metalgen.calls.verify import relative_error
from metalgen.devices import sums
from metalgen.devices.kernel import KernelDevice
from metalgen.problem.inputs import Inputs
from metalgen.reference import gradients_float64
from metalgen.testing.devices import normal

SCALE = 0.3
HEADS, ROWS, KEYS = 4, 21, 37
TABLES: dict[str, tuple[tuple[int, ...], Callable[..., Any], bool]] = {
    "one number": ((), lambda t: lambda s, b, h, q, kv: s * t, False),
    "by head": ((HEADS,), lambda t: lambda s, b, h, q, kv: s * t[h], False),
    "by entry and head": ((2, HEADS), lambda t: lambda s, b, h, q, kv: s + t[b, h], False),
    "by query": ((ROWS,), lambda t: lambda s, b, h, q, kv: mx.tanh(s) * t[q], False),
    "by groups of queries": ((ROWS,), lambda t: lambda s, b, h, q, kv: s + t[q // 8], False),
    "by key": ((KEYS,), lambda t: lambda s, b, h, q, kv: s + t[kv], False),
    "by head and key": ((HEADS, KEYS), lambda t: lambda s, b, h, q, kv: s * t[h, kv], False),
    "by distance": (
        (HEADS, ROWS + KEYS),
        lambda t: lambda s, b, h, q, kv: s + t[h, kv - q + ROWS],
        True,
    ),
}
"""The shape of a captured array, the function that reads it, and whether kernels add to it
atomically: only where a query and a key together tell the element."""


@pytest.fixture(autouse=True)
def none_known() -> Iterator[None]:
    resolve.forget_kernels()
    yield
    resolve.forget_kernels()


def arrays() -> tuple[mx.array, ...]:
    shapes = ((2, HEADS, ROWS, 16), (2, 2, KEYS, 16), (2, 2, KEYS, 16), (2, HEADS, ROWS, 16))
    q, k, v, dout = (normal(shape, "float32", n) for n, shape in enumerate(shapes))
    return q, k, v, dout


@pytest.mark.parametrize("name", TABLES)
def test_captured_arrays_have_their_gradient_from_kernels(name: str) -> None:
    shape, function, atomic = TABLES[name]
    table = 1.0 + 0.5 * normal(shape, "float32", 9)
    q, k, v, dout = arrays()

    def loss(table: mx.array) -> mx.array:
        out = metalgen.flex_attention(
            q, k, v, score_mod=function(table), scale=SCALE, device="simulator"
        )
        return (out * dout).sum()

    mx.eval(mx.grad(loss)(table))  # checks the kernels
    with simulator.record(checked=True) as runs:
        found = mx.grad(loss)(table)
        mx.eval(found)
    assert all(not each.findings for each in runs)
    assert any("backward_sums" in each.kernel for each in runs)
    counts = [b.atomics for each in runs for b in each.counters.buffers]
    assert any(counts) == atomic
    step = 1e-2  # the loss is float32
    for index in list(np.ndindex(shape))[:: max(1, table.size // 5)]:
        ends = []
        for sign in (1, -1):
            moved = np.array(table)
            moved[index] += sign * step
            ends.append(loss_by_hand(name, moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(float(np.array(found)[index]) - slope) <= 2e-3 * max(1.0, abs(slope))


def loss_by_hand(name: str, table: np.ndarray[Any, Any]) -> float:
    """The loss of a captured array, in float64."""
    q, k, v, dout = (np.array(x, np.float64) for x in arrays())
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    s = SCALE * q @ k.swapaxes(-1, -2)
    h = np.arange(HEADS)[:, None, None]
    b, i, j = np.arange(2)[:, None, None, None], np.arange(ROWS)[:, None], np.arange(KEYS)
    t = np.asarray(table, np.float64)
    s = {
        "one number": lambda: s * t,
        "by head": lambda: s * t[h],
        "by entry and head": lambda: s + t[b, h],
        "by query": lambda: np.tanh(s) * t[i],
        "by groups of queries": lambda: s + t[i // 8],
        "by key": lambda: s + t[j],
        "by head and key": lambda: s * t[h, j],
        "by distance": lambda: s + t[h, j - i + ROWS],
    }[name]()
    weights = np.exp(s - s.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return float((weights @ v * dout).sum())


def test_a_gradient_that_nothing_uses_launches_no_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The simulator runs kernels at once; so lazy operations of MLX stand for them here."""
    q, k, v, dout = arrays()
    slopes = normal((HEADS,), "float32", 5)
    marks = {"backward_rows": mx.erf, "backward_keys": mx.cosh}

    def gradients(self: object, config: object, schedules: Any) -> Callable[..., Any]:
        family = schedules[0].family
        made = (0,) if family == "backward_rows" else (1, 2)
        return lambda *call, **_: [marks[family](call[n]) for n in made]

    def build_sum(self: object, config: object, schedule: object, summed: object) -> Any:
        return lambda *call, **_: [mx.arctan(call[6].alibi_slopes)]

    monkeypatch.setattr(KernelDevice, "build_gradients", gradients)
    monkeypatch.setattr(KernelDevice, "build_sum", build_sum)
    monkeypatch.setattr(backward, "passes", lambda *_: True)
    monkeypatch.setattr(backward, "sum_fault", lambda *_: "")

    def loss(q: mx.array, k: mx.array, slopes: mx.array) -> mx.array:
        out = metalgen.attention(q, k, v, scale=SCALE, alibi_slopes=slopes, device="simulator")
        return (out * dout).sum()

    for number, own in enumerate(("Erf", "Cosh", "ArcTan")):
        found = mx.grad(loss, argnums=number)(q, k, slopes)
        mx.export_to_dot(str(tmp_path / "graph"), found)
        text = (tmp_path / "graph").read_text()
        names = {name for name in ("Erf", "Cosh", "ArcTan") if f'"{name}"' in text}
        assert names == {own}, text


@pytest.mark.parametrize("shape", [(1, HEADS, ROWS, KEYS), (2, HEADS, ROWS, KEYS)])
def test_deterministic_gradients_of_a_bias_are_not_added_atomically(
    shape: tuple[int, ...],
) -> None:
    """Where several heads or entries add to an element, plain operations sum them instead."""
    q, k, v, dout = arrays()
    bias = normal(shape, "float32", 6)

    def loss(bias: mx.array) -> mx.array:
        out = metalgen.attention(
            q, k, v, scale=SCALE, bias=bias, deterministic=True, device="simulator"
        )
        return (out * dout).sum()

    mx.eval(mx.grad(loss)(bias))
    with simulator.record() as runs:
        found = mx.grad(loss)(bias)
        mx.eval(found)
    assert any("backward_sums" in each.kernel for each in runs) == (shape[0] == 2)
    exact = gradients_float64(
        q, k, v, (dout, None), scale=SCALE, bias=True, inputs=Inputs(bias=bias)
    )
    assert relative_error(found, exact["bias"]) < 1e-5


def test_a_kernel_of_sums_that_is_wrong_gives_way_to_plain_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sums, "_summed_to", lambda x, shape: 2 * x.sum(axis=(0, 2, 3)))
    q, k, v, dout = arrays()
    slopes = normal((HEADS,), "float32", 5)

    def loss(slopes: mx.array) -> mx.array:
        out = metalgen.attention(q, k, v, scale=SCALE, alibi_slopes=slopes, device="simulator")
        return (out * dout).sum()

    found = mx.grad(loss)(slopes)
    inputs = Inputs(alibi_slopes=slopes)
    exact = gradients_float64(q, k, v, (dout, None), scale=SCALE, alibi=True, inputs=inputs)
    assert relative_error(found, exact["alibi_slopes"]) < 1e-5
