"""Gradients of calls, against formulas in float64, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

import metalgen
from metalgen import AttentionConfig, simulator
from metalgen.calls import resolve, verify_gradients
from metalgen.calls.verify import relative_error
from metalgen.problem.inputs import Inputs
from metalgen.problem.samples import sample_call
from metalgen.reference import config_features, gradients_float64
from metalgen.testing.devices import normal

SCALE = 0.3
ERROR = {"float32": 3e-6, "float16": 4e-3, "bfloat16": 3e-2}
"""Of MLX's own gradient, which keeps scores and weights of 16-bit queries in 16 bits."""


@pytest.fixture(autouse=True)
def none_known() -> Iterator[None]:
    resolve.forget_kernels()
    yield
    resolve.forget_kernels()


def by_hand(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    given: mx.array,
    seen: NDArray[np.bool_],
    sinks: mx.array | None = None,
) -> list[NDArray[np.float64]]:
    """Gradients of ``(out * given).sum()`` in q, k, v and sinks, by the formulas of a softmax."""
    group = q.shape[1] // k.shape[1]
    wide = [np.array(x.astype(mx.float32), np.float64) for x in (q, k, v, given)]
    wide[1:3] = (np.repeat(x, group, axis=1) for x in wide[1:3])
    queries, keys, values, cotangent = wide
    scores = np.where(seen, SCALE * queries @ keys.swapaxes(-1, -2), -np.inf)
    logits = np.full(q.shape[1], -np.inf) if sinks is None else np.array(sinks, np.float64)
    peak = np.maximum(scores.max(axis=-1, keepdims=True), logits[:, None, None])
    peak = np.where(np.isfinite(peak), peak, 0)
    weights, of_sink = np.exp(scores - peak), np.exp(logits[:, None, None] - peak)
    total = weights.sum(axis=-1, keepdims=True) + of_sink
    total[total == 0] = 1
    weights, of_sink = weights / total, of_sink / total
    of_weights = cotangent @ values.swapaxes(-1, -2)
    row = (weights * of_weights).sum(axis=-1, keepdims=True)
    of_scores = weights * (of_weights - row)
    found = [
        SCALE * of_scores @ keys,
        SCALE * of_scores.swapaxes(-1, -2) @ queries,
        weights.swapaxes(-1, -2) @ cotangent,
    ]
    for n in (1, 2):  # query heads that share a key head
        heads = (q.shape[0], k.shape[1], group, *found[n].shape[2:])
        found[n] = found[n].reshape(heads).sum(axis=2)
    return found if sinks is None else [*found, -(of_sink * row).sum(axis=(0, 2, 3))]


def places(q_len: int, kv_len: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The key at the query's own position, and each key."""
    return np.arange(q_len)[:, None] + kv_len - q_len, np.arange(kv_len)[None]


ARRAY = np.random.default_rng(3).random((2, 1, 21, 37)) < 0.3
ARRAY[1, 0, 4] = False  # a row that sees no key

CASES: dict[str, tuple[dict[str, Any], Callable[[Any, Any], Any], tuple[int, int]]] = {
    "plain": ({}, lambda own, j: j >= 0, (21, 37)),
    "one query": ({"causal": True}, lambda own, j: j <= own, (1, 37)),
    "causal": ({"causal": True}, lambda own, j: j <= own, (21, 37)),
    "causal, rows without keys": ({"causal": True}, lambda own, j: j <= own, (37, 21)),
    "window": (
        {"causal": True, "window_left": 6},
        lambda own, j: (j <= own) & (j >= own - 6),
        (21, 37),
    ),
    "window on both sides": (
        {"window_left": 6, "window_right": 2, "deterministic": True},
        lambda own, j: (j <= own + 2) & (j >= own - 6),
        (21, 37),
    ),
    "array": ({"mask": mx.array(ARRAY)}, lambda own, j: ARRAY & (j >= 0), (21, 37)),
    "array and causal": (
        {"mask": mx.array(ARRAY), "causal": True, "max_work": 1 << 20},
        lambda own, j: ARRAY & (j <= own),
        (21, 37),
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_mlx_computes_the_gradients_of_what_it_can_compute(case: str, dtype: str) -> None:
    check_case(case, dtype, "reference")


@pytest.mark.parametrize("case", CASES)
def test_kernels_compute_the_gradients_of_calls(case: str) -> None:
    dtype = ("float32", "float16", "bfloat16")[list(CASES).index(case) % 3]
    check_case(case, dtype, "simulator")


def check_case(case: str, dtype: str, device: str) -> None:
    """Gradients of a call on a device, and what its kernel says of them."""
    options, seen, (q_len, kv_len) = CASES[case]
    q, given = (normal((2, 4, q_len, 24), dtype, seed) for seed in (1, 4))
    k, v = normal((2, 2, kv_len, 24), dtype, 2), normal((2, 2, kv_len, 24), dtype, 3)

    def loss(*arrays: mx.array) -> mx.array:
        out = metalgen.attention(*arrays, scale=SCALE, device=device, **options)
        return (out * given).astype(mx.float32).sum()

    found = mx.grad(loss, argnums=(0, 1, 2))(q, k, v)
    shape = (2, 4, q_len, kv_len)
    wanted = by_hand(q, k, v, given, np.broadcast_to(seen(*places(q_len, kv_len)), shape))
    for got, exact in zip(found, wanted, strict=True):
        assert str(got.dtype) == f"mlx.core.{dtype}"
        error = np.linalg.norm(np.array(got.astype(mx.float32)) - exact) / np.linalg.norm(exact)
        assert error <= ERROR[dtype]
    (kernel,) = resolve._known.values()
    assert kernel.backend == ("plain" if device == "reference" else "metalgen")
    backward, words = {
        "reference": ("mlx", "gradients: MLX's own, of mx.fast.scaled_dot_product_attention"),
        "simulator": ("metalgen", "gradients: metalgen's backward kernels ("),
    }[device]
    assert kernel.backward == backward
    assert words in kernel.explain()
    if device == "simulator":
        assert kernel.explain().count("check on simulator: ok") == 3  # forward, and two backward


@pytest.mark.parametrize("device", ["reference", "simulator"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_sinks(causal: bool, device: str) -> None:
    q, k, v = normal((2, 4, 21, 24)), normal((2, 2, 37, 24), seed=2), normal((2, 2, 37, 16), seed=3)
    given, sinks = normal((2, 4, 21, 16), seed=4), normal((4,), seed=5)

    def loss(q: mx.array, k: mx.array, v: mx.array, sinks: mx.array) -> mx.array:
        out = metalgen.attention(q, k, v, scale=SCALE, sinks=sinks, causal=causal, device=device)
        return (out * given).sum()

    found = mx.grad(loss, argnums=(0, 1, 2, 3))(q, k, v, sinks)
    own, j = places(21, 37)
    seen = np.broadcast_to((j <= own) | (not causal), (2, 4, 21, 37))
    for got, exact in zip(found, by_hand(q, k, v, given, seen, sinks), strict=True):
        np.testing.assert_allclose(np.array(got), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "backward"),
    [
        ({}, "mlx"),
        ({"head_dim": 200, "value_head_dim": 40, "heads_per_kv": 3}, "mlx"),
        ({"causal": True, "window_left": 3, "array_mask": True, "deterministic": True}, "mlx"),
        ({"dtype": "float32", "tf32": True}, "mlx"),
        ({"dtype": "float32", "sinks": True}, "mlx"),
        ({"sinks": True}, "plain"),  # MLX rounds them to the type of q
        ({"return_lse": True}, "plain"),
        ({"softcap": 30.0}, "plain"),
        ({"bias": True}, "plain"),
        ({"kv_lens": True}, "plain"),
        ({"dropout": 0.1}, "plain"),
    ],
)
def test_what_computes_gradients_is_read_off_the_config(
    fields: dict[str, Any], backward: str
) -> None:
    config = AttentionConfig(**{"head_dim": 64, **fields})
    kernel = metalgen.get_kernel(config, device="reference")
    assert kernel.backward == backward
    words = {"mlx": "gradients: MLX's own", "plain": "gradients: recomputed in plain MLX"}
    assert words[backward] in kernel.explain()


def peak(function: Callable[..., Any], *arrays: mx.array) -> int:
    """Bytes that a function needs for a moment, its results included; the order may vary them."""
    mx.eval(arrays)
    least = []
    for _ in range(3):
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(function(*arrays))
        least.append(mx.get_peak_memory() - before)
    return min(least)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_take_no_more_memory_than_those_of_mlx(causal: bool, dtype: str) -> None:
    """The backward alone: no result depends on the output, so that no forward runs."""
    q, k, v, given = (normal((1, 1, 1024, 64), dtype, seed) for seed in range(4))

    def ours(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (metalgen.attention(q, k, v, causal=causal, device="reference") * given).sum()

    def mlx(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        mask = "causal" if causal else None
        out = mx.fast.scaled_dot_product_attention(q, k, v, scale=64**-0.5, mask=mask)
        return (out * given).sum()

    def plain(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (metalgen.reference.attention_mlx(q, k, v, scale=64**-0.5)[0] * given).sum()

    own, theirs, definition = (
        peak(mx.grad(f, argnums=(0, 1, 2)), q, k, v) for f in (ours, mlx, plain)
    )
    assert own <= 1.1 * theirs
    assert own < 0.75 * definition


def test_gradients_are_compiled_checkpointed_and_differentiated_again() -> None:
    q, k, v = (normal((1, 2, n, 16), seed=n) for n in (9, 11, 11))

    def loss(q: mx.array, device: str = "simulator") -> mx.array:
        out = metalgen.attention(q, k, v, causal=True, device=device)
        return (out * out * out).sum()

    def plain(q: mx.array) -> mx.array:
        out, _ = metalgen.reference.attention_mlx(q, k, v, scale=0.25, causal=True)
        return (out * out * out).sum()

    wanted = np.array(mx.grad(plain)(q))
    for found in (
        mx.grad(lambda q: loss(q, "reference"))(q),
        mx.compile(mx.grad(lambda q: loss(q, "reference")))(q),
        mx.grad(mx.checkpoint(loss))(q),
    ):
        np.testing.assert_allclose(np.array(found), wanted, rtol=1e-4, atol=1e-6)

    assert np.isfinite(np.array(mx.grad(loss)(q))).all()

    def curvature(function: Callable[[mx.array], mx.array]) -> mx.array:
        return mx.grad(lambda q: (mx.grad(function)(q) ** 2).sum())(q)

    for device in ("reference", "simulator"):
        found = curvature(lambda q, device=device: loss(q, device))  # type: ignore[misc]
        np.testing.assert_allclose(
            np.array(found), np.array(curvature(plain)), rtol=1e-3, atol=1e-5
        )


def test_every_array_of_a_call_has_its_gradient_beside_kernels() -> None:
    """MLX gives arrays that a differentiated function captures a gradient of 0, so none may be."""
    q, k, v, given = (normal((1, 4, n, 16), seed=n) for n in (70, 80, 80, 70))
    bias, slopes, sinks = normal((4, 70, 80), seed=5), metalgen.alibi_slopes(4), normal((4,))

    def loss(*arrays: mx.array, device: str = "simulator") -> mx.array:
        q, k, v, bias, slopes, sinks = arrays
        options: dict[str, Any] = {"bias": bias, "alibi_slopes": slopes, "sinks": sinks}
        out, lse = metalgen.attention(
            *(q, k, v), softcap=4.0, causal=True, return_lse=True, device=device, **options
        )
        return (out * given).sum() + (lse * lse).sum()

    arrays = (q, k, v, bias, slopes, sinks)
    found = mx.grad(loss, argnums=tuple(range(6)))(*arrays)
    features = {"softcap": 4.0, "causal": True, "alibi": True, "bias": True, "sinks": True}
    inputs = Inputs(bias=bias[None], alibi_slopes=slopes, sinks=sinks)
    features |= {"inputs": inputs}
    _, lse = metalgen.reference.attention_mlx(q, k, v, scale=0.25, **features)
    exact = gradients_float64(q, k, v, (given, 2 * lse), scale=0.25, **features)
    exact["bias"] = exact["bias"][0]
    for name, array in zip(("q", "k", "v", "bias", "alibi_slopes", "sinks"), found, strict=True):
        assert relative_error(array, exact[name]) <= 1e-5, name


@pytest.mark.parametrize("bits", [None, 8])
def test_queries_over_a_cache_have_their_gradient_from_a_kernel(bits: int | None) -> None:
    """Pages and quantized keys have none from kernels; those of whole pages are plain MLX's."""
    config = AttentionConfig(
        32, "float32", page_size=8, kv_bits=bits, kv_group=32 if bits else 64, causal=True
    )
    q, k, v, inputs = sample_call(config, batch=2, q_len=37, kv_len=53, seed=1)
    kernel = metalgen.get_kernel(config, batch=2, heads=2, q_len=37, device="simulator")
    given = normal(q.shape, "float32", 5)

    def loss(q: mx.array) -> mx.array:
        return (kernel(q, k, v, scale=SCALE, inputs=inputs) * given).sum()

    mx.eval(mx.grad(loss)(q))
    with simulator.record() as runs:
        found = mx.grad(loss)(q)
        mx.eval(found)
    assert [name for each in runs if "backward" in (name := each.kernel)]
    assert kernel.backward == "metalgen" and "backward_rows" in kernel.explain()
    features = config_features(config) | {"inputs": inputs}
    exact = gradients_float64(q, k, v, (given, None), scale=SCALE, **features)["q"]
    assert relative_error(found, exact) < 1e-5


def test_wrong_backward_kernels_give_way_to_plain_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        verify_gradients, "exact_gradients", lambda *_: {n: np.ones(1) for n in "qkv"}
    )
    q, k, v = (normal((1, 1, 70, 16), seed=n) for n in range(3))
    found = mx.grad(lambda q: metalgen.attention(q, k, v, device="simulator").sum())(q)
    wanted = mx.grad(lambda q: metalgen.attention(q, k, v, device="reference").sum())(q)
    np.testing.assert_allclose(np.array(found), np.array(wanted), rtol=1e-3, atol=1e-5)
    (kernel,) = [each for each in resolve._known.values() if each.device == "simulator"]
    assert "check on simulator: wrong now" in kernel.explain()
    assert "FALLBACK to plain MLX operations: no backward kernel passed" in kernel.explain()
